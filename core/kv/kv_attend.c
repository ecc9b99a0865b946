/* kv_attend.c: attention over `sinks | sealed blocks | recent rows | new tokens`.
 *
 * Each query's softmax is taken in segments of fixed extent: runs of segment_blocks sealed blocks,
 * then one segment of all f16 rows in blocks of 64 aligned to their index. Segments are
 * independent, so threads share a long context; their partial results are merged in order. Neither
 * the number of threads nor the cut of the tokens into passes changes the order of any sum.
 */
#include "kv/kv_attend.h"

#include <math.h>

enum {
    TILE_QUERIES = 32, /* queries that are worked on together, while blocks are near */
    SEGMENT_BLOCKS = 16,
    QUERIES_AT_ONCE = 8, /* of a tile, with several blocks */
    SCORES_AT_ONCE = KVQ_BLOCKS_AT_ONCE * QUERIES_AT_ONCE * KVQ_BLOCK,
    MOST_SEGMENTS = 32, /* of sealed blocks */
};

_Static_assert(SCORES_AT_ONCE >= KVQ_D_MAX, "prepare puts one vector where scores are");

static int at_least(int a, int b) { return a > b ? a : b; }
static int at_most(int a, int b) { return a < b ? a : b; }

/* What a worker works in. */
typedef struct scratch {
    float *s;            /* scores of a few blocks and queries, or of a tile and a block of rows */
    float *total, *part; /* running results of a tile: of all segments, of one */
    float *on, *turned;  /* factors of the waves for a tile's queries: as they are, and turned to
                            a block for a few queries */
} scratch;

static size_t score_floats(const kvq_attention *a) {
    return (size_t)at_least(SCORES_AT_ONCE, a->tile * a->group * KVQ_BLOCK);
}
static size_t running_floats(const kvq_attention *a) { /* whole lines: threads write neighbours */
    return kvq_round_up((size_t)(a->tile * a->group) * (size_t)(a->d + 2),
                        KVQ_ALIGN / sizeof(float));
}
static size_t wave_floats(const kvq_attention *a) {
    return (size_t)(a->tile * a->group) * KVQ_WAVE_FACTORS;
}
static size_t scratch_floats(const kvq_attention *a) {
    const size_t turned = QUERIES_AT_ONCE * KVQ_WAVE_FACTORS;
    return kvq_round_up(score_floats(a) + 2 * running_floats(a) + wave_floats(a) + turned,
                        KVQ_ALIGN / sizeof(float));
}
static scratch scratch_of(const kvq_attention *a, int worker) {
    scratch parts = {.s = a->worker + (size_t)worker * scratch_floats(a)};
    parts.total = parts.s + score_floats(a);
    parts.part = parts.total + running_floats(a);
    parts.on = parts.part + running_floats(a);
    parts.turned = parts.on + wave_floats(a);
    return parts;
}

void kvq_attention_lay_out(kvq_attention *a, kvq_arena *arena, const kvq_ring *ring, int n_heads,
                           int d_head, int n_batch, int n_threads) {
    a->n_heads = n_heads;
    a->n_kv_heads = ring->n_heads;
    a->group = n_heads / ring->n_heads;
    a->d_head = d_head;
    a->d = ring->d;
    a->n_batch = n_batch;
    a->tile = at_most(at_least(TILE_QUERIES / a->group, 1), n_batch);
    a->segment_blocks =
        at_least(SEGMENT_BLOCKS, (ring->max_blocks + MOST_SEGMENTS - 1) / MOST_SEGMENTS);
    /* Room for the most that any shorter context has, so that scratch grows with the context. */
    a->max_segments =
        at_most((ring->max_blocks + SEGMENT_BLOCKS - 1) / SEGMENT_BLOCKS, MOST_SEGMENTS) + 1;

    const size_t d = (size_t)a->d, kv_heads = (size_t)a->n_kv_heads, batch = (size_t)n_batch;
    const size_t queries = (size_t)n_heads * batch;
    a->q = kvq_arena_take(arena, queries * d * sizeof *a->q);
    a->q16 = kvq_arena_take(arena, queries * (size_t)kvq_x16_stride(a->d) * sizeof *a->q16);
    a->q_unit = kvq_arena_take(arena, queries * sizeof *a->q_unit);
    a->sink_score = kvq_arena_take(arena, queries * sizeof *a->sink_score);
    for (int side = 0; side < KVQ_SIDES; side++) {
        a->rows[side] = kvq_arena_take(arena, kv_heads * batch * d * sizeof *a->rows[side]);
    }
    a->partial = kvq_arena_take(arena, kv_heads * (size_t)a->max_segments * running_floats(a) *
                                           sizeof *a->partial);
    a->parts_left = kvq_arena_take(arena, kv_heads * sizeof *a->parts_left);
    const size_t blocks = a->top_blocks ? kv_heads * (size_t)ring->max_blocks : 0;
    a->estimate = kvq_arena_take(arena, 2 * blocks * sizeof *a->estimate);
    a->chosen = kvq_arena_take(arena, blocks * sizeof *a->chosen);
    a->worker = kvq_arena_take(arena, (size_t)n_threads * scratch_floats(a) * sizeof *a->worker);
}

