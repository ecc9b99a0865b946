/* kv_digest.h: what sealing does, as one number.
 *
 * Called by session.c, for those who keep results and have to know whether they still hold.
 */
#ifndef KVQ_KV_DIGEST_H
#define KVQ_KV_DIGEST_H

#include "kv/kv_plan.h"

/* Seals fixed numbers by each of tracks[n], padded width d, and hashes what they read back as (in
 * the basis) and the tracks' waves. It depends on bases, codecs and shapes, not on where blocks
 * keep what, nor on the machine. */
uint64_t kvq_digest(const kvq_track *tracks, size_t n, int d);

#endif
