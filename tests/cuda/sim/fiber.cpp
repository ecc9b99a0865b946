/* fiber.cpp: see fiber.h. A hand-written switch on x86-64, ucontext elsewhere and where
 * CUSIM_UCONTEXT is defined (it enters the kernel to save the signal mask: some 20 times slower).
 */
#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#if defined(__x86_64__) && !defined(CUSIM_UCONTEXT)
#define CUSIM_SWITCH_X86_64
#else
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cusim {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t stack_size = 256 << 10; // red zones make frames larger
#else
constexpr size_t stack_size = 64 << 10;
#endif

/* Stacks lie in one range that is reserved at once: an address tells whether it is on one. */
constexpr size_t max_fibers = 1024 + 1; // a block's threads, and one that is idle
const size_t page = (size_t)sysconf(_SC_PAGESIZE);
size_t n_fibers;
Fiber fibers[max_fibers];

/* Frames at the same offset of every stack would all compete for the same few cache lines. */
constexpr size_t colour_step = 7 * 64, n_colours = 16;

#ifdef CUSIM_SWITCH_X86_64

/* void cusim_switch(void **saved, void *to): pushes what a function must preserve, keeps the stack
 * pointer in *saved, and pops the same from `to`. The floating-point modes are the same in all. */
extern "C" void cusim_switch(void **saved, void *to);
__asm__(".text\n"
        ".globl cusim_switch\n"
        ".hidden cusim_switch\n"
        ".type cusim_switch, @function\n"
        "cusim_switch:\n"
        "    pushq %rbp\n"
        "    pushq %rbx\n"
        "    pushq %r12\n"
        "    pushq %r13\n"
        "    pushq %r14\n"
        "    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n"
        "    popq %r14\n"
        "    popq %r13\n"
        "    popq %r12\n"
        "    popq %rbx\n"
        "    popq %rbp\n"
        "    ret\n"
        ".size cusim_switch, . - cusim_switch\n");

void prepare(Fiber &fiber, void (*function)(), size_t colour) {
    void **top = (void **)((char *)fiber.stack + fiber.size - colour); // a multiple of 64
    *--top = nullptr; // the return address that `function` sees: the end of backtraces
    *--top = (void *)function;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.context = top;
}

void jump(Fiber &from, Fiber &to) { cusim_switch(&from.context, to.context); }

#else

void prepare(Fiber &fiber, void (*function)(), size_t colour) {
    if (!fiber.context) fiber.context = new ucontext_t;
    ucontext_t *context = (ucontext_t *)fiber.context;
    getcontext(context);
    context->uc_stack.ss_sp = (void *)fiber.stack;
    context->uc_stack.ss_size = fiber.size - colour;
    context->uc_link = nullptr;
    makecontext(context, function, 0);
}

void jump(Fiber &from, Fiber &to) {
    if (!from.context) from.context = new ucontext_t;
    swapcontext((ucontext_t *)from.context, (ucontext_t *)to.context);
}

#endif

void reserve() {
    void *p = mmap(nullptr, fiber_stacks_size, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        perror("cusim: cannot reserve the stacks of fibers");
        exit(2);
    }
    fiber_stacks = (char *)p;
}

[[maybe_unused]] Fiber *leaving; // in the switch under way

/* ASan must know which stack it is on. What runs first on arrival completes what the side that
 * left began; the first to be left is the program's own stack, whose bounds only ASan knows. */
void arrived([[maybe_unused]] void *fake_stack) {
#ifdef __SANITIZE_ADDRESS__
    const void *stack;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack, &stack, &size);
    if (!leaving->stack) leaving->stack = stack, leaving->size = size;
#endif
}

void (*entry)();

void begin() {
    arrived(nullptr);
    entry();
    abort(); // the function of a fiber never returns
}

} // namespace

char *fiber_stacks;
const size_t fiber_stacks_size = max_fibers * (stack_size + page);

void fiber_restart(Fiber &fiber, void (*function)()) {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack, fiber.size); // frames that will never return
#endif
    entry = function;
    const size_t index = (size_t)((const char *)fiber.stack - fiber_stacks) / (stack_size + page);
    prepare(fiber, begin, index % n_colours * colour_step);
    fiber.fake_stack = nullptr;
}

Fiber *fiber_make(void (*function)()) {
    if (!fiber_stacks) reserve();
    if (n_fibers == max_fibers) {
        fprintf(stderr, "cusim: more than %zu fibers\n", max_fibers);
        exit(2);
    }
    char *stack = fiber_stacks + n_fibers * (stack_size + page) + page;
    if (mprotect(stack, stack_size, PROT_READ | PROT_WRITE) != 0) {
        perror("cusim: cannot make the stack of a fiber");
        exit(2);
    }
    Fiber &fiber = fibers[n_fibers++];
    fiber.stack = stack;
    fiber.size = stack_size;
    fiber_restart(fiber, function);
    return &fiber;
}

void fiber_switch(Fiber &from, Fiber &to) {
#ifdef __SANITIZE_ADDRESS__
    leaving = &from;
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.size);
#endif
    jump(from, to);
    arrived(from.fake_stack);
}

} // namespace cusim