/* What the tasks of one call share. */
typedef struct call {
    kvq_attention *a;
    kvq_ring *ring;
    float *out;
    const float *q, *k, *v;
    int n;         /* new tokens; the first has position ring->n */
    int n_blocks;  /* sealed blocks that are read, per KV head */
    bool selected; /* whether they are those in a->chosen, or else all */
    int segments;  /* of this call: those of sealed blocks, and one of rows */
} call;

/* ---- into the basis ---------------------------------------------------------------------- */

static size_t query_index(const kvq_attention *a, int kv_head, int t) {
    return ((size_t)kv_head * (size_t)a->n_batch + (size_t)t) * (size_t)a->group;
}

static uint16_t *new_row(const kvq_attention *a, int side, int kv_head, int t) {
    const size_t row = (size_t)kv_head * (size_t)a->n_batch + (size_t)t;
    return a->rows[side] + row * (size_t)a->d;
}

/* Of each of the n queries from index i on, the largest score with a sink, of the first KVQ_BLOCK;
 * -inf without one. */
static void score_sinks(const call *c, int kv_head, size_t i, int n, float *s) {
    kvq_attention *const a = c->a;
    const int sinks = at_most(at_most(c->ring->sinks, c->ring->n), KVQ_BLOCK);
    const kvq_query query = {.x = a->q + i * (size_t)a->d, .n = n};
    const uint16_t *const rows = kvq_ring_sink(c->ring, kv_head, KVQ_KEYS, 0);
    if (sinks) kvq_run_score_rows(a->isa, s, &query, rows, sinks, a->d);
    for (int j = 0; j < n; j++) {
        a->sink_score[i + (size_t)j] = -INFINITY;
        for (int t = 0; t < sinks; t++) {
            a->sink_score[i + (size_t)j] =
                fmaxf(a->sink_score[i + (size_t)j], s[j * KVQ_BLOCK + t]);
        }
    }
}

/* One new token's queries, key and value at one KV head, padded and mapped into the basis of the
 * cache. */
static void prepare(void *context, int task, int worker) {
    const call *const c = context;
    kvq_attention *const a = c->a;
    const int d = a->d, d_head = a->d_head, group = a->group;
    const int t = task / a->n_kv_heads, kv_head = task % a->n_kv_heads;
    const size_t i = query_index(a, kv_head, t);
    const kvq_track *const keys = &c->ring->track[KVQ_KEYS][kv_head];
    const float factor = KVQ_LOG2_E / sqrtf((float)d_head);
    float *const s = scratch_of(a, worker).s; /* for one padded vector, too */
    for (int h = 0; h < group; h++) {
        const size_t head = (size_t)t * (size_t)a->n_heads + (size_t)(kv_head * group + h);
        const float *const x = c->q + head * (size_t)d_head;
        float *const y = a->q + (i + (size_t)h) * (size_t)d;
        for (int j = 0; j < d; j++) y[j] = j < d_head ? x[j] * factor : 0.0f;
    }
    kvq_basis_query(&keys->basis, a->isa, a->q + i * (size_t)d, group, d);
    if (kvq_codec_reads_x16(keys->codec)) {
        kvq_query_round(a->q16 + i * (size_t)kvq_x16_stride(d), a->q_unit + i, a->q + i * (size_t)d,
                        group, d);
    }
    for (int h = 0; h < group; h += QUERIES_AT_ONCE) {
        score_sinks(c, kv_head, i + (size_t)h, at_most(QUERIES_AT_ONCE, group - h), s);
    }
    for (int side = 0; side < KVQ_SIDES; side++) {
        const size_t head = (size_t)t * (size_t)a->n_kv_heads + (size_t)kv_head;
        const float *const x = (side == KVQ_KEYS ? c->k : c->v) + head * (size_t)d_head;
        uint16_t *const row = new_row(a, side, kv_head, t);
        for (int j = 0; j < d; j++) s[j] = j < d_head ? x[j] : 0.0f;
        kvq_basis_store(&c->ring->track[side][kv_head].basis, a->isa, s, 1, d);
        for (int j = 0; j < d; j++) row[j] = kvq_f32_to_f16(s[j]);
    }
}

