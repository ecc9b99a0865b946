/* waves.cuh: gives back to scores what sealing took from keys (kv/kv_wave.h). */
#ifndef KVQ_CUDA_WAVES_CUH
#define KVQ_CUDA_WAVES_CUH

#include "cuda/kernels/cache_args.h"
#include "kv/kv_ids.h"

/* The products of queries with a head's waves. Each thread keeps those of the rows and waves that
 * are its own: item i of a block of threads is wave i % KVQ_WAVES of row i / KVQ_WAVES. */
enum { KVQ_WAVE_ITEMS = 4 }; /* a thread's, with 16 rows for each 32 threads */

typedef struct kvq_projected {
    float u[KVQ_WAVE_ITEMS], w[KVQ_WAVE_ITEMS];
} kvq_projected;

static __device__ __forceinline__ kvq_projected kvq_project_waves(const kvq_cuda_track &keys,
                                                                  const float *q, int n_rows,
                                                                  int d) {
    kvq_projected on;
#pragma unroll
    for (int k = 0; k < KVQ_WAVE_ITEMS; k++) {
        const int i = threadIdx.x + k * blockDim.x, row = i / KVQ_WAVES, wave = i % KVQ_WAVES;
        on.u[k] = on.w[k] = 0;
        if (row >= n_rows || wave >= keys.n_waves) continue;
        for (int c = 0; c < d; c++) {
            on.u[k] += q[(size_t)row * d + c] * keys.wave_u[wave * d + c];
            on.w[k] += q[(size_t)row * d + c] * keys.wave_w[wave * d + c];
        }
    }
    return on;
}

/* turned[row][2 * KVQ_WAVES], in shared memory: the factors of cos and sin within block b. */
static __device__ __forceinline__ void kvq_turn_waves(float *turned, const kvq_cuda_cache &cache,
                                                      const kvq_cuda_track &keys,
                                                      const kvq_projected &on, int b) {
#pragma unroll
    for (int k = 0; k < KVQ_WAVE_ITEMS; k++) {
        const int i = threadIdx.x + k * blockDim.x, wave = i % KVQ_WAVES;
        if (wave >= keys.n_waves) continue;
        const float *const start =
            cache.turns_first + ((size_t)b * cache.n_pairs + keys.pair[wave]) * 2;
        turned[2 * i] = on.u[k] * start[0] + on.w[k] * start[1];
        turned[2 * i + 1] = on.w[k] * start[0] - on.u[k] * start[1];
    }
}

/* What the waves add to a query's score of token t of the block. */
static __device__ __forceinline__ float kvq_wave_at(const kvq_cuda_cache &cache,
                                                    const kvq_cuda_track &keys, const float *turned,
                                                    int t) {
    float sum = 0;
    for (int j = 0; j < 2 * keys.n_waves; j++) {
        sum += turned[j] * cache.turns_within[(keys.pair[j / 2] * 2 + j % 2) * KVQ_BLOCK + t];
    }
    return sum;
}

#endif
