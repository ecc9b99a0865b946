/* attend_case.c: see attend_case.h. */
#include "attend_case.h"

#include <math.h>
#include <stdlib.h>

#include "cuda/cuda_layout.h"
#include "kv/kv_attend.h"

enum { MOST_OWNED = 512, N_PAIRS = 12 };

typedef struct owned {
    void *list[MOST_OWNED];
    int n;
} owned;

static void *own(owned *o, size_t bytes) {
    void *const p = calloc(1, bytes ? bytes : 1);
    if (!p || o->n == MOST_OWNED) abort();
    return o->list[o->n++] = p;
}

static void *copy(owned *o, const void *from, size_t bytes) {
    return memcpy(own(o, bytes), from, bytes);
}

/* About normal numbers: sums of 12 uniform ones (multiplier: Knuth, MMIX). */
static uint64_t state;
static float normal(void) {
    float sum = -6;
    for (int i = 0; i < 12; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        sum += (float)(state >> 40) * 0x1p-24f;
    }
    return sum;
}

static float *normals(owned *o, size_t n, float size) {
    float *const x = own(o, n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = size * normal();
    return x;
}

static size_t block_bytes(kvq_codec_id id, const kvq_kv_shape *sh) {
    return kvq_codecs[id].bytes(sh);
}

/* Runs of mixed: those asked for, or something of every width, and channels without bits. */
static void set_runs(kvq_kv_shape *sh, const int *runs) {
    const int of_each[KVQ_RUNS] = {4, 12, sh->d / 4, sh->d / 4};
    memcpy(sh->run, runs ? runs : of_each, sizeof sh->run);
}

static void make_tracks(kvq_track *tracks, owned *o, const attend_options *opt, int d) {
    size_t before[KVQ_SIDES] = {0, 0};
    for (int i = 0; i < KVQ_SIDES * opt->n_heads; i++) {
        const int side = i / opt->n_heads;
        kvq_track *const track = &tracks[i];
        *track = (kvq_track){.codec = side == KVQ_KEYS ? opt->keys : opt->values,
                             .shape = kvq_plain_shape(d),
                             .basis = {.kind = KVQ_BASIS_hadamard}};
        if (opt->channel_group) track->shape.group = opt->channel_group;
        if (track->codec == KVQ_CODEC_mixed) set_runs(&track->shape, opt->runs);
        if (side == KVQ_KEYS && opt->n_waves) {
            uint16_t *const pair = own(o, (size_t)opt->n_waves * sizeof *pair);
            for (int j = 0; j < opt->n_waves; j++) pair[j] = (uint16_t)((j * 5 + i) % N_PAIRS);
            track->wave = (kvq_wave){.n = opt->n_waves,
                                     .pair = pair,
                                     .u = normals(o, (size_t)(opt->n_waves * d), 0.3f),
                                     .w = normals(o, (size_t)(opt->n_waves * d), 0.3f)};
        }
        track->block_bytes = block_bytes(track->codec, &track->shape);
        track->bytes_before = before[side];
        before[side] += track->block_bytes;
    }
}

static kvq_turns *make_turns(owned *o, int sinks, int max_blocks) {
    kvq_turns *const turns = own(o, sizeof *turns);
    turns->n_pairs = N_PAIRS;
    turns->within = own(o, N_PAIRS * 2 * KVQ_BLOCK * sizeof(float));
    turns->first = own(o, (size_t)(max_blocks + 1) * N_PAIRS * 2 * sizeof(float));
    for (int i = 0; i < N_PAIRS; i++) {
        const double speed = 1 / (1 + 0.7 * i);
        for (int t = 0; t < KVQ_BLOCK; t++) {
            turns->within[i * 2 * KVQ_BLOCK + t] = (float)cos(speed * t);
            turns->within[(i * 2 + 1) * KVQ_BLOCK + t] = (float)sin(speed * t);
        }
        for (int b = 0; b < max_blocks; b++) {
            turns->first[(b * N_PAIRS + i) * 2] = (float)cos(speed * (sinks + b * KVQ_BLOCK));
            turns->first[(b * N_PAIRS + i) * 2 + 1] = (float)sin(speed * (sinks + b * KVQ_BLOCK));
        }
    }
    return turns;
}

/* Sealed blocks in chunks, as the device has them; what lies between blocks is never to be read. */
static void copy_sealed(kvq_cuda_cache *cache, owned *o, const kvq_ring *ring, uint64_t bytes) {
    const int n_chunks = (ring->n_sealed + cache->chunk_blocks - 1) / cache->chunk_blocks;
    uint8_t **const chunks = own(o, (size_t)n_chunks * sizeof *chunks);
    cache->chunks = chunks;
    for (int i = 0; i < n_chunks; i++) {
        chunks[i] = own(o, (size_t)cache->chunk_blocks * bytes);
        memset(chunks[i], 0xa5, (size_t)cache->chunk_blocks * bytes);
    }
    for (int b = 0; b < ring->n_sealed; b++) {
        for (int i = 0; i < KVQ_SIDES * ring->n_heads; i++) {
            const kvq_cuda_track *const track = &cache->tracks[i];
            uint8_t *const to = chunks[b / cache->chunk_blocks] +
                                (size_t)cache->chunk_blocks * track->bytes_before +
                                (size_t)(b % cache->chunk_blocks) * track->stride + track->lead;
            memcpy(to, kvq_ring_block(ring, i % ring->n_heads, i / ring->n_heads, b),
                   ring->track[i / ring->n_heads][i % ring->n_heads].block_bytes);
        }
    }
}

static void attend(attend_case *c, owned *o, kvq_attention *a, kvq_ring *ring, int n) {
    const size_t q = (size_t)(n * a->n_heads * a->d_head);
    const size_t kv = (size_t)(n * a->n_kv_heads * a->d_head);
    c->expected = own(o, q * sizeof *c->expected);
    /* some keys are much larger than others, so that weights are not all alike */
    kvq_attend(a, ring, c->expected, normals(o, q, 1.5f), normals(o, kv, 1.0f),
               normals(o, kv, 1.0f), n);
}

attend_case *attend_case_open(const attend_options *opt) {
    const int d = kvq_padded_width(opt->d_head), n_ctx = opt->held + opt->n;
    const int most = opt->n > 64 ? opt->n : 64;
    if (d % kvq_codecs[opt->keys].d_multiple || d % kvq_codecs[opt->values].d_multiple) return NULL;
    owned *const o = calloc(1, sizeof *o);
    attend_case *const c = calloc(1, sizeof *c);
    if (!o || !c) abort();
    c->owned = o;
    state = (uint64_t)(opt->held * 131 + opt->n * 17 + opt->d_head);

    kvq_track *const tracks = own(o, (size_t)(KVQ_SIDES * opt->n_heads) * sizeof *tracks);
    make_tracks(tracks, o, opt, d);
    kvq_ring ring;
    kvq_ring_bytes bytes = {0};
    kvq_arena arena = {0};
    kvq_turns *const turns = make_turns(o, opt->sinks, n_ctx / KVQ_BLOCK + 1);
    kvq_ring_lay_out(&ring, &arena, &bytes, tracks, turns, opt->n_heads, opt->d_head, opt->sinks,
                     opt->window, n_ctx);
    arena = (kvq_arena){.base = own(o, arena.used)};
    kvq_ring_lay_out(&ring, &arena, &bytes, tracks, turns, opt->n_heads, opt->d_head, opt->sinks,
                     opt->window, n_ctx);

    kvq_attention a = {.isa = &kvq_isa_ref};
    kvq_pool *pool;
    if (kvq_pool_open(&pool, 1, false) != KVQ_OK) abort();
    a.pool = pool;
    arena = (kvq_arena){0};
    kvq_attention_lay_out(&a, &arena, &ring, opt->n_heads * opt->group, opt->d_head, most, 1);
    arena = (kvq_arena){.base = own(o, arena.used)};
    kvq_attention_lay_out(&a, &arena, &ring, opt->n_heads * opt->group, opt->d_head, most, 1);

    for (int done = 0, n; done < opt->held; done += n) {
        n = opt->held - done < 64 ? opt->held - done : 64;
        attend(c, o, &a, &ring, n);
    }

    /* the cache as it is before the pass */
    kvq_cuda_track *const placed = own(o, (size_t)(KVQ_SIDES * opt->n_heads) * sizeof *placed);
    const uint64_t block_of_all =
        kvq_cuda_place_tracks(placed, tracks, (size_t)(KVQ_SIDES * opt->n_heads));
    kvq_cuda_step step = {.n = opt->n, .held = ring.n, .sealed = ring.n_sealed};
    c->cache = (kvq_cuda_cache){
        .step = copy(o, &step, sizeof step),
        .tracks = placed,
        .turns_within = turns->within,
        .turns_first = turns->first,
        .n_pairs = N_PAIRS,
        .chunk_blocks = opt->chunk_blocks,
        .n_heads = opt->n_heads,
        .group = opt->group,
        .d_head = opt->d_head,
        .d = d,
        .n_sinks = ring.sinks,
        .recent_rows = ring.recent_rows,
        .n_batch = most,
    };
    copy_sealed(&c->cache, o, &ring, block_of_all);
    const size_t row = (size_t)d * 2, heads = (size_t)opt->n_heads;
    for (int side = 0; side < KVQ_SIDES; side++) {
        c->cache.sinks[side] = copy(o, ring.sink[side], heads * (size_t)ring.sinks * row);
        c->cache.recent[side] = copy(o, ring.recent[side], heads * (size_t)ring.recent_rows * row);
    }
    attend(c, o, &a, &ring, opt->n);
    for (int side = 0; side < KVQ_SIDES; side++) {
        c->cache.new_rows[side] = copy(o, a.rows[side], heads * (size_t)most * row);
    }
    const size_t n_q = heads * (size_t)(most * opt->group * d);
    c->q = copy(o, a.q, n_q * sizeof *c->q);
    for (size_t i = 0; i < n_q; i++) c->q[i] /= KVQ_LOG2_E; /* scores are exponents of e there */
    kvq_pool_close(pool);
    return c;
}

void attend_case_close(attend_case *c) {
    if (!c) return;
    owned *const o = c->owned;
    for (int i = 0; i < o->n; i++) free(o->list[i]);
    free(o);
    free(c);
}