/* ---- softmax over a segment -------------------------------------------------------------- */

/* The running result of n queries: o[i][d] is the sum of weight * value, sum[i] that of the
 * weights, both relative to 2^largest[i]. */
typedef struct running {
    float *o, *largest, *sum;
} running;

static running running_at(float *memory, int n, int d) { /* n * (d + 2) floats */
    return (running){memory, memory + (size_t)n * (size_t)d, memory + (size_t)n * (size_t)(d + 1)};
}

/* Those of the queries from the first on. */
static running running_from(running r, int first, int d) {
    return (running){r.o + (size_t)first * (size_t)d, r.largest + first, r.sum + first};
}

static void running_clear(running r, int n, int d) {
    for (size_t i = 0; i < (size_t)n * (size_t)d; i++) r.o[i] = 0;
    for (int i = 0; i < n; i++) {
        r.largest[i] = -INFINITY;
        r.sum[i] = 0;
    }
}

static void rescale(running r, int i, int d, float factor) {
    if (factor == 1.0f) return;
    r.sum[i] *= factor;
    for (int c = 0; c < d; c++) r.o[(size_t)i * (size_t)d + (size_t)c] *= factor;
}

/* Turns the scores s[n_blocks][n][KVQ_BLOCK] of n <= QUERIES_AT_ONCE queries into weights and makes
 * room for them in the running result. */
static void weigh(const kvq_isa *isa, running r, float *s, int n, int n_blocks, int d) {
    float before[QUERIES_AT_ONCE], sum[QUERIES_AT_ONCE];
    for (int i = 0; i < n; i++) before[i] = r.largest[i];
    isa->softmax(s, r.largest, sum, n, n_blocks);
    for (int i = 0; i < n; i++) {
        if (r.largest[i] > before[i]) rescale(r, i, d, exp2f(before[i] - r.largest[i]));
        r.sum[i] += sum[i];
    }
}

static void merge(running into, running from, int n, int d) {
    for (int i = 0; i < n; i++) {
        const float largest = fmaxf(into.largest[i], from.largest[i]);
        if (largest == -INFINITY) continue;
        rescale(into, i, d, exp2f(into.largest[i] - largest));
        const float factor = exp2f(from.largest[i] - largest);
        into.largest[i] = largest;
        into.sum[i] += factor * from.sum[i];
        for (int c = 0; c < d; c++) {
            const size_t j = (size_t)i * (size_t)d + (size_t)c;
            into.o[j] += factor * from.o[j];
        }
    }
}

/* Scores, weighs and sums one block of f16 rows: positions first .. stop - 1, of which those below
 * ring->n are held by the ring from `held_rows` on and the others are new. The queries of token t
 * see positions up to ring->n + t. */
