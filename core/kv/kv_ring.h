/* kv_ring.h: where each token of one layer lives: `sinks (f16) | sealed blocks | recent rows
 * (f16)`.
 *
 *   token  0 .. sinks-1          first tokens, f16 for good
 *          then index i = token - sinks:
 *          i < 64 * n_sealed     in sealed block i / 64
 *          i >= 64 * n_sealed    in a recent row
 *
 * A block is sealed once, when `window` rows have come after it; until then its rows are f16. So
 * between window and window + 63 tokens are recent once the first block is sealed. Vectors come in
 * the basis of the scheme, padded to d channels. Owns positions and seals; knows nothing of what is
 * inside a block. Called by kv_attend.c and session.c.
 */
#ifndef KVQ_KV_RING_H
#define KVQ_KV_RING_H

#include "kv/kv_plan.h"

typedef struct kvq_ring {
    const kvq_track *track[KVQ_SIDES]; /* [n_heads] how each KV head is stored */
    const kvq_turns *turns;            /* of the tracks' waves; NULL where none has any */
    int n_heads, d;                    /* KV heads, padded width */
    int sinks, window;
    int max_blocks;  /* per head */
    int recent_rows; /* per head, a multiple of KVQ_BLOCK: row i lives in slot i % recent_rows */
    int n;           /* tokens held */
    int n_sealed;    /* blocks */
    uint16_t *sink[KVQ_SIDES];   /* [n_heads][sinks][d] */
    uint8_t *sealed[KVQ_SIDES];  /* head by head, [max_blocks][track.block_bytes] */
    uint16_t *recent[KVQ_SIDES]; /* [n_heads][recent_rows][d] */
} kvq_ring;

typedef struct kvq_ring_bytes {
    size_t sinks, sealed[KVQ_SIDES], recent;
} kvq_ring_bytes;

/* Sets the shape for a context of n_ctx tokens and lays out its memory, whose bytes by kind are
 * added to *bytes. tracks: [KVQ_SIDES][n_heads] of this layer, of the caller, like the turns. */
void kvq_ring_lay_out(kvq_ring *ring, kvq_arena *arena, kvq_ring_bytes *bytes,
                      const kvq_track *tracks, const kvq_turns *turns, int n_heads, int d_head,
                      int sinks, int window, int n_ctx);

/* Appends rows[n][d] of one head and side, sealing blocks as they leave the window. Heads and sides
 * may be appended in parallel; kvq_ring_advance(ring, n) then moves the ring on, once for all. */
void kvq_ring_append(const kvq_ring *ring, int head, int side, const uint16_t *rows, int n);
void kvq_ring_advance(kvq_ring *ring, int n);

/* Blocks that will be sealed once n more tokens are in. */
int kvq_ring_sealed_after(const kvq_ring *ring, int n);

/* The rows of a sealed block whose bytes are given, as the codes give them back. */
void kvq_ring_decode(const kvq_ring *ring, int head, int side, int block, const uint8_t *bytes,
                     uint16_t *rows);

/* Tokens until one of them seals a block: at least 1. */
int kvq_ring_until_seal(const kvq_ring *ring);

/* Keeps the first n tokens. Rows of a block that is cut return to f16 as the codes give them back.
 */
void kvq_ring_truncate(kvq_ring *ring, int n);

/* Seals the oldest recent rows, early if need be, until n_sealed blocks are sealed. The rows must
 * be held. */
void kvq_ring_seal(kvq_ring *ring, int n_sealed);

/* For measuring: n more sealed blocks, which repeat those that there are one after the other; the
 * recent rows, unchanged, follow them. At least one block must be sealed, and n be allowed by
 * max_blocks. */
void kvq_ring_repeat(kvq_ring *ring, int n);

static inline uint8_t *kvq_ring_block(const kvq_ring *ring, int head, int side, int block) {
    const kvq_track *const track = &ring->track[side][head];
    return ring->sealed[side] + (size_t)ring->max_blocks * track->bytes_before +
           (size_t)block * track->block_bytes;
}
static inline uint16_t *kvq_ring_recent(const kvq_ring *ring, int head, int side, int i) {
    const size_t row = (size_t)head * (size_t)ring->recent_rows + (size_t)(i % ring->recent_rows);
    return ring->recent[side] + row * (size_t)ring->d;
}
static inline uint16_t *kvq_ring_sink(const kvq_ring *ring, int head, int side, int token) {
    const size_t row = (size_t)head * (size_t)ring->sinks + (size_t)token;
    return ring->sink[side] + row * (size_t)ring->d;
}

#endif
