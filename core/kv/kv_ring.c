/* kv_ring.c: the ring of one layer: append, seal, truncate. */
#include "kv/kv_ring.h"

static int smaller(int a, int b) { return a < b ? a : b; }

/* Takes a part and adds what it really occupies to *count. */
static void *take(kvq_arena *arena, size_t *count, size_t bytes) {
    const size_t before = arena->used;
    void *const part = kvq_arena_take(arena, bytes);
    *count += arena->used - before;
    return part;
}

void kvq_ring_lay_out(kvq_ring *ring, kvq_arena *arena, kvq_ring_bytes *bytes,
                      const kvq_track *tracks, const kvq_turns *turns, int n_heads, int d_head,
                      int sinks, int window, int n_ctx) {
    const int d = kvq_padded_width(d_head);
    sinks = sinks < n_ctx ? sinks : n_ctx; /* no more rows than there can be tokens */
    const int after_sinks = n_ctx - sinks, most_recent = smaller(window, after_sinks) + KVQ_BLOCK;
    *ring = (kvq_ring){
        .track = {tracks, tracks + n_heads},
        .turns = turns,
        .n_heads = n_heads,
        .d = d,
        .sinks = sinks,
        .window = window,
        .max_blocks = after_sinks > window ? (after_sinks - window) / KVQ_BLOCK : 0,
        .recent_rows = (int)kvq_round_up((size_t)most_recent, KVQ_BLOCK),
    };
    const size_t heads = (size_t)n_heads, row = (size_t)d * 2;
    for (int side = 0; side < KVQ_SIDES; side++) {
        const kvq_track *const last = &ring->track[side][n_heads - 1];
        ring->sink[side] = take(arena, &bytes->sinks, heads * (size_t)sinks * row);
        ring->recent[side] = take(arena, &bytes->recent, heads * (size_t)ring->recent_rows * row);
        ring->sealed[side] =
            take(arena, &bytes->sealed[side],
                 (size_t)ring->max_blocks * (last->bytes_before + last->block_bytes));
    }
}

/* Whether a block is sealed once the row of index i is in. */
static bool seals(const kvq_ring *ring, int i, int n_sealed) {
    return i + 1 - n_sealed * KVQ_BLOCK >= ring->window + KVQ_BLOCK;
}

/* recent_rows is a multiple of the block, so a block's rows lie side by side. */
static void seal(const kvq_ring *ring, int head, int side, int block) {
    const kvq_track *const track = &ring->track[side][head];
    const uint16_t *rows = kvq_ring_recent(ring, head, side, block * KVQ_BLOCK);
    uint16_t still[KVQ_BLOCK * KVQ_D_MAX];
    if (track->wave.n) {
        float x[KVQ_BLOCK * KVQ_D_MAX];
        for (int i = 0; i < KVQ_BLOCK * ring->d; i++) x[i] = kvq_f16_to_f32(rows[i]);
        kvq_wave_add(x, &track->wave, ring->turns, block, -1.0f, ring->d);
        for (int i = 0; i < KVQ_BLOCK * ring->d; i++) still[i] = kvq_f32_to_f16(x[i]);
        rows = still;
    }
    kvq_codecs[track->codec].encode(kvq_ring_block(ring, head, side, block), rows, &track->shape);
}

void kvq_ring_append(const kvq_ring *ring, int head, int side, const uint16_t *rows, int n) {
    const size_t row_bytes = (size_t)ring->d * 2;
    int n_sealed = ring->n_sealed;
    for (int t = 0; t < n; t++, rows += ring->d) {
        const int token = ring->n + t, i = token - ring->sinks;
        if (i < 0) {
            memcpy(kvq_ring_sink(ring, head, side, token), rows, row_bytes);
            continue;
        }
        memcpy(kvq_ring_recent(ring, head, side, i), rows, row_bytes);
        if (seals(ring, i, n_sealed)) seal(ring, head, side, n_sealed++);
    }
}