static void attend_rows(const call *c, running r, float *s, const kvq_query *query, int kv_head,
                        int tile_first, int first, int stop, uint16_t *const held_rows[KVQ_SIDES]) {
    const kvq_attention *const a = c->a;
    const int held = c->ring->n, d = a->d;
    const int n_held = at_least(at_most(stop, held) - first, 0), n_new = stop - first - n_held;
    const uint16_t *new_rows[KVQ_SIDES] = {NULL, NULL};
    for (int side = 0; side < KVQ_SIDES && n_new; side++) {
        new_rows[side] = new_row(a, side, kv_head, stop - n_new - held);
    }
    if (n_held) kvq_run_score_rows(a->isa, s, query, held_rows[KVQ_KEYS], n_held, d);
    if (n_new) kvq_run_score_rows(a->isa, s + n_held, query, new_rows[KVQ_KEYS], n_new, d);
    for (int i = 0; i < query->n; i++) {
        const int seen = held + tile_first + i / a->group - first + 1;
        for (int t = at_most(at_least(seen, 0), stop - first); t < KVQ_BLOCK; t++) {
            s[i * KVQ_BLOCK + t] = -INFINITY;
        }
    }
    for (int i = 0; i < query->n; i += QUERIES_AT_ONCE) {
        const int few = at_most(QUERIES_AT_ONCE, query->n - i);
        weigh(a->isa, running_from(r, i, d), s + i * KVQ_BLOCK, few, 1, d);
    }
    if (n_held) kvq_run_accum_rows(a->isa, r.o, s, query->n, held_rows[KVQ_VALUES], n_held, d);
    if (n_new)
        kvq_run_accum_rows(a->isa, r.o, s + n_held, query->n, new_rows[KVQ_VALUES], n_new, d);
}

/* The last segment: all rows in f16 that the tile's tokens may see, the sinks and then those that
 * follow the sealed blocks. Blocks of 64 start at multiples of 64 counted from the first token of
 * either kind, so that they never depend on where a pass begins. */
static void attend_row_segment(const call *c, running r, float *s, const kvq_query *query,
                               int kv_head, int tile_first, int tile_end) {
    const kvq_ring *const ring = c->ring;
    const int end = ring->n + tile_end, sinks_end = at_most(ring->sinks, end);
    uint16_t *held[KVQ_SIDES];
    for (int first = 0, stop; first < sinks_end; first = stop) {
        stop = at_most(first + KVQ_BLOCK, sinks_end);
        for (int side = 0; side < KVQ_SIDES; side++) {
            held[side] = kvq_ring_sink(ring, kv_head, side, first);
        }
        attend_rows(c, r, s, query, kv_head, tile_first, first, stop, held);
    }
    for (int first = ring->sinks + ring->n_sealed * KVQ_BLOCK, stop; first < end; first = stop) {
        stop = at_most(first + KVQ_BLOCK, end);
        for (int side = 0; side < KVQ_SIDES; side++) {
            held[side] = kvq_ring_recent(ring, kv_head, side, first - ring->sinks);
        }
        attend_rows(c, r, s, query, kv_head, tile_first, first, stop, held);
    }
}

/* Gives back to the scores of a block what sealing took from its keys (kv_wave.h). */
static void add_waves(const kvq_attention *a, const kvq_ring *ring, const kvq_wave *wave, float *s,
                      const float *on, float *turned, int n, int block) {
    const float *waves[KVQ_WAVE_FACTORS];
    kvq_wave_turn(turned, on, n, wave, ring->turns, block);
    for (int j = 0; j < 2 * wave->n; j++) {
        waves[j] = kvq_wave_of_factor(ring->turns, wave, j);
    }
    kvq_run_add_waves(a->isa, s, turned, n, waves, 2 * wave->n);
}

/* Which block is the i-th that is read of a KV head. */
static int block_at(const call *c, int kv_head, int i) {
    return c->selected ? c->a->chosen[(size_t)kv_head * (size_t)c->ring->max_blocks + (size_t)i]
                       : i;
}

/* The n blocks of a side from that read i-th on, and those behind them. */
static kvq_blocks blocks_at(const call *c, int kv_head, int side, int i, int n) {
    kvq_blocks blocks = {.n = n};
    for (int j = 0; j < n; j++) {
        const int next = i + n + j;
        blocks.at[j] = kvq_ring_block(c->ring, kv_head, side, block_at(c, kv_head, i + j));
        if (next < c->n_blocks) {
            blocks.ahead[j] = kvq_ring_block(c->ring, kv_head, side, block_at(c, kv_head, next));
        }
    }
    return blocks;
}

