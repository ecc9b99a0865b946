/* kv_plan.h: a plan says how each KV head of each layer is stored: it turns a scheme's row, the
 * model and a profile into one track per layer, side and head.
 *
 * Owns the meaning of schemes. Knows no ring and no kernel. Called by session.c; read by kv_ring.c
 * and kv_attend.c.
 */
#ifndef KVQ_KV_PLAN_H
#define KVQ_KV_PLAN_H

#include "kv/kv_profile.h"
#include "kv/kv_scheme.h"
#include "kv/kv_wave.h"

enum { KVQ_KEYS, KVQ_VALUES, KVQ_SIDES };

/* One side of one KV head of one layer. */
typedef struct kvq_track {
    kvq_codec_id codec;
    kvq_kv_shape shape;
    kvq_basis basis;
    kvq_wave wave; /* of keys */
    size_t block_bytes;
    size_t bytes_before; /* block_bytes of the heads before it, on the same side and layer */
} kvq_track;

typedef struct kvq_plan_request {
    const kvq_scheme *scheme;
    const kvq_profile *profile;    /* NULL: none */
    int n_layers, n_heads, d_head; /* KV heads */
    const bool *key_bias;          /* [n_layers] */
    double bits;                   /* 0: the scheme's default */
    int l_k, l_v;                  /* asymkv: layers that have the row's codecs; -1: the default */
} kvq_plan_request;

/* Mean square error of unit normal data that the codes of a codec leave before they are stretched
 * (kvq_stretch), and those of a channel of mixed by run: 8, 4, 2, 1 bits. What plans compare codecs
 * by; 0 where none chooses the codec. Tests measure them again. */
extern const float kvq_plan_loss[KVQ_CODECS], kvq_plan_run_loss[KVQ_RUNS];

/* Fills tracks[n_layers][KVQ_SIDES][n_heads]. Fails where the scheme needs a profile that is not
 * there, or bits that it cannot give. */
kvq_status kvq_plan_make(kvq_track *tracks, const kvq_plan_request *request);

/* Bits per element of the sealed blocks of one side, metadata and padding included. */
double kvq_plan_bits(const kvq_track *tracks, const kvq_plan_request *request, int side);

/* Whether anything in the tracks is from the profile: without it they would be the same. */
bool kvq_plan_uses_profile(const kvq_track *tracks, const kvq_plan_request *request);

#endif
