/* kv_ref.c: scores and sums by the book: definition, fallback and oracle of every fast path. Stays
 * dumb. */
#include "kv/kv_codec.h"

static void score_decoded(float *s, const kvq_query *query, const float *k, int n_rows, int d) {
    for (int i = 0; i < query->n; i++) {
        for (int t = 0; t < n_rows; t++) {
            float sum = 0;
            for (int c = 0; c < d; c++) sum += query->x[i * d + c] * k[t * d + c];
            s[i * KVQ_BLOCK + t] = sum;
        }
    }
}

static void accum_decoded(float *o, const float *p, int n, const float *v, int n_rows, int d) {
    for (int i = 0; i < n; i++) {
        for (int t = 0; t < n_rows; t++) {
            for (int c = 0; c < d; c++) o[i * d + c] += p[i * KVQ_BLOCK + t] * v[t * d + c];
        }
    }
}

void kvq_score_reference(kvq_codec_id id, float *s, const kvq_query *query,
                         const kvq_blocks *blocks, const kvq_kv_shape *sh) {
    float k[KVQ_BLOCK * KVQ_D_MAX];
    for (int b = 0; b < blocks->n; b++) {
        kvq_codecs[id].decode(k, blocks->at[b], sh);
        score_decoded(s + b * query->n * KVQ_BLOCK, query, k, KVQ_BLOCK, sh->d);
    }
}

void kvq_accum_reference(kvq_codec_id id, float *o, const kvq_weights *weights,
                         const kvq_blocks *blocks, const kvq_kv_shape *sh) {
    float v[KVQ_BLOCK * KVQ_D_MAX];
    for (int b = 0; b < blocks->n; b++) {
        const float *const p = weights->p + b * weights->n * KVQ_BLOCK;
        kvq_codecs[id].decode(v, blocks->at[b], sh);
        accum_decoded(o, p, weights->n, v, KVQ_BLOCK, sh->d);
    }
}

void kvq_score_rows_reference(float *s, const kvq_query *query, const uint16_t *rows, int n_rows,
                              int d) {
    float k[KVQ_BLOCK * KVQ_D_MAX];
    for (int i = 0; i < n_rows * d; i++) k[i] = kvq_f16_to_f32(rows[i]);
    score_decoded(s, query, k, n_rows, d);
}

void kvq_accum_rows_reference(float *o, const float *p, int n, const uint16_t *rows, int n_rows,
                              int d) {
    float v[KVQ_BLOCK * KVQ_D_MAX];
    for (int i = 0; i < n_rows * d; i++) v[i] = kvq_f16_to_f32(rows[i]);
    accum_decoded(o, p, n, v, n_rows, d);
}