/* A few queries of a tile, and the n blocks from that read i-th on. */
static void attend_blocks(const call *c, running r, const scratch *m, const kvq_query *query,
                          const float *on, int kv_head, int i, int n) {
    const kvq_attention *const a = c->a;
    const kvq_track *const keys = &c->ring->track[KVQ_KEYS][kv_head];
    const kvq_track *const values = &c->ring->track[KVQ_VALUES][kv_head];
    const kvq_blocks key_blocks = blocks_at(c, kv_head, KVQ_KEYS, i, n);
    const kvq_blocks value_blocks = blocks_at(c, kv_head, KVQ_VALUES, i, n);
    const kvq_weights weights = {.p = m->s, .sum = r.sum, .n = query->n};
    kvq_run_score(a->isa, keys->codec, m->s, query, &key_blocks, &keys->shape);
    for (int j = 0; j < n && keys->wave.n; j++) {
        add_waves(a, c->ring, &keys->wave, m->s + j * query->n * KVQ_BLOCK, on, m->turned, query->n,
                  block_at(c, kv_head, i + j));
    }
    weigh(a->isa, r, m->s, query->n, n, a->d);
    kvq_run_accum(a->isa, values->codec, r.o, &weights, &value_blocks, &values->shape);
}

static void attend_segment(const call *c, running r, const scratch *m, const kvq_query *query,
                           int kv_head, int segment, int tile_first, int tile_end) {
    const kvq_attention *const a = c->a;
    const int d = a->d;
    running_clear(r, query->n, d);
    if (segment == c->segments - 1) {
        attend_row_segment(c, r, m->s, query, kv_head, tile_first, tile_end);
        return;
    }
    /* Weights are relative to the largest score with a sink until there is a larger one, which is
     * seldom: most models attend to their sinks most. Any reference gives the same result. */
    const float *const sink_score = a->sink_score + query_index(a, kv_head, tile_first);
    memcpy(r.largest, sink_score, (size_t)query->n * sizeof *r.largest);
    const kvq_wave *const wave = &c->ring->track[KVQ_KEYS][kv_head].wave;
    for (int i = 0; i < query->n && wave->n; i++) {
        kvq_wave_project(m->on + i * KVQ_WAVE_FACTORS, wave, query->x + (size_t)i * (size_t)d, d);
    }
    const int stop = at_most((segment + 1) * a->segment_blocks, c->n_blocks);
    for (int i = segment * a->segment_blocks; i < stop; i += KVQ_BLOCKS_AT_ONCE) {
        for (int first = 0; first < query->n; first += QUERIES_AT_ONCE) {
            const int n = at_most(QUERIES_AT_ONCE, query->n - first);
            const kvq_query few = kvq_query_from(query, first, n, d);
            attend_blocks(c, running_from(r, first, d), m, &few, m->on + first * KVQ_WAVE_FACTORS,
                          kv_head, i, at_most(KVQ_BLOCKS_AT_ONCE, stop - i));
        }
    }
}

/* ---- tasks ------------------------------------------------------------------------------- */

static kvq_query query_of(const kvq_attention *a, int kv_head, int first, int end) {
    const size_t i = query_index(a, kv_head, first);
    return (kvq_query){.x = a->q + i * (size_t)a->d,
                       .x16 = a->q16 + i * (size_t)kvq_x16_stride(a->d),
                       .unit = a->q_unit + i,
                       .n = (end - first) * a->group};
}

/* ---- selection of blocks ----------------------------------------------------------------- */

/* The k-th largest of x[n], which is left in another order (Hoare's quickselect). */
static float kth_largest(float *x, int n, int k) {
    int first = 0, last = n - 1;
    while (first < last) {
        const float pivot = x[first + (last - first) / 2];
        int i = first, j = last;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i > j) break;
            const float swapped = x[i];
            x[i++] = x[j];
            x[j--] = swapped;
        }
        if (k <= j)
            last = j;
        else if (k >= i)
            first = i;
        else
            break;
    }
    return x[k];
}

