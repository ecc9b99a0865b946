/* merge.cu: puts the partial results of attention's splits together. */
#include "cuda/kernels/port.cuh"

#include "cuda/kernels/attend_args.h"
#include "cuda/kernels/basis.cuh"

/* out = what the heads of one row of queries see, divided by the sum of weights, out of the basis
 * of the values. Grid: rows of queries (n * group), KV heads. */
extern "C" __global__ void __launch_bounds__(KVQ_CUDA_MERGE_THREADS, 1)
    kvq_cuda_merge(const kvq_cuda_merge_args a) {
    __shared__ __align__(16) float sums[KVQ_CUDA_D_MAX], spare[KVQ_CUDA_D_MAX];
    const kvq_cuda_cache &cache = a.cache;
    const int d = cache.d, row = blockIdx.x, head = blockIdx.y, n_rows = gridDim.x;
    const size_t stride = (size_t)cache.n_heads * n_rows * (d + 2);
    const float *const part = a.partial + ((size_t)head * n_rows + row) * (d + 2);

    float largest = -INFINITY, sum = 0;
    for (int s = 0; s < a.n_splits; s++) largest = fmaxf(largest, part[s * stride + d]);
    for (int s = 0; s < a.n_splits; s++) {
        sum += part[s * stride + d + 1] * expf(part[s * stride + d] - largest);
    }
    for (int c = threadIdx.x; c < d; c += KVQ_CUDA_MERGE_THREADS) {
        float x = 0;
        for (int s = 0; s < a.n_splits; s++) {
            x += part[s * stride + c] * expf(part[s * stride + d] - largest);
        }
        sums[c] = x / sum;
    }
    __syncthreads();
    const float *const x = kvq_restore<1>(cache.tracks[cache.n_heads + head], sums, spare, d);
    const int t = row / cache.group, h = head * cache.group + row % cache.group;
    float *const out = a.out + ((size_t)t * cache.n_heads * cache.group + h) * cache.d_head;
    for (int c = threadIdx.x; c < cache.d_head; c += KVQ_CUDA_MERGE_THREADS) out[c] = x[c];
}
KVQ_EXPORT_KERNEL(kvq_cuda_merge)
