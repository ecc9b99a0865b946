/* weights.h: the formats of weights in GGUF files, and products of them with activations.
 *
 * A format is a row of weights.def. Owns the rows, the reference dequantizers and the reference
 * product; the fast products stand in isa/. Knows no tensor names and no layers. Called by gguf.c
 * (sizes of rows), arch.c (which formats are supported) and device_cpu.c (products).
 */
#ifndef KVQ_WEIGHTS_H
#define KVQ_WEIGHTS_H

#include "base.h"

/* Formats that can be multiplied, in the order of weights.def. */
typedef enum kvq_weight_kind {
#define KVQ_WEIGHT(NAME, ID, BLOCK, BYTES) KVQ_WEIGHT_##NAME,
#include "weights.def"
#undef KVQ_WEIGHT
    KVQ_WEIGHT_KINDS
} kvq_weight_kind;

typedef struct kvq_weight_format {
    const char *name; /* as ggml names it: "Q4_K" */
    uint32_t ggml_id;
    uint32_t block; /* elements per block, along a row */
    uint32_t bytes; /* per block */
    void (*dequantize)(float *y, const uint8_t *row, size_t n); /* n: a multiple of block */
} kvq_weight_format;

extern const kvq_weight_format kvq_weight_formats[KVQ_WEIGHT_KINDS];

/* The kind of a ggml type id, or -1 if it is not one that can be multiplied. */
int kvq_weight_find(uint32_t ggml_id);

/* Elements and bytes of one block of any ggml type that GGUF files may hold (also types that cannot
 * be multiplied, so that a file with one can be inspected); false for an unknown or removed id. */
bool kvq_ggml_type_size(uint32_t ggml_id, const char **name, uint32_t *block, uint32_t *bytes);

/* The largest magnitude of a quantized activation: 15 bits with the sign. */
#define KVQ_ACTIVATION_MAX 16383

/* Columns whose quantized activations share a scale; the last of a row may be fewer. With a scale
 * for each 32, logits would be nearer to float32 by up to 3e-6 nats, and products for a prompt take
 * some 5 % longer (docs/speed.md). */
#define KVQ_ACTIVATION_RUN 256

/* Scales of a row. */
static inline size_t kvq_activation_runs(size_t n_cols) {
    return (n_cols + KVQ_ACTIVATION_RUN - 1) / KVQ_ACTIVATION_RUN;
}

/* Activations of n_tok tokens, made ready for products by an instruction set. n_cols is a multiple
 * of 32 wherever a quantized format is multiplied. */
typedef struct kvq_activations {
    const float *x; /* [n_tok][n_cols] */
    size_t n_tok, n_cols;
    /* Filled by kvq_isa.quantize: */
    int16_t *q;   /* [n_tok][n_cols]  each four columns as the set's products take them */
    float *scale; /* [n_tok][kvq_activation_runs]  x ~ scale * q; largest |q| = KVQ_ACTIVATION_MAX
                   */
    float *sums;  /* [n_tok][n_cols / 32]  sum of q over a block of 32 columns, exact */
} kvq_activations;

/* Rows that are taken together divide this on every instruction set: where a matrix is shared out
 * in multiples of it, no row is computed twice. */
#define KVQ_PANEL_ROWS 32

/* y[t * y_stride + r] = sum over c of w[r][c] * x[t][c] for n_rows rows that start at `w`, each of
 * n_cols / block * bytes bytes. The result for one token does not depend on n_tok. `ahead` is
 * memory that will be wanted next, most likely more rows; as much as a panel of rows is fetched
 * from there meanwhile, never read. NULL: none. */
typedef void kvq_matmul_fn(float *y, size_t y_stride, const uint8_t *w, size_t n_rows,
                           const uint8_t *ahead, const kvq_activations *x);

/* The definition, for any format: dequantizes blockwise and sums in f64; uses x->x only. */
void kvq_matmul_reference(kvq_weight_kind kind, float *y, size_t y_stride, const uint8_t *w,
                          size_t n_rows, const kvq_activations *x);

#endif