/* Chooses, for one KV head, the blocks whose mean key scores highest with any query of its group:
 * in a calibrated basis the residuals around the mean vary alike in all blocks, so the mean, with
 * what the waves add to it, tells blocks apart (landmarks of chunks: ShadowKV, arXiv 2410.21465;
 * with SVDq: arXiv 2502.15304). Costs d products per block and query, 1 / 64 of the scores. */
static void choose_blocks(void *context, int kv_head, int worker) {
    const call *const c = context;
    const kvq_attention *const a = c->a;
    const kvq_ring *const ring = c->ring;
    const kvq_track *const track = &ring->track[KVQ_KEYS][kv_head];
    const size_t at = (size_t)kv_head * (size_t)ring->max_blocks;
    const size_t mean_at = kvq_codec_mean_at(track->codec, &track->shape);
    const kvq_query query = query_of(a, kv_head, 0, 1);
    float *const estimate = a->estimate + 2 * at, *const sorted = estimate + ring->max_blocks;
    int *const chosen = a->chosen + at;
    const kvq_wave *const wave = &track->wave;
    float *const on = scratch_of(a, worker).on;
    float wave_mean[KVQ_WAVE_FACTORS], turned[KVQ_WAVE_FACTORS];
    int n = 0;
    for (int j = 0; j < 2 * wave->n; j++) {
        const float *const within = kvq_wave_of_factor(ring->turns, wave, j);
        wave_mean[j] = 0;
        for (int t = 0; t < KVQ_BLOCK; t++) wave_mean[j] += within[t] * (1.0f / KVQ_BLOCK);
    }
    for (int i = 0; i < query.n; i++) {
        kvq_wave_project(on + i * KVQ_WAVE_FACTORS, wave, query.x + (size_t)i * (size_t)a->d, a->d);
    }
    for (int b = 0; b < ring->n_sealed; b++) {
        const uint8_t *const block = kvq_ring_block(ring, kv_head, KVQ_KEYS, b);
        const int8_t *const mean = (const int8_t *)block + mean_at;
        float most = -INFINITY;
        for (int i = 0; i < query.n; i++) {
            float sum = 0;
            for (int j = 0; j < a->d; j++) sum += query.x[i * a->d + j] * (float)mean[j];
            sum *= kvq_load_f16(block);
            kvq_wave_turn(turned, on + i * KVQ_WAVE_FACTORS, 1, wave, ring->turns, b);
            for (int j = 0; j < 2 * wave->n; j++) sum += turned[j] * wave_mean[j];
            most = fmaxf(most, sum);
        }
        sorted[b] = estimate[b] = most;
    }
    const float least = kth_largest(sorted, ring->n_sealed, c->n_blocks - 1);
    for (int b = 0; b < ring->n_sealed && n < c->n_blocks; b++) {
        if (estimate[b] > least) chosen[n++] = b;
    }
    for (int b = 0; b < ring->n_sealed && n < c->n_blocks; b++) { /* ties: the oldest first */
        if (!(estimate[b] > least) && !(estimate[b] < least)) chosen[n++] = b;
    }
    for (int b = 0; n < c->n_blocks; b++) chosen[n++] = b; /* estimates that are no numbers */
}

/* ---- one tile, or one segment ------------------------------------------------------------- */

/* Divides by the sum of weights, leaves the basis, writes the heads of the tile's tokens. */
static void finish(const call *c, running r, int kv_head, int first, int end) {
    const kvq_attention *const a = c->a;
    const int d = a->d, d_head = a->d_head;
    const int n = (end - first) * a->group;
    for (int i = 0; i < n; i++) {
        const float over_sum = 1.0f / r.sum[i];
        for (int j = 0; j < d; j++) r.o[(size_t)i * (size_t)d + (size_t)j] *= over_sum;
    }
    kvq_basis_restore(&c->ring->track[KVQ_VALUES][kv_head].basis, a->isa, r.o, n, d);
    for (int i = 0; i < n; i++) {
        const float *const o = r.o + (size_t)i * (size_t)d;
        const size_t t = (size_t)(first + i / a->group);
        const size_t h = (size_t)(kv_head * a->group + i % a->group);
        memcpy(c->out + (t * (size_t)a->n_heads + h) * (size_t)d_head, o,
               (size_t)d_head * sizeof *o);
    }
}

/* A prompt has tiles enough for all threads: a task is one tile of one KV head, segment after
 * segment. */
