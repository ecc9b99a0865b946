/* matmul_args.h: what the products of weights with activations take, and the shapes of their
 * launches; C11 for the host, C++14 for the device.
 */
#ifndef KVQ_CUDA_MATMUL_ARGS_H
#define KVQ_CUDA_MATMUL_ARGS_H

#include "bytes.h"

/* A matrix in the bytes of its file, and what becomes of its product. */
typedef struct kvq_cuda_matrix {
    const uint8_t *w;  /* [n_rows] rows of n_cols / block * bytes; begins on a multiple of 16 */
    const float *bias; /* [n_rows]; NULL: none */
    float *y;          /* [n][y_stride], n_rows of each written */
    int32_t n_rows, y_stride;
} kvq_cuda_matrix;

/* y[t][r] = sum over c of w[r][c] * x[t][c] + bias[r], or with `add` y[t][r] += that. The matrices
 * are of one type and share the input. */
typedef struct kvq_cuda_matmul_args {
    kvq_cuda_matrix matrices[3];
    /* Of the activations a matvec takes these ... */
    const float *x; /* [n][n_cols]; begins on a multiple of 16 */
    /* ... and a gemm what kvq_cuda_halve made of them. */
    const uint16_t *halves; /* [n][kvq_cuda_halves_in_row(n_cols)] */
    const float *unscale;   /* [n] */
    int32_t n_matrices, n, n_cols, add;
    int32_t rows_per_block, panel; /* of a matvec, by kvq_cuda_matvec_shape */
} kvq_cuda_matmul_args;

typedef struct kvq_cuda_launch_shape {
    uint32_t blocks, blocks_y, threads, shared_bytes;
} kvq_cuda_launch_shape;

/* ---- products with few tokens (matvec.cu) ------------------------------------------------ */

enum {
    KVQ_MATVEC_TOKENS = 8, /* the most */
    KVQ_MATVEC_THREADS = 256,
    KVQ_MATVEC_WARPS = KVQ_MATVEC_THREADS / 32,
    /* A lane takes a unit of 32 columns, a warp a chunk of 32 units; a block holds the activations
     * of `panel` chunks. Units lie 36 floats apart, so that eight lanes that read 16 bytes each
     * meet all banks once. */
    KVQ_MATVEC_UNIT = 32,
    KVQ_MATVEC_CHUNK = 32 * KVQ_MATVEC_UNIT,
    KVQ_MATVEC_UNIT_STRIDE = KVQ_MATVEC_UNIT + 4,
    KVQ_MATVEC_MOST_ROWS = 64, /* of a block */
};

/* The kernel for n tokens, at most KVQ_MATVEC_TOKENS: kvq_cuda_matvec_FORMAT_TOKENS. */
KVQ_BOTH int kvq_cuda_matvec_tokens(int n) { return n <= 1 ? 1 : n <= 4 ? 4 : 8; }

/* Fills rows_per_block and panel of `a` for its kernel and for a device of n_processors. Wide
 * matrices are split over the warps of a block, so that short ones occupy the device; a block takes
 * as many rows as leave two blocks for every processor, for each block has to fetch the
 * activations. */
KVQ_BOTH kvq_cuda_launch_shape kvq_cuda_matvec_shape(kvq_cuda_matmul_args *a, int n_processors) {
    const int tokens = kvq_cuda_matvec_tokens(a->n);
    const int chunks = (a->n_cols + KVQ_MATVEC_CHUNK - 1) / KVQ_MATVEC_CHUNK;
    int panel = 1, rows = 0, blocks = 0;
    while (panel < chunks && panel * tokens < 4) panel *= 2;
    for (int i = 0; i < a->n_matrices; i++) rows += a->matrices[i].n_rows;

    const int step = 4 * (KVQ_MATVEC_WARPS / panel); /* a warp takes at most 4 at a time */
    const int wanted = (rows + 2 * n_processors - 1) / (2 * n_processors);
    int rows_per_block = (wanted + step - 1) / step * step;
    if (rows_per_block > KVQ_MATVEC_MOST_ROWS) rows_per_block = KVQ_MATVEC_MOST_ROWS;
    for (int i = 0; i < a->n_matrices; i++) {
        blocks += (a->matrices[i].n_rows + rows_per_block - 1) / rows_per_block;
    }
    a->panel = panel;
    a->rows_per_block = rows_per_block;

    const int units = tokens * panel * 32;
    const int floats = units * (KVQ_MATVEC_UNIT_STRIDE + 2) + rows_per_block * tokens * panel;
    const kvq_cuda_launch_shape shape = {(uint32_t)blocks, 1, KVQ_MATVEC_THREADS,
                                         (uint32_t)floats * 4};
    return shape;
}

/* ---- products with many tokens (gemm.cu) ------------------------------------------------- */

enum {
    KVQ_GEMM_ROWS = 128,    /* of a block */
    KVQ_GEMM_TOKENS = 64,   /* of a block */
    KVQ_GEMM_COLUMNS = 32,  /* of a step */
    KVQ_GEMM_THREADS = 128, /* one for each row */
    KVQ_HALVE_THREADS = 256,
};

KVQ_BOTH int kvq_cuda_halves_in_row(int n_cols) {
    return (n_cols + KVQ_GEMM_COLUMNS - 1) / KVQ_GEMM_COLUMNS * KVQ_GEMM_COLUMNS;
}

/* x[t][c] = unscale[t] * halves[t][c], rounded; unscale is a power of two that brings the largest
 * magnitude of a token near the end of the range of halves. Zeros follow the last column.
 * kvq_cuda_halve: n blocks of KVQ_HALVE_THREADS. */
typedef struct kvq_cuda_halve_args {
    const float *x;   /* [n][n_cols] */
    uint16_t *halves; /* [n][kvq_cuda_halves_in_row(n_cols)]; begins on a multiple of 16 */
    float *unscale;   /* [n] */
    int32_t n, n_cols;
} kvq_cuda_halve_args;

/* Of the kernels kvq_cuda_gemm_FORMAT, for any number of tokens. */
KVQ_BOTH kvq_cuda_launch_shape kvq_cuda_gemm_shape(const kvq_cuda_matmul_args *a) {
    uint32_t blocks_y = 0;
    for (int i = 0; i < a->n_matrices; i++) {
        blocks_y += (uint32_t)(a->matrices[i].n_rows + KVQ_GEMM_ROWS - 1) / KVQ_GEMM_ROWS;
    }
    const kvq_cuda_launch_shape shape = {
        (uint32_t)(a->n + KVQ_GEMM_TOKENS - 1) / KVQ_GEMM_TOKENS, blocks_y, KVQ_GEMM_THREADS,
        2 * (KVQ_GEMM_ROWS + KVQ_GEMM_TOKENS) * KVQ_GEMM_COLUMNS * 2};
    return shape;
}

#endif
