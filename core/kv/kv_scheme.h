/* kv_scheme.h: a scheme is what `--kv NAME` means: bases, codecs, a plan that applies them to
 * layers and heads, sinks and window. Rows of schemes.def. Knows no kernels. Called by session.c
 * and kv_plan.c.
 */
#ifndef KVQ_KV_SCHEME_H
#define KVQ_KV_SCHEME_H

#include "base.h"
#include "kv/kv_basis.h"
#include "kv/kv_codec.h"

typedef enum kvq_plan_kind {
    KVQ_PLAN_uniform,
    KVQ_PLAN_skvq,
    KVQ_PLAN_svdq,
    KVQ_PLAN_svdq_steps,
    KVQ_PLAN_asymkv,
    KVQ_PLAN_budget
} kvq_plan_kind;

typedef enum kvq_key_bias { KVQ_KEY_BIAS_ROBUST, KVQ_KEY_BIAS_SENSITIVE } kvq_key_bias;

typedef struct kvq_scheme {
    const char *name, *summary;
    kvq_plan_kind plan;
    kvq_profile_use profile;
    kvq_key_bias key_bias;
    kvq_basis_kind basis_k, basis_v;
    kvq_codec_id codec_k, codec_v;
    int group_k,
        group_v;       /* channels that share a token's scale, in heads that they divide; 0: all */
    double bits;       /* that the plan aims at by default */
    int sinks, window; /* defaults, in tokens */
} kvq_scheme;

/* What asymkv stores the layers in that have less than the row's codecs. */
#define KVQ_ASYMKV_LESS_K KVQ_CODEC_u1
#define KVQ_ASYMKV_LESS_V KVQ_CODEC_t1

/* NULL name: "skvq". An unknown name is an error that lists the known ones. */
kvq_status kvq_scheme_find(const kvq_scheme **out, const char *name);

/* Width of a head as stored: d_head rounded up to KVQ_D_UNIT. */
static inline int kvq_padded_width(int d_head) {
    return (int)kvq_round_up((size_t)d_head, KVQ_D_UNIT);
}

/* How a side is shaped by a row's group: one that does not divide the head is the head. */
static inline kvq_kv_shape kvq_scheme_shape(int group, int d_head) {
    kvq_kv_shape shape = kvq_plain_shape(kvq_padded_width(d_head));
    if (group > 0 && shape.d % group == 0) shape.group = group;
    return shape;
}

/* Whether the plan takes as many bits as the caller allows it. */
static inline bool kvq_scheme_has_budget(const kvq_scheme *scheme) {
    return scheme->plan == KVQ_PLAN_svdq || scheme->plan == KVQ_PLAN_asymkv ||
           scheme->plan == KVQ_PLAN_budget;
}

/* The widths of svdq-steps: eight equal groups of latent channels with (8, 4, 2, 1, 1, 0, 0, 0)
 * bits for an average of 2 (section 4.2 of the paper), and (4, 4, 2, 0, ...) for 1.25, whose
 * schedule the paper does not print. */
void kvq_svdq_steps(int run[KVQ_RUNS], const kvq_scheme *scheme, int d);

/* Refuses widths that the scheme's codecs cannot pack. */
kvq_status kvq_scheme_check(const kvq_scheme *scheme, int d_head);

#endif