static void attend_tile(void *context, int task, int worker) {
    const call *const c = context;
    const kvq_attention *const a = c->a;
    const int kv_head = task % a->n_kv_heads, first = task / a->n_kv_heads * a->tile;
    const int end = at_most(first + a->tile, c->n);
    const kvq_query query = query_of(a, kv_head, first, end);
    const scratch m = scratch_of(a, worker);
    const running total = running_at(m.total, query.n, a->d);
    const running part = running_at(m.part, query.n, a->d);
    running_clear(total, query.n, a->d);
    for (int segment = 0; segment < c->segments; segment++) {
        attend_segment(c, part, &m, &query, kv_head, segment, first, end);
        merge(total, part, query.n, a->d);
    }
    finish(c, total, kv_head, first, end);
}

/* A single tile is spread over segments instead: a task is one segment of one KV head, and the one
 * that is done last merges them. */
static running partial_of(const call *c, int kv_head, int segment, int n) {
    const kvq_attention *const a = c->a;
    const size_t i = (size_t)kv_head * (size_t)a->max_segments + (size_t)segment;
    return running_at(a->partial + i * running_floats(a), n, a->d);
}

static void merge_parts(const call *c, int kv_head, running total, int n) {
    running_clear(total, n, c->a->d);
    for (int segment = 0; segment < c->segments; segment++) {
        merge(total, partial_of(c, kv_head, segment, n), n, c->a->d);
    }
}

static void attend_part(void *context, int task, int worker) {
    const call *const c = context;
    const kvq_attention *const a = c->a;
    const int kv_head = task / c->segments, segment = task % c->segments;
    const kvq_query query = query_of(a, kv_head, 0, c->n);
    const scratch m = scratch_of(a, worker);
    attend_segment(c, partial_of(c, kv_head, segment, query.n), &m, &query, kv_head, segment, 0,
                   c->n);
    if (atomic_fetch_sub(&a->parts_left[kv_head], 1) > 1) return;
    const running total = running_at(m.total, query.n, a->d);
    merge_parts(c, kv_head, total, query.n);
    finish(c, total, kv_head, 0, c->n);
}

static void append_side(void *context, int task, int worker) {
    const call *const c = context;
    const int kv_head = task / KVQ_SIDES, side = task % KVQ_SIDES;
    (void)worker;
    kvq_ring_append(c->ring, kv_head, side, new_row(c->a, side, kv_head, 0), c->n);
}

void kvq_attend(kvq_attention *a, kvq_ring *ring, float *out, const float *q, const float *k,
                const float *v, int n) {
    call c = {.a = a, .ring = ring, .out = out, .q = q, .k = k, .v = v, .n = n};
    kvq_pool_run(a->pool, n * a->n_kv_heads, prepare, &c);
    c.selected = n == 1 && a->top_blocks && a->top_blocks < ring->n_sealed;
    c.n_blocks = c.selected ? a->top_blocks : ring->n_sealed;
    c.segments = (c.n_blocks + a->segment_blocks - 1) / a->segment_blocks + 1;
    if (c.selected) kvq_pool_run(a->pool, a->n_kv_heads, choose_blocks, &c);
    if (n <= a->tile) {
        for (int h = 0; h < a->n_kv_heads; h++) atomic_store(&a->parts_left[h], c.segments);
        kvq_pool_run(a->pool, a->n_kv_heads * c.segments, attend_part, &c);
    } else {
        const int tiles = (n + a->tile - 1) / a->tile;
        kvq_pool_run(a->pool, tiles * a->n_kv_heads, attend_tile, &c);
    }
    kvq_clock_end(a->clock, KVQ_STAGE_ATTENTION);
    if (kvq_ring_until_seal(ring) <= n) {
        kvq_pool_run(a->pool, a->n_kv_heads * KVQ_SIDES, append_side, &c);
    } else { /* a few copies: not worth a call to the threads */
        for (int task = 0; task < a->n_kv_heads * KVQ_SIDES; task++) append_side(&c, task, 0);
    }
    kvq_ring_advance(ring, n);
    kvq_clock_end(a->clock, KVQ_STAGE_APPEND);
}
