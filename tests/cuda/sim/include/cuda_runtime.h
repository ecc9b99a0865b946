/* cuda_runtime.h (of the simulator): the CUDA language for a C++17 compiler: keywords, vector
 * types, built-in variables, barriers, warp collectives, atomics, integer and floating-point
 * intrinsics.
 *
 * What is not here does not compile, on purpose: cooperative groups, __activemask (its answer is
 * never what a kernel wants), what sm_75 lacks.
 */
#ifndef CUSIM_CUDA_RUNTIME_H
#define CUSIM_CUDA_RUNTIME_H

#include "cusim.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// ---- keywords -----------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ __attribute__((unused))
#define __forceinline__ inline __attribute__((always_inline))
#undef __noinline__
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

/* It stands between the type of a kernel, which is void, and its name. So it can end a declaration
 * of nothing, announce the bound to the KVQ_EXPORT_KERNEL that follows, and begin anew. */
#define CUSIM_JOIN_(a, b) a##b
#define CUSIM_JOIN(a, b) CUSIM_JOIN_(a, b)
#define __launch_bounds__(...)                                                                     \
    cusim_nothing();                                                                               \
    static const bool CUSIM_JOIN(cusim_bound_, __COUNTER__) = cusim::announce_bound(__VA_ARGS__);  \
    extern "C" void

/* The scheduler fills this section before each block. GCC ignores the section within templates
 * (without a word), so there it does not compile: what a template shares, its kernel declares. */
#define __shared__                                                                                 \
    static_assert(!cusim::is_template(__PRETTY_FUNCTION__),                                        \
                  "__shared__ in a template would be global memory on the simulator");             \
    static __attribute__((section("cusim_shared")))

namespace cusim {

/* By the name that GCC gives an instance of a template: "int f(int) [with int n = 3]". */
constexpr bool is_template(const char *function) {
    constexpr char mark[] = "[with ";
    for (; *function; function++) {
        int n = 0;
        while (mark[n] && function[n] == mark[n]) n++;
        if (!mark[n]) return true;
    }
    return false;
}

} // namespace cusim

#define threadIdx (cusim::current->index)
#define blockIdx (cusim::active.block_index)
#define blockDim (cusim::active.block_size)
#define gridDim (cusim::active.grid_size)
constexpr int warpSize = 32;

// ---- vector types -------------------------------------------------------------------------------

#define CUSIM_VECTORS(T, name)                                                                     \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                             \
    struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };                                       \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                     \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUSIM_VECTORS(signed char, char)
CUSIM_VECTORS(unsigned char, uchar)
CUSIM_VECTORS(short, short)
CUSIM_VECTORS(unsigned short, ushort)
CUSIM_VECTORS(int, int)
CUSIM_VECTORS(unsigned, uint)
CUSIM_VECTORS(float, float)
#undef CUSIM_VECTORS

// ---- barriers -----------------------------------------------------------------------------------

inline void __syncthreads(cusim::Place at = cusim::here()) {
    cusim::barrier("__syncthreads", at, false);
}
inline int __syncthreads_count(int predicate, cusim::Place at = cusim::here()) {
    return (int)cusim::barrier("__syncthreads_count", at, predicate != 0);
}
inline int __syncthreads_or(int predicate, cusim::Place at = cusim::here()) {
    return cusim::barrier("__syncthreads_or", at, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, cusim::Place at = cusim::here()) {
    return cusim::barrier("__syncthreads_and", at, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, cusim::Place at = cusim::here()) {
    cusim::sync_warp(mask, at);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- warp collectives ---------------------------------------------------------------------------

namespace cusim {

template <class T> struct Shuffle {
    T value;
    unsigned source; // lane
    T result;
};

/* A lane that takes from one that does not take part gets 0xff bytes. */
template <class T> void combine_shuffle(Slots slots, unsigned lanes) {
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        auto &mine = *static_cast<Shuffle<T> *>(slots[__builtin_ctz(rest)]);
        if (lanes >> mine.source & 1)
            mine.result = static_cast<Shuffle<T> *>(slots[mine.source])->value;
        else
            memset(&mine.result, 0xff, sizeof(T));
    }
}

template <class T> T shuffle(const char *name, unsigned mask, T value, unsigned source, Place at) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2, "CUDA shuffles these sizes");
    Shuffle<T> mine = {value, source, value};
    meet(name, mask, at, combine_shuffle<T>, &mine);
    return mine.result;
}

/* `lane` if it lies in this lane's segment of `width` lanes, else this lane. */
inline unsigned in_segment(int lane, int width) {
    const int mine = (int)current->lane, first = mine & -width;
    return (unsigned)(lane >= first && lane < first + width ? lane : mine);
}

struct Vote {
    bool predicate;
    unsigned result;
};

inline void combine_vote(Slots slots, unsigned lanes) {
    unsigned votes = 0;
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        const unsigned lane = (unsigned)__builtin_ctz(rest);
        if (static_cast<Vote *>(slots[lane])->predicate) votes |= 1u << lane;
    }
    for (unsigned rest = lanes; rest; rest &= rest - 1)
        static_cast<Vote *>(slots[__builtin_ctz(rest)])->result = votes;
}

