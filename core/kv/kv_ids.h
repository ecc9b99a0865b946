/* kv_ids.h: the numbers by which host and kernels for GPUs call codecs and bases.
 *
 * Leaf. Declares no function: NVRTC, which compiles kernels alone, takes none of the host's.
 */
#ifndef KVQ_KV_IDS_H
#define KVQ_KV_IDS_H

typedef enum kvq_codec_id {
#define KVQ_CODEC(NAME, MULTIPLE, SUMMARY) KVQ_CODEC_##NAME,
#include "kv/codecs.def"
#undef KVQ_CODEC
    KVQ_CODECS
} kvq_codec_id;

typedef enum kvq_basis_kind {
    KVQ_BASIS_identity,
    KVQ_BASIS_hadamard,
    KVQ_BASIS_permuted,  /* channels in another order, which puts like beside like */
    KVQ_BASIS_calibrated /* any invertible matrix */
} kvq_basis_kind;

enum { KVQ_WAVES = 8 }; /* pairs of a head that have waves (kv_wave.h), at most */

#endif
