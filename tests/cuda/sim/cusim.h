/* cusim.h: runs CUDA kernels on the CPU, a fiber for each CUDA thread.
 *
 * A .cu file compiled as C++17 with -DKVQ_SIM finds the CUDA language in include/cuda_runtime.h,
 * which is written in terms of the second half of this header. A test launches its kernels, by
 * address or by name, in several orders of threads and reads the errors. Blocks run one after
 * another, threads of a block take turns at barriers and collectives; one launch at a time.
 *
 * What it reports: barriers that threads reach at different places or not at all, collectives whose
 * masks name lanes that do not come, copies that nobody waits for, launches that no GPU takes.
 * Shared memory begins each block as 0xff bytes (NaN, -1), so that what was not written shows.
 */
#ifndef CUSIM_H
#define CUSIM_H

#include <stddef.h>
#include <stdint.h>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned nx = 1, unsigned ny = 1, unsigned nz = 1) : x(nx), y(ny), z(nz) {}
};

namespace cusim {

// ---- for tests ----------------------------------------------------------------------------------

/* Which of the threads that can go on does: the one that waited longest, beginning with thread 0;
 * the one that was released last, beginning with the last thread, so that it runs ahead of the
 * others as far as it can; any. Blocks follow the same order. */
enum class Order { forward, reverse, random };

/* How mma_f16 computes: exactly, rounding the sum once; as a tensor core adds, cutting off bits
 * that are far below the largest number in a sum (tensor_core.cpp); exactly, but with 0 for
 * subnormal operands, as tensor cores are not known to do. */
enum class Mma { exact, truncating, flushing };

struct Options {
    Order order = Order::forward;
    uint64_t seed = 1; // of Order::random
    Mma mma = Mma::exact;
    bool echo = true; // print errors to stderr, too
};

/* Read at each launch. The environment variable CUSIM_ORDER sets the first order of a program:
 * forward, reverse, random, or random:SEED; and CUSIM_MMA its first mma. */
extern Options options;

/* The errors since the last call, each a sentence; empties the list. */
std::vector<std::string> take_errors();

struct Statistics {
    uint64_t blocks, threads, switches, barriers, collectives;
};
extern Statistics statistics; // since the program began

struct Kernel {
    std::string name;
    const void *address;
    std::vector<size_t> parameter_sizes;
    unsigned most_threads;             // of a block: __launch_bounds__, or what every GPU takes
    std::function<void(void **)> call; // one thread; pointers to the parameters
};

/* NULL if no kernel of this name was exported (KVQ_EXPORT_KERNEL). */
const Kernel *find_kernel(const std::string &name);

/* Runs all blocks. `shared` is the number of bytes of dynamic shared memory. False if this launch
 * found an error; a kernel that got stuck was left where it stood. */
bool launch(const Kernel &kernel, dim3 grid, dim3 block, size_t shared, void **parameters);

/* The same by address; the arguments convert to the kernel's parameters. */
template <class... P, class... A>
bool launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A &&...arguments);

/* Dynamic shared memory that a block may have without asking for more, on every GPU. */
constexpr size_t default_shared_limit = 48 << 10;

// ---- for the CUDA language in include/ ----------------------------------------------------------

/* Where in the sources; used as a default argument it is the place of the call. */
struct Place {
    const char *file;
    int line;
};
constexpr Place here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
}

struct Thread {
    uint3 index;         // threadIdx
    unsigned rank;       // of the thread in its block
    unsigned lane, warp; // of 32
};

struct Launch {
    uint3 block_index;
    dim3 block_size, grid_size;
    unsigned n_threads; // of a block
    unsigned char *shared;
    size_t shared_bytes;
};

extern const Thread *current; // NULL outside of kernels
extern Launch active;         // the launch under way

void report(const char *format, ...) __attribute__((format(printf, 1, 2)));

inline void *shared_memory() { return active.shared; }

/* Returns when all threads of the block came: how many of them brought `predicate`. */
unsigned barrier(const char *name, Place at, bool predicate);

/* What the lanes of a warp brought to a collective: pointers to a struct on each one's stack. */
using Slots = void *const *;
/* Reads and writes the slots of `lanes`, once all of them have come. */
using Combine = void (*)(Slots slots, unsigned lanes);

/* Returns when all lanes of `mask` brought the same `combine`, and it was called. Lanes that come
 * from different places are reported, though some GPUs would let them meet. */
void meet(const char *name, unsigned mask, Place at, Combine combine, void *slot);

void sync_warp(unsigned mask, Place at);

/* To be called before *p changes: the race detector must know that it is atomic. */
void atomic_access(const void *p, size_t n, Place at);

/* cp.async of the current thread: bytes land when waited for, and not earlier. */
void copy_async16(void *shared, const void *global, Place at = here());
void copy_commit();
void copy_wait(int n_pending);

void mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2], Place at = here());
void mma_s8_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2], Place at = here());
void mma_s8_u8(int32_t d[4], const uint32_t a[4], const uint32_t b[2], Place at = here());
void mma_u8_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2], Place at = here());

bool export_kernel(Kernel kernel);

constexpr unsigned max_threads = 1024; // of a block

/* What __launch_bounds__ of the next kernel says; describing that kernel uses it up. */
bool announce_bound(unsigned most_threads, unsigned least_blocks = 0);
unsigned take_bound();

template <class... P, size_t... I>
void call_with(void (*kernel)(P...), void **parameters, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<P> *>(parameters[I])...);
}

template <class... P> Kernel describe(const char *name, void (*kernel)(P...)) {
    return {name,
            reinterpret_cast<const void *>(kernel),
            {sizeof(P)...},
            take_bound(),
            [kernel](void **p) { call_with(kernel, p, std::index_sequence_for<P...>{}); }};
}

template <class... P> bool export_kernel(const char *name, void (*kernel)(P...)) {
    return export_kernel(describe(name, kernel));
}

const Kernel *kernel_at(const void *address);

template <class... P, class... A>
bool launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A &&...arguments) {
    static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
    std::tuple<std::remove_const_t<P>...> values(std::forward<A>(arguments)...);
    const auto run = [&](auto &...value) {
        void *parameters[] = {&value..., nullptr};
        const Kernel *known = kernel_at(reinterpret_cast<const void *>(kernel));
        return launch(known ? *known : describe("kernel", kernel), grid, block, shared, parameters);
    };
    return std::apply(run, values);
}

} // namespace cusim

#endif
