/* cusim.cpp: the scheduler: which thread of a block runs, what it waits for, and what went wrong.
 *
 * A fiber takes a thread, runs the kernel to its end and takes the next one. Only a thread that has
 * to wait in the middle keeps its fiber; the next thread then gets another. So a kernel without
 * barriers runs as a plain loop on one stack.
 */
#include "cusim.h"
#include "fiber.h"
#include "observer.h"

#include <algorithm>
#include <map>
#include <memory>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" unsigned char __start_cusim_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_cusim_shared[] __attribute__((weak, visibility("hidden")));

namespace cusim {

const Thread *current;
Launch active;
Statistics statistics;
Observer *observer;

namespace {

enum class State : uint8_t { ready, at_barrier, at_meeting, exited };

struct Copy {
    void *to;
    const void *from;
    Place at;
};

struct Task : Thread {
    State state;
    Fiber *fiber; // NULL before it began
    // What it waits for.
    const char *name;
    Place at;
    bool predicate;
    unsigned mask;
    Combine combine;
    void *slot;
    // Copies under way; groups[i] is the end of the i-th committed group.
    std::vector<Copy> copies;
    std::vector<size_t> groups;
};

struct Warp {
    unsigned meeting; // lanes that wait in a collective
    unsigned exited;  // or never were
};

constexpr unsigned warp_size = 32;
constexpr size_t max_reports = 8; // of one launch

Task tasks[max_threads];
Warp warps[max_threads / warp_size];
unsigned n_exited, n_at_barrier, barrier_count;

/* Threads that can go on; a ring, each of them at most once in it. */
unsigned ready[max_threads];
unsigned ready_head, n_ready;

Fiber program; // whoever called launch
std::vector<Fiber *> idle;

const Kernel *kernel;
void **parameters;
bool stuck;
uint64_t random_state;

std::vector<std::string> errors;
size_t n_reported; // by the launch under way

Task &self() { return *static_cast<Task *>(const_cast<Thread *>(current)); }

uint64_t next_random() { // xorshift64
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

Mma first_mma() {
    const char *text = getenv("CUSIM_MMA");
    if (!text || !strcmp(text, "exact")) return Mma::exact;
    if (!strcmp(text, "truncating")) return Mma::truncating;
    if (!strcmp(text, "flushing")) return Mma::flushing;
    fprintf(stderr, "cusim: CUSIM_MMA is '%s', not exact, truncating or flushing\n", text);
    exit(2);
}

Options first_options() {
    Options first;
    first.mma = first_mma();
    const char *text = getenv("CUSIM_ORDER");
    if (!text || !strcmp(text, "forward")) return first;
    if (!strcmp(text, "reverse")) {
        first.order = Order::reverse;
    } else if (!strncmp(text, "random", 6) && (!text[6] || text[6] == ':')) {
        first.order = Order::random;
        if (text[6]) first.seed = strtoull(text + 7, nullptr, 10);
    } else {
        fprintf(stderr, "cusim: CUSIM_ORDER is '%s', not forward, reverse, random or random:SEED\n",
                text);
        exit(2);
    }
    return first;
}

// ---- which thread runs --------------------------------------------------------------------------

void make_ready(Task &task) {
    task.state = State::ready;
    ready[(ready_head + n_ready++) % max_threads] = task.rank;
}

Task *take_ready() {
    if (n_ready == 0) return nullptr;
    const unsigned first = ready_head, last = (ready_head + --n_ready) % max_threads;
    if (options.order == Order::forward) {
        ready_head = (ready_head + 1) % max_threads;
        return &tasks[ready[first]];
    }
    if (options.order == Order::random)
        std::swap(ready[(first + next_random() % (n_ready + 1)) % max_threads], ready[last]);
    return &tasks[ready[last]];
}

void run_threads();

Fiber *take_idle() {
    if (idle.empty()) return fiber_make(run_threads);
    Fiber *fiber = idle.back();
    idle.pop_back();
    return fiber;
}

/* From the fiber `from`, which waits or has nothing to do, to the next thread; back to the program
 * if no thread can go on. */
void go_on(Fiber &from) {
    Task *next = take_ready();
    current = next;
    Fiber *to = &program;
    if (next) {
        if (!next->fiber) next->fiber = take_idle();
        to = next->fiber;
    }
    if (to == &from) return;
    statistics.switches++;
    fiber_switch(from, *to);
}

void leave_block(Task &task);

/* What every fiber does. */
void run_threads() {
    for (;;) {
        kernel->call(parameters);
        Task &done = self();
        leave_block(done);
        idle.push_back(done.fiber); // the next thread to begin may well take this one
        go_on(*done.fiber);
    }
}

// ---- barriers and collectives -------------------------------------------------------------------

bool same(Place a, Place b) {
    return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file));
}

void pass_barrier() {
    const Task *first = nullptr;
    unsigned count = 0;
    for (unsigned i = 0; i < active.n_threads; i++) {
        const Task &task = tasks[i];
        if (task.state != State::at_barrier) continue;
        count += task.predicate;
        if (!first) {
            first = &task;
        } else if (!same(task.at, first->at)) {
            report("divergent %s: thread %u is at %s:%d, thread %u at %s:%d", task.name,
                   first->rank, first->at.file, first->at.line, task.rank, task.at.file,
                   task.at.line);
            break;
        }
    }
    if (n_exited)
        report("divergent %s: %u threads are at %s:%d, %u have exited", first->name, n_at_barrier,
               first->at.file, first->at.line, n_exited);
    barrier_count = count;
    n_at_barrier = 0;
    statistics.barriers++;
    if (observer) observer->barrier_passed();
    for (unsigned i = 0; i < active.n_threads; i++)
        if (tasks[i].state == State::at_barrier) make_ready(tasks[i]);
}

/* If all lanes that `task` waits for have come to its collective, it happens. */
void try_meeting(const Task &task) {
    Warp &warp = warps[task.warp];
    const unsigned lanes = task.mask & ~warp.exited;
    if ((warp.meeting & lanes) != lanes) return;
    Task *const first = &tasks[task.warp * warp_size];
    const Task *elsewhere = nullptr;
    void *slots[warp_size] = {};
    for (unsigned i = 0; i < warp_size; i++) {
        if (!(lanes >> i & 1)) continue;
        if (first[i].combine != task.combine || first[i].mask != task.mask) return;
        if (!same(first[i].at, task.at)) elsewhere = &first[i];
        slots[i] = first[i].slot;
    }
    if (elsewhere)
        report("divergent %s: lane %u of warp %u is at %s:%d, lane %u at %s:%d", task.name,
               task.lane, task.warp, task.at.file, task.at.line, elsewhere->lane,
               elsewhere->at.file, elsewhere->at.line);
    if (task.mask & warp.exited)
        report("%s at %s:%d: mask %08x names lanes %08x of warp %u, which have exited", task.name,
               task.at.file, task.at.line, task.mask, task.mask & warp.exited, task.warp);
    statistics.collectives++;
    task.combine(slots, lanes);
    warp.meeting &= ~lanes;
    for (unsigned i = 0; i < warp_size; i++)
        if (lanes >> i & 1) make_ready(first[i]);
}

void report_lost_copies(Task &task) {
    if (task.copies.empty()) return;
    const Copy &copy = task.copies.front();
    report("thread %u exited with %zu asynchronous copies that it did not wait for, the first "
           "begun at %s:%d",
           task.rank, task.copies.size(), copy.at.file, copy.at.line);
    task.copies.clear();
}

void leave_block(Task &task) {
    report_lost_copies(task);
    task.groups.clear();
    task.state = State::exited;
    n_exited++;
    Warp &warp = warps[task.warp];
    warp.exited |= 1u << task.lane;
    if (n_at_barrier && n_at_barrier + n_exited == active.n_threads) pass_barrier();
    for (unsigned i = 0; i < warp_size; i++) {
        const Task &other = tasks[task.warp * warp_size + i];
        if ((warp.meeting >> i & 1) && (other.mask >> task.lane & 1)) try_meeting(other);
    }
}

/* Threads that wait for the same, in one sentence: "threads 0-15 wait in ... at FILE:LINE". */
void report_deadlock() {
    std::string text;
    for (unsigned i = 0, end; i < active.n_threads; i = end) {
        const Task &task = tasks[i];
        for (end = i + 1; end < active.n_threads; end++) {
            const Task &other = tasks[end];
            if (other.state != task.state) break;
            if (task.state != State::exited && !same(other.at, task.at)) break;
            if (task.state == State::at_meeting && other.mask != task.mask) break;
        }
        char buffer[512];
        snprintf(buffer, sizeof buffer, "%sthreads %u-%u ", i ? "; " : "", i, end - 1);
        text += buffer;
        if (task.state == State::exited) {
            text += "have exited";
            continue;
        }
        snprintf(buffer, sizeof buffer, "wait in %s at %s:%d", task.name, task.at.file,
                 task.at.line);
        text += buffer;
        snprintf(buffer, sizeof buffer, " for mask %08x", task.mask);
        if (task.state == State::at_meeting) text += buffer;
    }
    report("deadlock: %s", text.c_str());
}

// ---- blocks -------------------------------------------------------------------------------------

/* Not memset, which ASan would stop at the red zones between the arrays; volatile, so that the
 * compiler does not make it one. */
__attribute__((no_sanitize("address"))) void fill_static_shared() {
    const uintptr_t end = (uintptr_t)__stop_cusim_shared;
    uintptr_t p = (uintptr_t)__start_cusim_shared;
    for (; p % 8 && p < end; p++) *(volatile uint8_t *)p = 0xff;
    for (; p + 8 <= end; p += 8) *(volatile uint64_t *)p = ~(uint64_t)0;
    for (; p < end; p++) *(volatile uint8_t *)p = 0xff;
}

/* What is left of a block that cannot go on. */
void abandon_block() {
    for (unsigned i = 0; i < active.n_threads; i++) {
        Task &task = tasks[i];
        task.copies.clear();
        task.groups.clear();
        if (task.state == State::exited) continue;
        fiber_restart(*task.fiber, run_threads);
        idle.push_back(task.fiber);
    }
}

void run_block() {
    fill_static_shared();
    const dim3 size = active.block_size;
    n_ready = ready_head = n_exited = n_at_barrier = 0;
    for (unsigned i = 0; i < (active.n_threads + warp_size - 1) / warp_size; i++) warps[i] = {};
    if (active.n_threads % warp_size)
        warps[active.n_threads / warp_size].exited = ~0u << active.n_threads % warp_size;
    for (unsigned i = 0; i < active.n_threads; i++) {
        Task &task = tasks[i];
        task.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        task.rank = i;
        task.lane = i % warp_size;
        task.warp = i / warp_size;
        task.fiber = nullptr;
        make_ready(task);
    }
    if (observer) observer->block_begins();
    statistics.blocks++;
    statistics.threads += active.n_threads;
    go_on(program);
    if (n_exited == active.n_threads) return;
    report_deadlock();
    abandon_block();
    stuck = true;
}

std::vector<uint64_t> order_of_blocks(uint64_t n_blocks) {
    std::vector<uint64_t> order(n_blocks);
    for (uint64_t i = 0; i < n_blocks; i++) order[i] = i;
    if (options.order == Order::reverse) std::reverse(order.begin(), order.end());
    if (options.order == Order::random)
        for (uint64_t i = n_blocks; i > 1; i--) std::swap(order[i - 1], order[next_random() % i]);
    return order;
}

bool check_shape(const Kernel &to_run, dim3 size, dim3 block, size_t shared) {
    const uint64_t n_threads = (uint64_t)block.x * block.y * block.z;
    if (n_threads == 0 || n_threads > max_threads || block.z > 64)
        report("a block of %u x %u x %u threads; 1 to 1024 are possible, 64 in z", block.x, block.y,
               block.z);
    else if (n_threads > to_run.most_threads)
        report("a block of %u x %u x %u threads; its __launch_bounds__ allow %u", block.x, block.y,
               block.z, to_run.most_threads);
    else if (!size.x || !size.y || !size.z || size.x > 0x7fffffffu || size.y > 65535 ||
             size.z > 65535)
        report("a grid of %u x %u x %u blocks; 1 to 2147483647 x 65535 x 65535 are possible",
               size.x, size.y, size.z);
    else if (shared > 227 << 10)
        report("%zu bytes of dynamic shared memory; no GPU gives a block more than 232448", shared);
    else
        return true;
    return false;
}

} // namespace