inline unsigned vote(const char *name, unsigned mask, bool predicate, Place at) {
    Vote mine = {predicate, 0};
    meet(name, mask, at, combine_vote, &mine);
    return mine.result;
}

} // namespace cusim

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, cusim::Place at = cusim::here()) {
    const int first = (int)cusim::current->lane & -width;
    return cusim::shuffle("__shfl_sync", mask, value, (unsigned)(first + (source & (width - 1))),
                          at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  cusim::Place at = cusim::here()) {
    /* Reaches into earlier segments, but not into later ones. */
    const int lane = (int)cusim::current->lane, source = lane ^ bits;
    const bool later = source >= (lane & -width) + width;
    return cusim::shuffle("__shfl_xor_sync", mask, value, (unsigned)(later ? lane : source), at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cusim::Place at = cusim::here()) {
    const int source = (int)(cusim::current->lane + delta);
    return cusim::shuffle("__shfl_down_sync", mask, value, cusim::in_segment(source, width), at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cusim::Place at = cusim::here()) {
    const int source = (int)(cusim::current->lane - delta);
    return cusim::shuffle("__shfl_up_sync", mask, value, cusim::in_segment(source, width), at);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, cusim::Place at = cusim::here()) {
    return cusim::vote("__ballot_sync", mask, predicate != 0, at);
}
inline int __any_sync(unsigned mask, int predicate, cusim::Place at = cusim::here()) {
    return cusim::vote("__any_sync", mask, predicate != 0, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cusim::Place at = cusim::here()) {
    return cusim::vote("__all_sync", mask, predicate == 0, at) == 0;
}

// ---- atomics ------------------------------------------------------------------------------------

namespace cusim {

/* Threads take turns, so a plain update is atomic; it only must not look like a race. */
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T atomic_update(T *p, Place at, F change) {
    atomic_access(p, sizeof(T), at);
    const T old = *p;
    *p = change(old);
    return old;
}

} // namespace cusim

#define CUSIM_ATOMIC(name, T, expression)                                                          \
    inline T name(T *p, T value, cusim::Place at = cusim::here()) {                                \
        return cusim::atomic_update(p, at,                                                         \
                                    [=]([[maybe_unused]] T old) -> T { return expression; });      \
    }
#define CUSIM_ATOMICS(T)                                                                           \
    CUSIM_ATOMIC(atomicAdd, T, old + value)                                                        \
    CUSIM_ATOMIC(atomicMax, T, old > value ? old : value)                                          \
    CUSIM_ATOMIC(atomicMin, T, old < value ? old : value)                                          \
    CUSIM_ATOMIC(atomicOr, T, old | value)                                                         \
    CUSIM_ATOMIC(atomicExch, T, value)
CUSIM_ATOMICS(int)
CUSIM_ATOMICS(unsigned)
CUSIM_ATOMIC(atomicAdd, float, old + value)
CUSIM_ATOMIC(atomicExch, float, value)
#undef CUSIM_ATOMICS
#undef CUSIM_ATOMIC

template <class T> T atomicCAS(T *p, T expected, T value, cusim::Place at = cusim::here()) {
    static_assert(sizeof(T) == 4, "CUDA compares words");
    return cusim::atomic_update(p, at, [=](T old) { return old == expected ? value : old; });
}

// ---- integers -----------------------------------------------------------------------------------

template <class T> T __ldg(const T *p) { return *p; }

inline int __dp4a(int a, int b, int c) {
    unsigned sum = (unsigned)c; // wraps around
    for (int i = 0; i < 4; i++) sum += (unsigned)((int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i));
    return (int)sum;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    return c;
}

/* Byte i of the result is byte s_i % 8 of y:x; bit 3 of s_i counts for nothing, as nvcc has it. */
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = (uint64_t)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned s = selector >> 4 * i & 7;
        result |= ((unsigned)(bytes >> 8 * s) & 255) << 8 * i;
    }
    return result;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((uint64_t)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}

template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a > b ? a : b; }

// ---- floating point -----------------------------------------------------------------------------

#define CUSIM_BITS(name, From, To)                                                                 \
    inline To name(From x) {                                                                       \
        To bits;                                                                                   \
        memcpy(&bits, &x, sizeof bits);                                                            \
        return bits;                                                                               \
    }
CUSIM_BITS(__float_as_int, float, int)
CUSIM_BITS(__float_as_uint, float, unsigned)
CUSIM_BITS(__int_as_float, int, float)
CUSIM_BITS(__uint_as_float, unsigned, float)
#undef CUSIM_BITS

/* The fast ones are as accurate here as the others: compare with a tolerance. */
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

/* Rounded as named, and never contracted to a fused multiply-add. */
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

/* NaN becomes 0, what does not fit the nearest that does. */
inline int __float2int_rn(float x) {
    if (!(x == x)) return 0;
    return x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : (int)nearbyintf(x);
}
inline int __float2int_rz(float x) {
    if (!(x == x)) return 0;
    return x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : (int)x;
}
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }

#endif