void kvq_ring_advance(kvq_ring *ring, int n) {
    for (int t = 0; t < n; t++) {
        const int i = ring->n++ - ring->sinks;
        if (i >= 0 && seals(ring, i, ring->n_sealed)) ring->n_sealed++;
    }
}

int kvq_ring_sealed_after(const kvq_ring *ring, int n) {
    const int rows = ring->n + n - ring->sinks;
    const int sealed = rows >= ring->window ? (rows - ring->window) / KVQ_BLOCK : 0;
    return sealed > ring->n_sealed ? sealed : ring->n_sealed;
}

void kvq_ring_seal(kvq_ring *ring, int n_sealed) {
    for (; ring->n_sealed < n_sealed; ring->n_sealed++) {
        for (int head = 0; head < ring->n_heads; head++) {
            for (int side = 0; side < KVQ_SIDES; side++) seal(ring, head, side, ring->n_sealed);
        }
    }
}

int kvq_ring_until_seal(const kvq_ring *ring) {
    const int next_seal = ring->sinks + ring->n_sealed * KVQ_BLOCK + ring->window + KVQ_BLOCK;
    return next_seal > ring->n ? next_seal - ring->n : 1;
}

/* Moves the recent rows of one head and side to the slots of n blocks later. */
static void move_recent(const kvq_ring *ring, int head, int side, int n) {
    const size_t block = (size_t)KVQ_BLOCK * (size_t)ring->d; /* numbers */
    const int slots = ring->recent_rows / KVQ_BLOCK;
    uint16_t *const rows = ring->recent[side] + (size_t)head * (size_t)slots * block;
    uint16_t *const last = rows + (size_t)(slots - 1) * block;
    uint16_t held[KVQ_BLOCK * KVQ_D_MAX];
    for (int i = 0; i < n % slots; i++) {
        memcpy(held, last, block * sizeof *held);
        memmove(rows + block, rows, (size_t)(last - rows) * sizeof *rows);
        memcpy(rows, held, block * sizeof *held);
    }
}

void kvq_ring_repeat(kvq_ring *ring, int n) {
    for (int head = 0; head < ring->n_heads; head++) {
        for (int side = 0; side < KVQ_SIDES; side++) {
            for (int b = 0; b < n; b++) {
                memcpy(kvq_ring_block(ring, head, side, ring->n_sealed + b),
                       kvq_ring_block(ring, head, side, b % ring->n_sealed),
                       ring->track[side][head].block_bytes);
            }
            move_recent(ring, head, side, n);
        }
    }
    ring->n_sealed += n;
    ring->n += n * KVQ_BLOCK;
}

void kvq_ring_decode(const kvq_ring *ring, int head, int side, int block, const uint8_t *bytes,
                     uint16_t *rows) {
    const kvq_track *const track = &ring->track[side][head];
    float x[KVQ_BLOCK * KVQ_D_MAX];
    kvq_codecs[track->codec].decode(x, bytes, &track->shape);
    if (track->wave.n) kvq_wave_add(x, &track->wave, ring->turns, block, 1.0f, ring->d);
    for (int i = 0; i < KVQ_BLOCK * ring->d; i++) rows[i] = kvq_f32_to_f16(x[i]);
}

static void unseal(const kvq_ring *ring, int block) {
    for (int head = 0; head < ring->n_heads; head++) {
        for (int side = 0; side < KVQ_SIDES; side++) {
            kvq_ring_decode(ring, head, side, block, kvq_ring_block(ring, head, side, block),
                            kvq_ring_recent(ring, head, side, block * KVQ_BLOCK));
        }
    }
}

void kvq_ring_truncate(kvq_ring *ring, int n) {
    if (n >= ring->n) return;
    const int rows = n > ring->sinks ? n - ring->sinks : 0, whole = rows / KVQ_BLOCK;
    if (whole < ring->n_sealed) {
        if (rows % KVQ_BLOCK) unseal(ring, whole);
        ring->n_sealed = whole;
    }
    ring->n = n;
}