Options options = first_options();

// ---- what cusim.h declares ----------------------------------------------------------------------

void report(const char *format, ...) {
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (n_reported++ >= max_reports) return;
    char where[256];
    snprintf(where, sizeof where,
             "%s, block (%u, %u, %u): ", kernel ? kernel->name.c_str() : "no kernel",
             active.block_index.x, active.block_index.y, active.block_index.z);
    errors.push_back(std::string(where) + text);
    if (options.echo) fprintf(stderr, "cusim: %s\n", errors.back().c_str());
}

std::vector<std::string> take_errors() { return std::exchange(errors, {}); }

/* A function, because kernels register before main, in any order. */
static std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

bool is_built_in(const void *p) {
    const auto within = [p](const void *object, size_t n) {
        return (uintptr_t)p - (uintptr_t)object < n;
    };
    return within(tasks, sizeof tasks) || within(&current, sizeof current) ||
           within(&active, sizeof active);
}

bool export_kernel(Kernel exported) {
    std::string name = exported.name;
    return kernels().emplace(std::move(name), std::move(exported)).second;
}

static unsigned announced = max_threads;

bool announce_bound(unsigned most_threads, unsigned) {
    announced = most_threads;
    return true;
}

unsigned take_bound() { return std::exchange(announced, max_threads); }

