/* attend_args.h: attention of a pass's queries over one layer's cache and over the pass's own rows;
 * C11 for the host, C++14 for the device.
 *
 * The cache is cut into units: sealed blocks, then up to 64 rows of sinks, then up to 64 rows at a
 * time of what follows the sealed blocks. Splits share out the units of one KV head; each leaves a
 * partial result, and kvq_cuda_merge puts them together.
 */
#ifndef KVQ_CUDA_ATTEND_ARGS_H
#define KVQ_CUDA_ATTEND_ARGS_H

#include "cuda/kernels/cache_args.h"

#define KVQ_CUDA_D_MAX 256 /* the widest head that kernels take */

#define KVQ_CUDA_MOST_SPLITS 256
#define KVQ_CUDA_MERGE_THREADS 128
#define KVQ_CUDA_DECODE_WARPS 4 /* of kvq_cuda_decode_KIND_W */

/* Queries come as rows: row r of a KV head is query head r % group of token r / group. */
typedef struct kvq_cuda_attend_args {
    kvq_cuda_cache cache;
    const float *q; /* [n_heads][n_batch * group][d], in the basis of the keys, over sqrt(d_head) */
    /* [n_splits][n_heads][n * group][d + 2] for a pass of n tokens: the sum of weight * value, then
     * the largest score and the sum of weights, both relative to exp(largest score) */
    float *partial;
    int32_t n_splits;
    int32_t reserved; /* no padding, whose bytes would be anything */
} kvq_cuda_attend_args;

typedef struct kvq_cuda_merge_args {
    kvq_cuda_cache cache;
    const float *partial;
    float *out; /* [n][n_heads * group][d_head] */
    int32_t n_splits;
    int32_t reserved;
} kvq_cuda_merge_args;

/* The kernels of one token, kvq_cuda_decode_KIND_W, W 64 or 128 the widest head, by the kind of
 * values: f16 (and keys alike); c8 with keys of u2; t1 and t2 with keys of u1, u2, u4 or mixed. */
typedef enum kvq_cuda_decode_kind {
    KVQ_CUDA_DECODE_NONE, /* kvq_cuda_attend_W has to do it */
    KVQ_CUDA_DECODE_HALVES,
    KVQ_CUDA_DECODE_PAIRS,
    KVQ_CUDA_DECODE_TRELLIS
} kvq_cuda_decode_kind;

/* The kind that takes a KV head, whose keys have n_waves waves. */
KVQ_BOTH kvq_cuda_decode_kind kvq_cuda_decode_kind_of(kvq_codec_id keys,
                                                      const kvq_kv_shape *of_keys, int n_waves,
                                                      kvq_codec_id values,
                                                      const kvq_kv_shape *of_values) {
    const int uniform = keys == KVQ_CODEC_u1 || keys == KVQ_CODEC_u2 || keys == KVQ_CODEC_u4;
    if (of_keys->d > 128 || of_values->group != of_values->d) return KVQ_CUDA_DECODE_NONE;
    if (keys == KVQ_CODEC_f16 && values == KVQ_CODEC_f16) return KVQ_CUDA_DECODE_HALVES;
    if (uniform && (of_keys->group != of_keys->d || n_waves)) return KVQ_CUDA_DECODE_NONE;
    if (keys == KVQ_CODEC_u2 && values == KVQ_CODEC_c8) return KVQ_CUDA_DECODE_PAIRS;
    if (values != KVQ_CODEC_t1 && values != KVQ_CODEC_t2) return KVQ_CUDA_DECODE_NONE;
    return uniform || keys == KVQ_CODEC_mixed ? KVQ_CUDA_DECODE_TRELLIS : KVQ_CUDA_DECODE_NONE;
}

/* Shapes of kvq_cuda_attend_W, W the widest head that it takes: warps, each of which has 16 rows,
 * and channels of values that it sums (grid.z = n_splits * slices for wider heads). */
#define KVQ_CUDA_ATTEND_WARPS(W) ((W) <= 128 ? 4 : 2)
#define KVQ_CUDA_ATTEND_SLICE(W) ((W) <= 64 ? 64 : 128)

/* Of its tile in shared memory. */
#define KVQ_CUDA_ATTEND_TOKENS 32   /* at a time */
#define KVQ_CUDA_ATTEND_PADDING 8   /* halves behind each row, which keep rows in different banks */
#define KVQ_CUDA_ATTEND_MEAN_ROWS 8 /* behind those of keys: one more tile of a product */

/* Bytes of dynamic shared memory that kvq_cuda_attend_W needs for heads of padded width d. */
KVQ_BOTH uint32_t kvq_cuda_attend_shared(int W, int d) {
    const uint32_t rows = 16 * KVQ_CUDA_ATTEND_WARPS(W);
    const uint32_t row = ((uint32_t)d + KVQ_CUDA_ATTEND_PADDING) * 2;
    const uint32_t keys = (KVQ_CUDA_ATTEND_TOKENS + KVQ_CUDA_ATTEND_MEAN_ROWS) * row;
    const uint32_t values =
        (KVQ_CUDA_ATTEND_TOKENS + KVQ_CUDA_ATTEND_PADDING) * 2 * KVQ_CUDA_ATTEND_SLICE(W);
    return 2 * rows * row + (keys > values ? keys : values) + rows * 2 * KVQ_WAVES * 4;
}

#endif
