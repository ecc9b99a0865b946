/* reference.h: what the tests of the kernels' PTX call of the C core. Python reads the prototypes
 * between the marks through cffi, and the structs of core/cuda/kernels besides. */
#ifndef PTX_REFERENCE_H
#define PTX_REFERENCE_H

#include "attend_case.h"
#include "cuda/kernels/matmul_args.h"

/* [prototypes] */

/* Memory that was taken since reference_forget, each with its exact size. */
int reference_n_blocks(void);
void *reference_block(int i, size_t *bytes);
void reference_forget(void);

attend_case *attend_case_open(const attend_options *options);
void attend_case_close(attend_case *c);

size_t reference_codec_bytes(int codec, const kvq_kv_shape *shape);
int reference_codec_multiple(int codec);
const char *reference_codec_name(int codec);
void reference_encode(int codec, uint8_t *block, const uint16_t *rows, const kvq_kv_shape *shape);

/* Where tracks of codecs [n] lie (kvq_cuda_place_tracks): fills codec, shape, lead, stride and
 * bytes_before; returns the bytes that a block of all takes. */
uint64_t reference_place(kvq_cuda_track *out, const int *codecs, const kvq_kv_shape *shapes, int n);

/* Of n vectors x[n][d] in place; what: 0 into the basis, 1 queries, 2 back. */
void reference_basis(int what, int kind, const uint16_t *order, const float *matrix,
                     const float *mean, float *x, int n, int d);

/* y[n][n_rows] = x[n][n_cols] by rows of weights, and the bytes of a row. */
void reference_matmul(int kind, float *y, int n_rows, const uint8_t *w, const float *x, int n,
                      int n_cols);
int reference_weight_kinds(void);
const char *reference_weight_name(int kind);
size_t reference_weight_bytes(int kind, int n_cols);
/* The launches of matmul_args.h; the first fills fields of a. */
kvq_cuda_launch_shape reference_matvec_shape(kvq_cuda_matmul_args *a, int n_processors);
kvq_cuda_launch_shape reference_gemm_shape(const kvq_cuda_matmul_args *a);
void reference_dequantize(int kind, float *x, const uint8_t *w, int n);

/* [end] */

#endif
