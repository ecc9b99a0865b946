/* units.cuh: the units of attend_args.h: which tokens each has, and where they lie. */
#ifndef KVQ_CUDA_UNITS_CUH
#define KVQ_CUDA_UNITS_CUH

#include "cuda/kernels/attend_args.h"
#include "cuda/kernels/port.cuh"

#define KVQ_LOG2E 1.44269504f

typedef struct kvq_units {
    int sealed, sinks, rows; /* units of each kind, in this order */
} kvq_units;

static __device__ __forceinline__ kvq_units kvq_count_units(const kvq_cuda_cache &cache,
                                                            const kvq_cuda_step &step) {
    const int end = step.held + step.n, sinks = min(cache.n_sinks, end);
    const int rows = end - cache.n_sinks - step.sealed * KVQ_BLOCK;
    kvq_units units;
    units.sealed = step.sealed;
    units.sinks = (sinks + KVQ_BLOCK - 1) / KVQ_BLOCK;
    units.rows = (max(rows, 0) + KVQ_BLOCK - 1) / KVQ_BLOCK;
    return units;
}

static __device__ __forceinline__ int kvq_total_units(const kvq_units &units) {
    return units.sealed + units.sinks + units.rows;
}

typedef struct kvq_unit {
    bool sealed;
    int first;    /* position of its first token */
    int n_tokens; /* KVQ_BLOCK, or less at the end of sinks and rows */
} kvq_unit;

static __device__ __forceinline__ kvq_unit kvq_unit_at(const kvq_cuda_cache &cache,
                                                       const kvq_cuda_step &step,
                                                       const kvq_units &units, int u) {
    const int end = step.held + step.n, row = u - units.sealed - units.sinks;
    kvq_unit unit;
    unit.sealed = u < units.sealed;
    unit.first = unit.sealed ? cache.n_sinks + u * KVQ_BLOCK
                 : row < 0   ? (u - units.sealed) * KVQ_BLOCK
                             : cache.n_sinks + (step.sealed + row) * KVQ_BLOCK;
    unit.n_tokens = unit.sealed
                        ? KVQ_BLOCK
                        : min(KVQ_BLOCK, (row < 0 ? min(cache.n_sinks, end) : end) - unit.first);
    return unit;
}

/* The row of a token that is not in a sealed block. */
static __device__ __forceinline__ const uint16_t *kvq_row_of(const kvq_cuda_cache &cache, int head,
                                                             int side, int token, int held) {
    if (token < cache.n_sinks && token < held)
        return cache.sinks[side] + ((size_t)head * cache.n_sinks + token) * cache.d;
    return kvq_cuda_row(cache, head, side, token - cache.n_sinks, held);
}

#endif
