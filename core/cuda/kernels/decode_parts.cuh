/* decode_parts.cuh: what the parts of decode.cu share: the result of a warp so far, and how that of
 * all warps of a block is put together.
 *
 * A warp works on up to 8 query heads of a KV head; those of row g = lane / 4 of fragments belong
 * to the four lanes of that row.
 */
#ifndef KVQ_CUDA_DECODE_PARTS_CUH
#define KVQ_CUDA_DECODE_PARTS_CUH

#include "cuda/kernels/attend_args.h"
#include "cuda/kernels/port.cuh"
#include "cuda/kernels/units.cuh"

#define KVQ_LN2 0.693147181f

/* Channels come in tiles of 8, of which a lane has two; which ones they are is the matter of who
 * adds to them. */
template <int D> struct running {
    float o[D / 8][2];  /* sum of weight * value */
    float largest, sum; /* of the row; scores in units of log 2; the lane's part of the weights */
};

template <int D> static __device__ __forceinline__ void clear(running<D> &r) {
#pragma unroll
    for (int i = 0; i < D / 8; i++) r.o[i][0] = r.o[i][1] = 0;
    r.largest = -INFINITY;
    r.sum = 0;
}

/* The largest of the four lanes of a row. */
static __device__ __forceinline__ float largest_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

static __device__ __forceinline__ float sum_of_row(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* Raises the largest score of the row, and makes the sums relative to it. */
template <int D>
static __device__ __forceinline__ void raise_largest(running<D> &r, float largest) {
    const float now = fmaxf(r.largest, largest);
    const float factor = kvq_exp2(r.largest - now);
    r.largest = now;
    if (__all_sync(0xffffffffu, factor == 1.0f)) return; /* as it is most of the time */
    r.sum *= factor;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
        r.o[i][0] *= factor;
        r.o[i][1] *= factor;
    }
}

/* In shared memory: what the warps of a block bring together. */
template <int D> struct all_warps {
    float sums[KVQ_CUDA_DECODE_WARPS][8][D + 1];
    float largest[KVQ_CUDA_DECODE_WARPS][8], weights[KVQ_CUDA_DECODE_WARPS][8];
};

/* The results of all warps as one partial result of the split. CHANNEL says which channel number e
 * of tile i of a lane is. */
template <int D, class Channel>
static __device__ __forceinline__ void finish(const running<D> &r, all_warps<D> &all,
                                              const kvq_cuda_attend_args &a, int first, int n,
                                              Channel channel) {
    enum { WARPS = KVQ_CUDA_DECODE_WARPS };
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
    const int d = a.cache.d, n_rows = a.cache.group;
    const float sum = sum_of_row(r.sum);
    __syncthreads(); /* all warps are done with queries, which may lie in the same place */
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
#pragma unroll
        for (int e = 0; e < 2; e++) all.sums[warp][row][channel(i, e)] = r.o[i][e];
    }
    if (lane % 4 == 0) {
        all.largest[warp][row] = r.largest;
        all.weights[warp][row] = sum;
    }
    __syncthreads();
    float *const out =
        a.partial +
        (((size_t)blockIdx.z * a.cache.n_heads + blockIdx.y) * n_rows + first) * (d + 2);
    for (int i = threadIdx.x; i < n * d; i += 32 * WARPS) {
        const int q = i / d, c = i % d;
        float most = -INFINITY, x = 0, w = 0;
#pragma unroll
        for (int k = 0; k < WARPS; k++) most = fmaxf(most, all.largest[k][q]);
        const float safe = most == -INFINITY ? 0.0f : most; /* no block was this split's */
#pragma unroll
        for (int k = 0; k < WARPS; k++) {
            const float factor = kvq_exp2(all.largest[k][q] - safe);
            x += factor * all.sums[k][q][c];
            w += factor * all.weights[k][q];
        }
        out[(size_t)q * (d + 2) + c] = x;
        if (c == 0) {
            out[(size_t)q * (d + 2) + d] = most * KVQ_LN2;
            out[(size_t)q * (d + 2) + d + 1] = w;
        }
    }
}

#endif
