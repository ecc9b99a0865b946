/* defects.cu: a split-context decode kernel in small, and what can be wrong with one. Compiled once
 * for each DEFECT, as the kernel kvq_toy_DEFECT; 0 has none. The table of test_defects.cpp says
 * what each is and which checker must find it.
 */
#include "cuda/kernels/port.cuh"
#include "defects_args.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define KERNEL JOIN(kvq_toy_, DEFECT)
#define EXPORT(kernel) KVQ_EXPORT_KERNEL(kernel) // after KERNEL became a name

constexpr int d = KVQ_TOY_D, tile = KVQ_TOY_TILE, n_threads = 64;

#if DEFECT == 4
/* A call, so that no compiler sees which array it is. */
static __device__ __noinline__ void put(float *to, float x) { *to = x; }
#endif

/* A thread for each channel; a warp scores one token at a time. */
extern "C" __global__ void __launch_bounds__(n_threads) KERNEL(const kvq_toy_args a) {
    __shared__ float query[d];
    __shared__ float scores[tile];
    KVQ_SHARED_MEMORY(float, values); // [tile][d]
    const int t = (int)threadIdx.x, lane = t % 32, warp = t / 32;
    const int begin = (int)blockIdx.x * a.n_part, end = min(begin + a.n_part, a.n);

    query[t] = a.query[t];
#if DEFECT != 1
    __syncthreads();
#endif
    float sum = 0, most = -INFINITY, weight = 0;
    for (int first = begin; first < end; first += tile) {
        const int n = min(tile, end - first);
        for (int i = 4 * t; i < n * d; i += 4 * n_threads)
            kvq_cp_async16(values + i + (DEFECT == 3 && i + 4 == tile * d ? 4 : 0),
                           a.values + first * d + i);
        kvq_cp_commit();

        for (int k = warp; k < tile; k += 2) {
            float score = 0;
            if (k < n) {
                const float *key = a.keys + (first + k) * d;
                score = key[lane] * query[lane] + key[lane + 32] * query[lane + 32];
            }
#if DEFECT == 7
            if (lane < 24)
#endif
                for (int i = 16; i; i /= 2) score += __shfl_xor_sync(~0u, score, i);
#if DEFECT == 4
            if (lane == 0) put(scores + (k == tile - 1 ? tile : k), k < n ? score : -INFINITY);
#elif DEFECT == 6
            if (lane == 0 && k != 5) scores[k] = k < n ? score : -INFINITY;
#else
            if (lane == 0) scores[k] = k < n ? score : -INFINITY;
#endif
        }
#if DEFECT != 8
        kvq_cp_wait<0>();
#endif
#if DEFECT == 5
        if (first == begin || warp == 0)
#endif
            __syncthreads();

        float highest = most;
        for (int k = 0; k < tile; k++) highest = fmaxf(highest, scores[k]);
        const float fade = expf(most - highest);
        sum *= fade;
        weight *= fade;
        most = highest;
        for (int k = 0; k < n; k++) {
            const float e = expf(scores[k] - most);
#if DEFECT == 10
            /* Lanes walk down a column, each from a row of its own. */
            const int row = lane % n == k ? k : (k + lane) % n;
            sum += 0 * values[row * d + warp];
#endif
            sum += e * values[k * d + t];
            weight += e;
        }
#if DEFECT != 2
        __syncthreads();
#endif
    }
#if DEFECT == 9
    a.sums[blockIdx.x * d + t + 1] = sum;
#elif DEFECT == 11
    a.sums[t] = sum;
#else
    a.sums[blockIdx.x * d + t] = sum;
#endif
    if (t == 0) {
        a.most[blockIdx.x] = most;
        a.weight[blockIdx.x] = weight;
    }
}
EXPORT(KERNEL)
