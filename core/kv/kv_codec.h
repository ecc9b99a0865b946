/* kv_codec.h: a codec packs one block (kv_format.h) and works on it without unpacking it to memory.
 *
 * A codec is a row of codecs.def. Owns encoders, decoders and the reference score and accum; the
 * fast ones stand in isa/. Knows no papers, positions or layers. Called by kv_ring.c (encode,
 * decode) and kv_attend.c (score, accum through the instruction set).
 */
#ifndef KVQ_KV_CODEC_H
#define KVQ_KV_CODEC_H

#include <stdbool.h>

#include "kv/kv_format.h"

/* Queries of one KV head, in the basis of its keys, already divided by sqrt(width of a head) and
 * times log2(e): scores are exponents of 2. */
typedef struct kvq_query {
    const float *x; /* [n][d] */
    /* [n][kvq_x16_stride(d)] x ~ unit * x16, where kvq_codec_reads_x16 of the keys' codec */
    const int16_t *x16;
    const float *unit; /* [n] */
    int n;
} kvq_query;

#define KVQ_X16_UNIT 32 /* as many as the widest vector holds */
static inline int kvq_x16_stride(int d) {
    return (d + KVQ_X16_UNIT - 1) / KVQ_X16_UNIT * KVQ_X16_UNIT;
}

static inline bool kvq_codec_reads_x16(kvq_codec_id id) {
    return id == KVQ_CODEC_u1 || id == KVQ_CODEC_u2 || id == KVQ_CODEC_u4;
}

/* Fills x16 and unit of a query of n rows x[n][d], with zeros beyond d. What is no number makes the
 * unit none. */
void kvq_query_round(int16_t *x16, float *unit, const float *x, int n, int d);

/* n of the queries, from the first on. */
static inline kvq_query kvq_query_from(const kvq_query *query, int first, int n, int d) {
    return (kvq_query){query->x + first * d, query->x16 + first * kvq_x16_stride(d),
                       query->unit + first, n};
}

/* Some sealed blocks of one side of a KV head: while a result of one is awaited, others are worked
 * on. */
enum { KVQ_BLOCKS_AT_ONCE = 4 };
typedef struct kvq_blocks {
    const uint8_t *at[KVQ_BLOCKS_AT_ONCE];
    /* Those that are read next, NULL where there is none: kernels that read blocks in an order
     * which hardware does not follow fetch them meanwhile, a few lines at a time. */
    const uint8_t *ahead[KVQ_BLOCKS_AT_ONCE];
    int n;
} kvq_blocks;

/* What the tokens of blocks weigh for n queries. */
typedef struct kvq_weights {
    const float *p;   /* [blocks][n][KVQ_BLOCK] >= 0 */
    const float *sum; /* [n] the result will be divided by 1 or by this, if it is larger, or by
                         more: what matters little beside it may be rounded more */
    int n;
} kvq_weights;

/* s[b][i][t] = query i . key t of block b, of [blocks][queries][KVQ_BLOCK] */
typedef void kvq_score_fn(float *s, const kvq_query *query, const kvq_blocks *blocks,
                          const kvq_kv_shape *sh);

/* o[i * d + c] += sum over t of p[b][i][t] * value[t][c] of block b, block after block */
typedef void kvq_accum_fn(float *o, const kvq_weights *weights, const kvq_blocks *blocks,
                          const kvq_kv_shape *sh);

/* The same over n_rows <= KVQ_BLOCK plain rows of d halves (sinks and recent tokens), for n queries
 * that weigh them p[i * KVQ_BLOCK + t]. Tokens are added in their order, so a span may be cut
 * anywhere without changing a bit of the result. */
typedef void kvq_score_rows_fn(float *s, const kvq_query *query, const uint16_t *rows, int n_rows,
                               int d);
typedef void kvq_accum_rows_fn(float *o, const float *p, int n, const uint16_t *rows, int n_rows,
                               int d);

typedef struct kvq_codec {
    const char *name, *summary;
    int d_multiple; /* widths it can pack are multiples of this */
    size_t (*bytes)(const kvq_kv_shape *sh);
    /* rows[KVQ_BLOCK][d] halves, in the basis -> block. The same bytes on every machine: plain C
     * without contraction of products into sums. */
    void (*encode)(uint8_t *block, const uint16_t *rows, const kvq_kv_shape *sh);
    void (*decode)(float *x, const uint8_t *block, const kvq_kv_shape *sh); /* x[KVQ_BLOCK][d] */
} kvq_codec;

extern const kvq_codec kvq_codecs[KVQ_CODECS];

/* The tables of kv_format.h. */
extern const float kvq_n2_level[8], kvq_n3_level[8], kvq_nf4_level[16];
extern const int8_t kvq_t1_level[16], kvq_t2_level[16];
extern const int8_t kvq_c8_x[8], kvq_c8_y[8];

/* The reference: decodes and multiplies in plain loops. */
void kvq_score_reference(kvq_codec_id id, float *s, const kvq_query *query,
                         const kvq_blocks *blocks, const kvq_kv_shape *sh);
void kvq_accum_reference(kvq_codec_id id, float *o, const kvq_weights *weights,
                         const kvq_blocks *blocks, const kvq_kv_shape *sh);
kvq_score_rows_fn kvq_score_rows_reference;
kvq_accum_rows_fn kvq_accum_rows_reference;

#endif
