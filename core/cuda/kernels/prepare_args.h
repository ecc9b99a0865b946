/* prepare_args.h: arguments and shapes of the kernels of cache.cu, for the host and the device; C11
 * and C++14.
 *
 * Order within a layer: kvq_cuda_prepare, attention (attend_args.h), kvq_cuda_seal,
 * kvq_cuda_append. Seal reads recent rows that append overwrites.
 */
#ifndef KVQ_CUDA_PREPARE_ARGS_H
#define KVQ_CUDA_PREPARE_ARGS_H

#include "cuda/kernels/cache_args.h"

/* Threads of a CUDA block, of all of these kernels. */
#define KVQ_CUDA_CACHE_THREADS 128

/* Queries, keys and values of the pass, after RoPE, into the basis of the cache: keys and values to
 * new_rows, queries over the square root of d_head to `prepared`.
 *
 * Grid: (ceil(n_batch * group / KVQ_CUDA_VECTORS), n_heads, 3), kvq_cuda_basis_shared(d) bytes. */
typedef struct kvq_cuda_prepare_args {
    kvq_cuda_cache cache;
    const float *q, *k, *v; /* [n][n_heads * group][d_head], [n][n_heads][d_head] */
    float *prepared;        /* [n_heads][n_batch][group][d] */
} kvq_cuda_prepare_args;

/* The blocks that the pass fills, as kvq_codecs[].encode writes them.
 *
 * Grid: (2 * n_heads, the most blocks that a pass can seal), kvq_cuda_seal_shared(d) bytes. */
typedef struct kvq_cuda_seal_args {
    kvq_cuda_cache cache;
} kvq_cuda_seal_args;

/* The rows of the pass to the sinks and to the recent rows, the last recent_rows of them.
 *
 * Grid: (2 * n_heads, ceil(n_batch / KVQ_CUDA_APPEND_ROWS)), no dynamic shared memory. */
typedef struct kvq_cuda_append_args {
    kvq_cuda_cache cache;
} kvq_cuda_append_args;

/* Vectors that share one reading of a basis's matrix. */
#define KVQ_CUDA_VECTORS 8
/* Rows that a CUDA block copies, one for each warp. */
#define KVQ_CUDA_APPEND_ROWS (KVQ_CUDA_CACHE_THREADS / 32)

/* The vectors, and what they become. */
KVQ_BOTH size_t kvq_cuda_basis_shared(int d) {
    return 2 * KVQ_CUDA_VECTORS * (size_t)d * sizeof(float);
}

/* The rows of a block are padded to an odd number of 32-bit words, so that neither a row nor a
 * column of them falls into one bank of shared memory. */
KVQ_BOTH int kvq_cuda_row_stride(int d) { return d + 2; }

/* Floats beside the rows: the most that any encoder (or the waves) has in use. */
#define KVQ_CUDA_TRELLIS_STRIDE (KVQ_CUDA_CACHE_THREADS + 1)
KVQ_BOTH size_t kvq_cuda_seal_scratch(int d) {
    const size_t scales = KVQ_BLOCK * (size_t)(d < 32 ? 1 : d / 32); /* a group has 32 channels */
    const size_t fits = 3 * (size_t)d + 2 * scales;
    const size_t trellis = 2 * KVQ_BLOCK + KVQ_BLOCK / 4 * KVQ_CUDA_TRELLIS_STRIDE + 16;
    return fits > trellis ? fits : trellis;
}

/* Within the 48 KiB that every GPU gives without asking, for heads of up to KVQ_CUDA_D_MAX. */
KVQ_BOTH size_t kvq_cuda_seal_shared(int d) {
    return KVQ_BLOCK * (size_t)kvq_cuda_row_stride(d) * sizeof(uint16_t) +
           kvq_cuda_seal_scratch(d) * sizeof(float);
}

#endif