const Kernel *find_kernel(const std::string &name) {
    const auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

const Kernel *kernel_at(const void *address) {
    for (const auto &[name, known] : kernels())
        if (known.address == address) return &known;
    return nullptr;
}

bool launch(const Kernel &to_run, dim3 size, dim3 block, size_t shared, void **arguments) {
    kernel = &to_run;
    parameters = arguments;
    n_reported = 0;
    active = {};
    if (!check_shape(to_run, size, block, shared)) {
        kernel = nullptr;
        return false;
    }
    active.block_size = block;
    active.grid_size = size;
    active.n_threads = block.x * block.y * block.z;
    random_state = (options.seed + 1) * 0x9e3779b97f4a7c15u | 1;
    stuck = false;
    if (observer) observer->launch_begins();
    for (const uint64_t b : order_of_blocks((uint64_t)size.x * size.y * size.z)) {
        active.block_index = {(unsigned)(b % size.x), (unsigned)(b / size.x % size.y),
                              (unsigned)(b / size.x / size.y)};
        /* Exactly as large as asked for, so that ASan guards its end. */
        std::unique_ptr<unsigned char, decltype(&free)> memory(
            shared ? (unsigned char *)malloc(shared) : nullptr, &free);
        if (shared) memset(memory.get(), 0xff, shared);
        active.shared = memory.get();
        active.shared_bytes = shared;
        run_block();
        if (stuck) break;
    }
    current = nullptr;
    if (observer) observer->launch_ends(to_run.name);
    if (n_reported > max_reports && options.echo)
        fprintf(stderr, "cusim: %s: %zu more errors\n", to_run.name.c_str(),
                n_reported - max_reports);
    kernel = nullptr;
    active = {};
    return n_reported == 0;
}

unsigned barrier(const char *name, Place at, bool predicate) {
    Task &task = self();
    task.name = name;
    task.at = at;
    task.predicate = predicate;
    task.state = State::at_barrier;
    n_at_barrier++;
    if (n_at_barrier + n_exited == active.n_threads) pass_barrier();
    go_on(*task.fiber);
    return barrier_count;
}

void meet(const char *name, unsigned mask, Place at, Combine combine, void *slot) {
    Task &task = self();
    if (!(mask >> task.lane & 1)) {
        report("%s at %s:%d: lane %u is not in its own mask %08x", name, at.file, at.line,
               task.lane, mask);
        mask |= 1u << task.lane;
    }
    task.name = name;
    task.at = at;
    task.mask = mask;
    task.combine = combine;
    task.slot = slot;
    task.state = State::at_meeting;
    warps[task.warp].meeting |= 1u << task.lane;
    try_meeting(task);
    go_on(*task.fiber);
}

void sync_warp(unsigned mask, Place at) {
    struct Slot {
        unsigned warp;
    } slot = {self().warp};
    const auto tell = [](Slots slots, unsigned lanes) {
        if (!observer) return;
        const unsigned warp = static_cast<Slot *>(slots[__builtin_ctz(lanes)])->warp;
        observer->warp_synchronised(warp, lanes);
    };
    meet("__syncwarp", mask, at, tell, &slot);
}

void atomic_access(const void *p, size_t n, Place at) {
    if (observer) observer->atomic_access(p, n, at);
}

void copy_async16(void *shared, const void *global, Place at) {
    if (((uintptr_t)shared | (uintptr_t)global) % 16) {
        report("cp.async at %s:%d: %p or %p is not a multiple of 16", at.file, at.line, shared,
               global);
        return;
    }
    self().copies.push_back({shared, global, at});
    if (observer) observer->copy_begins(shared, global, 16, at);
}

void copy_commit() {
    Task &task = self();
    task.groups.push_back(task.copies.size());
}

void copy_wait(int n_pending) {
    Task &task = self();
    if (task.groups.size() <= (size_t)n_pending) return;
    const size_t n_groups = task.groups.size() - (size_t)n_pending;
    const size_t n_copies = task.groups[n_groups - 1];
    for (size_t i = 0; i < n_copies; i++) {
        memcpy(task.copies[i].to, task.copies[i].from, 16);
        if (observer) observer->copy_lands(task.copies[i].to, 16);
    }
    task.copies.erase(task.copies.begin(), task.copies.begin() + (ptrdiff_t)n_copies);
    task.groups.erase(task.groups.begin(), task.groups.begin() + (ptrdiff_t)n_groups);
    for (size_t &end : task.groups) end -= n_copies;
}

} // namespace cusim
