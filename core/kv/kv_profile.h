/* kv_profile.h: what calibration found for one model, read from a small GGUF file that is trusted
 * no more than any other: every type, shape, number and matrix is checked at open.
 *
 * Owns its numbers; knows no scheme. Made by pykvq/calibrate.py; used by kv_plan.c. The format is
 * in docs/profile.md.
 */
#ifndef KVQ_KV_PROFILE_H
#define KVQ_KV_PROFILE_H

#include "base.h"
#include "kv/kv_wave.h"

struct kvq_profile {
    void *memory;                     /* of all below */
    size_t bytes;                     /* of it */
    int n_layers, n_heads, d_head, d; /* KV heads; width of a head, and padded */
    char label[64];
    /* All [n_layers][n_heads][...] unless said otherwise; padded channels are zeros. */
    float *k_store, *k_query;   /* [d][d] columns of T and T^-T (kv_basis.h) */
    float *v_store, *v_restore; /* [d][d] columns of T and T^-1, of values */
    float *k_mean, *v_mean;     /* [d] */
    float *wave_u, *wave_w;     /* [KVQ_WAVES][d] (kv_wave.h) */
    uint16_t *wave_pair;        /* [KVQ_WAVES] */
    uint8_t *n_waves;           /* pairs in use */
    float *importance;    /* [d] squared logit error if a latent channel is dropped, descending */
    float *k_sensitivity; /* [n_layers] divergence per squared logit error */
    float *v_sensitivity; /* divergence if the values' relative error were 1 */
    uint16_t *order;      /* [d] channels in SKVQ's order */
};

/* As kvq_profile_open, from a file that is open; it may be closed afterwards. */
struct kvq_gguf;
kvq_status kvq_profile_read(kvq_profile **out, const kvq_model *model, const struct kvq_gguf *file);

static inline size_t kvq_profile_head(const kvq_profile *p, int layer, int head) {
    return (size_t)layer * (size_t)p->n_heads + (size_t)head;
}

#endif
