/* merge.cu: puts the partial results of attention's splits together. */
#include "cuda/kernels/port.cuh"

#include "cuda/kernels/attend_args.h"
#include "cuda/kernels/basis.cuh"

/* out = what the heads of one row of queries see, divided by the sum of weights, out of the basis
 * of the values. Grid: rows of queries (n * group), KV heads. */
extern "C" __global__ void __launch_bounds__(KVQ_CUDA_MERGE_THREADS, 1)
    kvq_cuda_merge(const kvq_cuda_merge_args a) {
    enum { THREADS = KVQ_CUDA_MERGE_THREADS, WARPS = THREADS / 32 };
    __shared__ float factor[KVQ_CUDA_MOST_SPLITS]; /* of each split, first its largest score */
    __shared__ float largest_of[WARPS], sum_of[WARPS];
    __shared__ __align__(16) float sums[KVQ_CUDA_D_MAX], spare[KVQ_CUDA_D_MAX];
    const kvq_cuda_cache &cache = a.cache;
    const int d = cache.d, row = blockIdx.x, head = blockIdx.y, n_rows = gridDim.x;
    const int thread = threadIdx.x, warp = thread / 32;
    const size_t stride = (size_t)cache.n_heads * n_rows * (d + 2);
    const float *const part = a.partial + ((size_t)head * n_rows + row) * (d + 2);

    float largest = -INFINITY, sum = 0;
    for (int s = thread; s < a.n_splits; s += THREADS) {
        factor[s] = part[s * stride + d];
        largest = fmaxf(largest, factor[s]);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    }
    if (thread % 32 == 0) largest_of[warp] = largest;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; i++) largest = fmaxf(largest, largest_of[i]);
    for (int s = thread; s < a.n_splits; s += THREADS) { /* those that this thread wrote */
        factor[s] = expf(factor[s] - largest);
        sum += part[s * stride + d + 1] * factor[s];
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (thread % 32 == 0) sum_of[warp] = sum;
    __syncthreads();
    sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += sum_of[i];
    for (int c = thread; c < d; c += THREADS) {
        float x = 0;
#pragma unroll 8
        for (int s = 0; s < a.n_splits; s++) x += part[s * stride + c] * factor[s];
        sums[c] = x / sum;
    }
    __syncthreads();
    const float *const x = kvq_restore<1>(cache.tracks[cache.n_heads + head], sums, spare, d);
    const int t = row / cache.group, h = head * cache.group + row % cache.group;
    float *const out = a.out + ((size_t)t * cache.n_heads * cache.group + h) * cache.d_head;
    for (int c = thread; c < cache.d_head; c += THREADS) out[c] = x[c];
}
KVQ_EXPORT_KERNEL(kvq_cuda_merge)
