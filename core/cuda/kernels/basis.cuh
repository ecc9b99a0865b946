/* basis.cuh: vectors in shared memory into the basis of a track and back (kv/kv_basis.h), by all
 * threads of a CUDA block; to the bit what kv_basis.c does.
 *
 * x[N][d] lies in shared memory, complete; `spare` has as much room. The result, complete too, is
 * in whichever of the two is returned.
 */
#ifndef KVQ_CUDA_BASIS_CUH
#define KVQ_CUDA_BASIS_CUH

#include "cuda/kernels/port.cuh"

#include "cuda/kernels/cache_args.h"

namespace kvq_basis_map {

template <int N> __device__ __forceinline__ void hadamard(float *x, int d) {
    const int block = d & -d;
    const float norm = 1.0f / sqrtf((float)block);
    for (int far = 1; far < block; far *= 2) {
        for (int pair = (int)threadIdx.x; pair < N * d / 2; pair += (int)blockDim.x) {
            const int low = (pair & ~(far - 1)) + pair; /* pair / far * 2 * far + pair % far */
            const float a = x[low], b = x[low + far];
            x[low] = a + b;
            x[low + far] = a - b;
        }
        __syncthreads();
    }
    for (int i = (int)threadIdx.x; i < N * d; i += (int)blockDim.x) x[i] *= norm;
    __syncthreads();
}

/* y = sum over j of x[j] * column j, in that order: a thread for each channel. */
template <int N>
__device__ __forceinline__ void multiply(float *y, const float *x, const float *columns, int d) {
    for (int c = (int)threadIdx.x; c < d; c += (int)blockDim.x) {
        float sum[N];
#pragma unroll
        for (int v = 0; v < N; v++) sum[v] = 0;
        for (int j = 0; j < d; j += 4) {
            const float *const column = columns + (size_t)j * (size_t)d + c;
            const float m0 = column[0], m1 = column[d], m2 = column[2 * d], m3 = column[3 * d];
#pragma unroll
            for (int v = 0; v < N; v++) {
                const float4 xj = *(const float4 *)(x + v * d + j);
                sum[v] += xj.x * m0;
                sum[v] += xj.y * m1;
                sum[v] += xj.z * m2;
                sum[v] += xj.w * m3;
            }
        }
#pragma unroll
        for (int v = 0; v < N; v++) y[v * d + c] = sum[v];
    }
    __syncthreads();
}

/* Adds `sign` times the mean to each vector. */
template <int N>
__device__ __forceinline__ void shift(float *x, const float *mean, float sign, int d) {
    for (int c = (int)threadIdx.x; c < d; c += (int)blockDim.x) {
        for (int v = 0; v < N; v++) x[v * d + c] += sign * mean[c];
    }
    __syncthreads();
}

template <int N>
__device__ __forceinline__ void gather(float *y, const float *x, const uint16_t *order, int d) {
    for (int c = (int)threadIdx.x; c < d; c += (int)blockDim.x) {
        for (int v = 0; v < N; v++) y[v * d + c] = x[v * d + order[c]];
    }
    __syncthreads();
}

template <int N>
__device__ __forceinline__ void scatter(float *y, const float *x, const uint16_t *order, int d) {
    for (int c = (int)threadIdx.x; c < d; c += (int)blockDim.x) {
        for (int v = 0; v < N; v++) y[v * d + order[c]] = x[v * d + c];
    }
    __syncthreads();
}

} // namespace kvq_basis_map

/* Keys or values as they are stored. */
template <int N>
__device__ __forceinline__ float *kvq_store(const kvq_cuda_track &track, float *x, float *spare,
                                            int d) {
    switch (track.basis) {
    case KVQ_BASIS_hadamard:
        kvq_basis_map::hadamard<N>(x, d);
        return x;
    case KVQ_BASIS_permuted:
        kvq_basis_map::gather<N>(spare, x, track.order, d);
        return spare;
    case KVQ_BASIS_calibrated:
        kvq_basis_map::shift<N>(x, track.mean, -1.0f, d);
        kvq_basis_map::multiply<N>(spare, x, track.store, d);
        return spare;
    default:
        return x;
    }
}

/* Queries, into the basis of their keys. */
template <int N>
__device__ __forceinline__ float *kvq_turn_queries(const kvq_cuda_track &track, float *x,
                                                   float *spare, int d) {
    if (track.basis != KVQ_BASIS_calibrated) return kvq_store<N>(track, x, spare, d);
    kvq_basis_map::multiply<N>(spare, x, track.query, d);
    return spare;
}

/* Outputs of attention, out of the basis of the values. */
template <int N>
__device__ __forceinline__ float *kvq_restore(const kvq_cuda_track &track, float *x, float *spare,
                                              int d) {
    switch (track.basis) {
    case KVQ_BASIS_hadamard: /* its own inverse */
        kvq_basis_map::hadamard<N>(x, d);
        return x;
    case KVQ_BASIS_permuted:
        kvq_basis_map::scatter<N>(spare, x, track.order, d);
        return spare;
    case KVQ_BASIS_calibrated:
        kvq_basis_map::multiply<N>(spare, x, track.restore, d);
        kvq_basis_map::shift<N>(spare, track.mean, 1.0f, d);
        return spare;
    default:
        return x;
    }
}

#endif
