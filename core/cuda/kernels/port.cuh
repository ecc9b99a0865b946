/* port.cuh: what a kernel needs that is not the same everywhere: dynamic shared memory,
 * asynchronous copies, tensor-core products. The only file with inline PTX, and the only one that
 * knows whether nvcc, NVRTC or the simulator of tests/cuda/sim (KVQ_SIM) compiles it.
 *
 * Every kernel file includes it first and ends each kernel with KVQ_EXPORT_KERNEL.
 */
#ifndef KVQ_CUDA_PORT_CUH
#define KVQ_CUDA_PORT_CUH

#ifndef __CUDACC_RTC__
#include <cuda_runtime.h>
#endif
#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>

#ifdef KVQ_SIM

/* Enters the kernel into the registry from which tests and the stand-in driver launch by name. */
#define KVQ_EXPORT_KERNEL(kernel)                                                                  \
    static const bool kvq_exported_##kernel = cusim::export_kernel(#kernel, kernel);

#define KVQ_SHARED_MEMORY(T, name) T *const name = static_cast<T *>(cusim::shared_memory())

#else

#define KVQ_EXPORT_KERNEL(kernel)

/* T *name = the block's dynamic shared memory, on a multiple of 16 bytes. */
#define KVQ_SHARED_MEMORY(T, name)                                                                 \
    extern __shared__ __align__(16) unsigned char kvq_shared_bytes[];                              \
    T *const name = reinterpret_cast<T *>(kvq_shared_bytes)

#endif

/* Four of the eight bytes of y:x: byte i by the i-th four bits of the selector, of which three are
 * the number. The highest one asks for the byte's sign instead: 0xff or 0. __byte_perm masks that
 * bit off. */
static __device__ __forceinline__ uint32_t kvq_permute(uint32_t x, uint32_t y, uint32_t selector) {
#if defined(KVQ_SIM)
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t s = selector >> 4 * i, byte = (s & 4 ? y : x) >> 8 * (s & 3) & 0xff;
        out |= (s & 8 ? (byte >> 7) * 0xff : byte) << 8 * i;
    }
    return out;
#else
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(y), "r"(selector));
    return out;
#endif
}

/* 2^x with an error of 2^-22 of it, and 0 where that is below 2^-126: exp2f without the scaling
 * that keeps denormal numbers. */
static __device__ __forceinline__ float kvq_exp2(float x) {
#if defined(KVQ_SIM)
    const float power = exp2f(x);
    return power < 0x1p-126f ? 0.0f : power;
#else
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
#endif
}

/* ---- asynchronous copies ------------------------------------------------------------------------
 *
 * 16 bytes from global to shared memory, both on multiples of 16. Copies since the last commit are
 * a group; kvq_cp_wait<N> returns when at most the N youngest groups of this thread are under way.
 * Other threads see the bytes after a barrier that follows the wait. sm_75 has no such copies and
 * makes them at once.
 */

static __device__ __forceinline__ void kvq_cp_async16(void *shared, const void *global) {
#if defined(KVQ_SIM)
    cusim::copy_async16(shared, global);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(__cvta_generic_to_global(global))
                 : "memory");
#else
    *static_cast<uint4 *>(shared) = *static_cast<const uint4 *>(global);
#endif
}

static __device__ __forceinline__ void kvq_cp_commit() {
#if defined(KVQ_SIM)
    cusim::copy_commit();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int N> static __device__ __forceinline__ void kvq_cp_wait() {
#if defined(KVQ_SIM)
    cusim::copy_wait(N);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

/* ---- products of matrices by a warp -------------------------------------------------------------
 *
 * d += A B, the fragments spread over the 32 lanes as PTX defines for mma.m16n8k16 (half) and
 * mma.m16n8k32 (bytes). With g = lane / 4 and t = lane % 4:
 *
 *     halves: a[i] holds A[g + 8 (i % 2)][2t + 8 (i / 2) + 0..1]     A is 16 x 16
 *             b[i] holds B[2t + 8 i + 0..1][g]                       B is 16 x 8
 *     bytes:  a[i] holds A[g + 8 (i % 2)][4t + 16 (i / 2) + 0..3]    A is 16 x 32
 *             b[i] holds B[4t + 16 i + 0..3][g]                      B is 32 x 8
 *     both:   d[i] is D[g + 8 (i / 2)][2t + i % 2]                   D is 16 x 8
 *
 * The lowest index lies in the lowest bits. All lanes of the warp must take part.
 */

static __device__ __forceinline__ void kvq_mma_f16(float d[4], const uint32_t a[4],
                                                   const uint32_t b[2]) {
#if defined(KVQ_SIM)
    cusim::mma_f16(d, a, b);
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else /* sm_75 has half the depth */
#pragma unroll
    for (int k = 0; k < 2; k++)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
#endif
}

/* kvq_mma_A_B: A of bytes of type A, B of type B. Sums wrap around; they do not saturate. sm_75 has
 * half the depth and half the rows. */
#if defined(KVQ_SIM)
#define KVQ_MMA_BYTES(A, B) cusim::mma_##A##_##B(d, a, b);
#elif __CUDA_ARCH__ >= 800
#define KVQ_MMA_BYTES(A, B)                                                                        \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." #A "." #B ".s32 "                        \
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                           \
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#define KVQ_MMA_BYTES(A, B)                                                                        \
    _Pragma("unroll") for (int i = 0; i < 4; i++) {                                                \
        const int half = i % 2; /* of the rows */                                                  \
        asm volatile("mma.sync.aligned.m8n8k16.row.col.s32." #A "." #B ".s32 "                     \
                     "{%0,%1}, {%2}, {%3}, {%0,%1};"                                               \
                     : "+r"(d[2 * half]), "+r"(d[2 * half + 1])                                    \
                     : "r"(a[i]), "r"(b[i / 2]));                                                  \
    }
#endif

static __device__ __forceinline__ void kvq_mma_s8_s8(int32_t d[4], const uint32_t a[4],
                                                     const uint32_t b[2]) {
    KVQ_MMA_BYTES(s8, s8)
}

static __device__ __forceinline__ void kvq_mma_s8_u8(int32_t d[4], const uint32_t a[4],
                                                     const uint32_t b[2]) {
    KVQ_MMA_BYTES(s8, u8)
}

static __device__ __forceinline__ void kvq_mma_u8_s8(int32_t d[4], const uint32_t a[4],
                                                     const uint32_t b[2]) {
    KVQ_MMA_BYTES(u8, s8)
}

#undef KVQ_MMA_BYTES

#endif
