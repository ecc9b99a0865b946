/* kv_scheme.h: a scheme is what `--kv NAME` means: bases, codecs, sinks and window. Rows of
 * schemes.def. Knows no kernels. Called by session.c and kv_ring.c.
 */
#ifndef KVQ_KV_SCHEME_H
#define KVQ_KV_SCHEME_H

#include "kv/kv_basis.h"
#include "kv/kv_codec.h"

typedef struct kvq_scheme {
    const char *name, *summary;
    /* A key bias, turned by RoPE, is a large oscillation in a few channels; a basis that mixes
     * channels would spread its rounding error over all of them. So layers with one have a basis of
     * their own. */
    const kvq_basis *basis_k, *basis_k_biased, *basis_v;
    kvq_codec_id codec_k, codec_v;
    int sinks, window; /* defaults, in tokens */
} kvq_scheme;

/* NULL name: "skvq". An unknown name is an error that lists the known ones. */
kvq_status kvq_scheme_find(const kvq_scheme **out, const char *name);

/* Width of a head as stored: d_head rounded up to KVQ_D_UNIT. */
static inline int kvq_padded_width(int d_head) {
    return (int)kvq_round_up((size_t)d_head, KVQ_D_UNIT);
}

/* Refuses widths that the scheme's codecs cannot pack. */
kvq_status kvq_scheme_check(const kvq_scheme *scheme, int d_head);

/* Bits per element of a sealed block, all its metadata and padding included. */
double kvq_codec_bits(kvq_codec_id codec, int d_head);

#endif
