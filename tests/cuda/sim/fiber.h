/* fiber.h: stacks that a program switches between. Knows nothing of CUDA.
 *
 * A fiber runs the function it was made for, which never returns. The program's own stack is a
 * fiber, too: Fiber{} before its first switch.
 */
#ifndef CUSIM_FIBER_H
#define CUSIM_FIBER_H

#include <stddef.h>
#include <stdint.h>

namespace cusim {

struct Fiber {
    void *context = nullptr;     // saved stack pointer, or ucontext_t
    const void *stack = nullptr; // lowest address
    size_t size = 0;
    void *fake_stack = nullptr; // ASan's, while the fiber is away
};

/* A new fiber on a stack of its own, below which lies a page that traps. Fibers are never freed. */
Fiber *fiber_make(void (*function)());

/* Begins again from the start, whatever the fiber was in the middle of. */
void fiber_restart(Fiber &fiber, void (*function)());

/* Leaves `from`, the fiber that runs, and goes on in `to`; returns when something switches back. */
void fiber_switch(Fiber &from, Fiber &to);

/* All stacks lie in [fiber_stacks, fiber_stacks + fiber_stacks_size). */
extern char *fiber_stacks;
extern const size_t fiber_stacks_size;

inline bool fiber_owns(const void *address) {
    return (uintptr_t)address - (uintptr_t)fiber_stacks < fiber_stacks_size;
}

} // namespace cusim

#endif
