/* test_kv.c: the ring, and attention over it. */
#include "cpu.h"
#include "kv/kv_attend.h"
#include "test.h"

/* ---- ring -------------------------------------------------------------------------------- */

enum { MOST_HEADS = 2, PROFILE_D = 64, PROFILE_MOST_D = 128 };

/* A profile of one layer: T is a diagonal times a Hadamard, whose dual is the inverse diagonal
 * times the same. */
static const kvq_profile *make_profile(int d_head) {
    enum { D = PROFILE_MOST_D };
    const int d = kvq_padded_width(d_head);
    static float store[MOST_HEADS * D * D], query[MOST_HEADS * D * D], mean[MOST_HEADS * D];
    static float restore[MOST_HEADS * D * D], importance[MOST_HEADS * D], ones[] = {1, 1};
    static uint16_t order[MOST_HEADS * D], pair[MOST_HEADS * KVQ_WAVES];
    static float wave_u[MOST_HEADS * KVQ_WAVES * D], wave_w[MOST_HEADS * KVQ_WAVES * D];
    static uint8_t n_waves[MOST_HEADS] = {3, KVQ_WAVES};
    static kvq_profile p = {.n_layers = 1,
                            .n_heads = MOST_HEADS,
                            .label = "test",
                            .k_store = store,
                            .k_query = query,
                            .k_mean = mean,
                            .v_store = store,
                            .v_restore = restore,
                            .v_mean = mean,
                            .importance = importance,
                            .k_sensitivity = ones,
                            .v_sensitivity = ones,
                            .order = order,
                            .wave_u = wave_u,
                            .wave_w = wave_w,
                            .wave_pair = pair,
                            .n_waves = n_waves};
    const kvq_basis hadamard = {.kind = KVQ_BASIS_hadamard};
    p.d_head = d_head;
    p.d = d;
    test_normals(wave_u, sizeof wave_u / sizeof *wave_u, 31);
    test_normals(wave_w, sizeof wave_w / sizeof *wave_w, 32);
    for (size_t i = 0; i < sizeof wave_u / sizeof *wave_u; i++) {
        wave_u[i] *= 0.3f;
        wave_w[i] *= 0.3f;
    }
    for (int i = 0; i < MOST_HEADS * KVQ_WAVES; i++) pair[i] = (uint16_t)(i % KVQ_WAVES * 2 + 1);
    for (int i = 0; i < MOST_HEADS * d; i++) {
        float row[D] = {0};
        row[i % d] = 1;
        kvq_basis_store(&hadamard, &kvq_isa_ref, row, 1, d);
        const float size = 1.5f - (float)(i % d) / (float)d;
        mean[i] = 0.1f * (float)(i % 7);
        importance[i] = powf(0.9f, (float)(i % d));
        order[i] =
            (uint16_t)(i % d * 7 % d); /* 7 has no factor in common with a width that is tried */
        for (int j = 0; j < d; j++) {
            store[(i / d * d + j) * d + i % d] = size * row[j];
            query[(i / d * d + j) * d + i % d] = row[j] / size;
            restore[i * d + j] = row[j] / size;
        }
    }
    return &p;
}

/* The tracks of one layer; with a profile if the heads are those that all schemes are tried with,
 * or if the scheme needs one. */
static const char *make_tracks(kvq_track *tracks, const char *scheme, int n_heads, int d_head) {
    static const bool no_bias[1] = {false};
    kvq_plan_request request = {.n_layers = 1,
                                .n_heads = n_heads,
                                .d_head = d_head,
                                .key_bias = no_bias,
                                .l_k = -1,
                                .l_v = -1};
    if (kvq_scheme_find(&request.scheme, scheme) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    if (n_heads == MOST_HEADS &&
        (d_head == PROFILE_D || request.scheme->profile == KVQ_PROFILE_NEEDED)) {
        request.profile = make_profile(d_head);
    }
    if (kvq_plan_make(tracks, &request) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    return NULL;
}

/* Every token must be found where kv_ring.h says it lives, after any sequence of appends and cuts.
 * Under f16 nothing is lost, so each row tells its token. */
static const char *ring_holds_every_token(void) {
    enum { D = 16, N_CTX = 700 };
    static const struct {
        int sinks, window;
    } shapes[] = {{0, 0}, {5, 128}, {0, 1}, {70, 64}, {3, 100}, {5, 1000}};
    unsigned long long state = 11;
    kvq_track tracks[KVQ_SIDES];
    const char *const broken = make_tracks(tracks, "f16", 1, D);
    if (broken) return broken;
    for (size_t shape = 0; shape < sizeof shapes / sizeof *shapes; shape++) {
        kvq_ring ring;
        kvq_ring_bytes bytes = {0};
        kvq_arena arena = {0};
        for (int round = 0; round < 2; round++) {
            if (round) arena = (kvq_arena){.base = kvq_alloc(arena.used)};
            bytes = (kvq_ring_bytes){0};
            kvq_ring_lay_out(&ring, &arena, &bytes, tracks, NULL, 1, D, shapes[shape].sinks,
                             shapes[shape].window, N_CTX);
        }
        TEST_CHECK(bytes.sinks + bytes.sealed[KVQ_KEYS] + bytes.sealed[KVQ_VALUES] + bytes.recent ==
                   arena.used);
        int tokens[N_CTX], n = 0, next = 1; /* each token is a number of its own */
        for (int move = 0; move < 60; move++) {
            if (move % 5 == 4) {
                n = (int)(test_random(&state) % (unsigned)(n + 1));
                kvq_ring_truncate(&ring, n);
            } else {
                static uint16_t rows[N_CTX * D];
                const int room = N_CTX - n,
                          count = (int)(test_random(&state) % (unsigned)(room + 1)) / 2;
                const int until = kvq_ring_until_seal(&ring), sealed = ring.n_sealed;
                for (int t = 0; t < count; t++) {
                    for (int c = 0; c < D; c++) rows[t * D + c] = (uint16_t)next;
                    tokens[n + t] = next++;
                }
                kvq_ring_append(&ring, 0, KVQ_KEYS, rows, count);
                kvq_ring_append(&ring, 0, KVQ_VALUES, rows, count);
                kvq_ring_advance(&ring, count);
                n += count;
                TEST_CHECK((ring.n_sealed > sealed) == (count >= until));
            }
            TEST_CHECK(ring.n == n && ring.n_sealed <= ring.max_blocks);
            for (int token = 0; token < n; token++) {
                const int i = token - ring.sinks;
                for (int side = 0; side < KVQ_SIDES; side++) {
                    const uint16_t *const row = i < 0 ? kvq_ring_sink(&ring, 0, side, token)
                                                : i < ring.n_sealed * KVQ_BLOCK
                                                    ? (const uint16_t *)(void *)kvq_ring_block(
                                                          &ring, 0, side, i / KVQ_BLOCK) +
                                                          i % KVQ_BLOCK * D
                                                    : kvq_ring_recent(&ring, 0, side, i);
                    if (row[D - 1] != tokens[token]) {
                        return TEST_FAIL("sinks %d, window %d, move %d: token %d of %d is lost",
                                         ring.sinks, ring.window, move, token, n);
                    }
                }
            }
        }
        kvq_free(arena.base);
    }
    return NULL;
}

/* ---- attention --------------------------------------------------------------------------- */

/* How far a pair is turned at a position. */
static double turned_by(int position, int pair) { return position / (1.0 + 0.7 * pair); }

enum { A_HEADS = 18, A_KV_HEADS = 2, A_MOST_D = KVQ_D_MAX };
/* Tokens: of a few blocks, of some, and of several segments of blocks (kv_attend.c). */
enum { A_SHORT = 300, A_CTX = 600, A_LONG = 1300 };

/* The cache as plain numbers: what kv_ring.h says the ring holds, decoded, in the basis of the
 * scheme. */
static void decode_ring(const kvq_ring *ring, int head, int side, float *x) {
    const int d = ring->d;
    float block[KVQ_BLOCK * A_MOST_D];
    for (int token = 0; token < ring->n; token++) {
        const int i = token - ring->sinks;
        if (i >= 0 && i < ring->n_sealed * KVQ_BLOCK) {
            const kvq_track *const track = &ring->track[side][head];
            kvq_codecs[track->codec].decode(block, kvq_ring_block(ring, head, side, i / KVQ_BLOCK),
                                            &track->shape);
            memcpy(x + token * d, block + i % KVQ_BLOCK * d, (size_t)d * sizeof *x);
            for (int k = 0; k < track->wave.n; k++) {
                const double angle = turned_by(token, track->wave.pair[k]);
                for (int c = 0; c < d; c++) {
                    x[token * d + c] += (float)(cos(angle) * (double)track->wave.u[k * d + c] +
                                                sin(angle) * (double)track->wave.w[k * d + c]);
                }
            }
        } else {
            const uint16_t *const row = i < 0 ? kvq_ring_sink(ring, head, side, token)
                                              : kvq_ring_recent(ring, head, side, i);
            for (int c = 0; c < d; c++) x[token * d + c] = kvq_f16_to_f32(row[c]);
        }
    }
}

typedef struct bench {
    kvq_attention a;
    kvq_ring ring;
    kvq_track tracks[KVQ_SIDES * A_KV_HEADS];
    void *memory[2];
} bench;

static const kvq_turns *make_turns(int sinks) {
    enum { PAIRS = PROFILE_D / 2, BLOCKS = A_LONG / KVQ_BLOCK };
    static float within[PAIRS * 2 * KVQ_BLOCK], first[BLOCKS * PAIRS * 2];
    static const kvq_turns turns = {.n_pairs = PAIRS, .within = within, .first = first};
    for (int pair = 0; pair < PAIRS; pair++) {
        for (int t = 0; t < KVQ_BLOCK; t++) {
            within[pair * 2 * KVQ_BLOCK + t] = (float)cos(turned_by(t, pair));
            within[(pair * 2 + 1) * KVQ_BLOCK + t] = (float)sin(turned_by(t, pair));
        }
        for (int block = 0; block < BLOCKS; block++) {
            const double angle = turned_by(sinks + block * KVQ_BLOCK, pair);
            first[(block * PAIRS + pair) * 2] = (float)cos(angle);
            first[(block * PAIRS + pair) * 2 + 1] = (float)sin(angle);
        }
    }
    return &turns;
}

static const char *open_bench(bench *b, const char *scheme, int d_head, int n_ctx, int sinks,
                              int n_batch, int n_threads) {
    memset(b, 0, sizeof *b);
    if (kvq_isa_choose(&b->a.isa) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    if (kvq_pool_open(&b->a.pool, n_threads, false) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    const char *const broken = make_tracks(b->tracks, scheme, A_KV_HEADS, d_head);
    if (broken) return broken;
    kvq_arena kv = {0}, scratch = {0};
    for (int round = 0; round < 2; round++) {
        kvq_ring_bytes bytes = {0};
        if (round) {
            b->memory[0] = kv.base = kvq_alloc(kv.used);
            b->memory[1] = scratch.base = kvq_alloc(scratch.used);
            kv.used = scratch.used = 0;
        }
        kvq_ring_lay_out(&b->ring, &kv, &bytes, b->tracks, make_turns(sinks), A_KV_HEADS, d_head,
                         sinks, 64, n_ctx);
        kvq_attention_lay_out(&b->a, &scratch, &b->ring, A_HEADS, d_head, n_batch, n_threads);
    }
    return NULL;
}

static void close_bench(bench *b) {
    kvq_pool_close(b->a.pool);
    kvq_free(b->memory[0]);
    kvq_free(b->memory[1]);
}

static float a_q[A_CTX * A_HEADS * A_MOST_D], a_k[A_CTX * A_KV_HEADS * A_MOST_D],
    a_v[A_CTX * A_KV_HEADS * A_MOST_D];
static float a_out[A_CTX * A_HEADS * A_MOST_D], a_other[A_CTX * A_HEADS * A_MOST_D];

static void make_inputs(int d_head, int n_ctx) {
    const size_t n_q = (size_t)(n_ctx * A_HEADS * d_head);
    const size_t n_kv = (size_t)(n_ctx * A_KV_HEADS * d_head);
    test_normals(a_q, n_q, 21);
    test_normals(a_k, n_kv, 22);
    test_normals(a_v, n_kv, 23);
    for (size_t i = 0; i < n_q; i++) a_q[i] *= 2.0f;
}

/* Runs tokens first .. end - 1 through the bench in passes of `step` tokens, none of which crosses
 * a seal if `stop_at_seals`. */
static void run_bench(bench *b, float *out, int first, int end, int step, bool stop_at_seals) {
    const int d_head = b->a.d_head;
    for (int t = first, n; t < end; t += n) {
        const int until = kvq_ring_until_seal(&b->ring);
        n = end - t < step ? end - t : step;
        if (stop_at_seals && n > until) n = until;
        kvq_attend(&b->a, &b->ring, out + t * A_HEADS * d_head, a_q + t * A_HEADS * d_head,
                   a_k + t * A_KV_HEADS * d_head, a_v + t * A_KV_HEADS * d_head, n);
    }
}

/* What head h of token t must get, by plain loops in f64 over the decoded ring and the token itself
 * as halves. */
static void attend_plainly(float *out, const bench *b, int t, int h) {
    static float keys[A_CTX * A_MOST_D], values[A_CTX * A_MOST_D]; /* or A_LONG narrow ones */
    const int kv_head = h / (A_HEADS / A_KV_HEADS), d = b->a.d, d_head = b->a.d_head;
    const size_t bytes = (size_t)d_head * sizeof(float);
    float q[A_MOST_D] = {0};
    double score[A_LONG], most = -1e30, sum = 0, o[A_MOST_D] = {0};
    decode_ring(&b->ring, kv_head, KVQ_KEYS, keys);
    decode_ring(&b->ring, kv_head, KVQ_VALUES, values);
    memset(keys + t * d, 0, (size_t)d * sizeof *keys);
    memset(values + t * d, 0, (size_t)d * sizeof *values);
    memcpy(q, a_q + (t * A_HEADS + h) * d_head, bytes);
    memcpy(keys + t * d, a_k + (t * A_KV_HEADS + kv_head) * d_head, bytes);
    memcpy(values + t * d, a_v + (t * A_KV_HEADS + kv_head) * d_head, bytes);
    kvq_basis_query(&b->ring.track[KVQ_KEYS][kv_head].basis, &kvq_isa_ref, q, 1, d);
    kvq_basis_store(&b->ring.track[KVQ_KEYS][kv_head].basis, &kvq_isa_ref, keys + t * d, 1, d);
    kvq_basis_store(&b->ring.track[KVQ_VALUES][kv_head].basis, &kvq_isa_ref, values + t * d, 1, d);
    for (int c = t * d; c < (t + 1) * d; c++) {
        keys[c] = kvq_f16_to_f32(kvq_f32_to_f16(keys[c]));
        values[c] = kvq_f16_to_f32(kvq_f32_to_f16(values[c]));
    }
    for (int j = 0; j <= t; j++) {
        score[j] = 0;
        for (int c = 0; c < d; c++) score[j] += (double)q[c] * (double)keys[j * d + c];
        score[j] /= sqrt((double)d_head);
        most = fmax(most, score[j]);
    }
    for (int j = 0; j <= t; j++) {
        const double weight = exp(score[j] - most);
        sum += weight;
        for (int c = 0; c < d; c++) o[c] += weight * (double)values[j * d + c];
    }
    for (int c = 0; c < d; c++) out[c] = (float)(o[c] / sum);
    kvq_basis_restore(&b->ring.track[KVQ_VALUES][kv_head].basis, &kvq_isa_ref, out, 1, d);
}

static const char *check_attention(const char *scheme, int d_head, int n_ctx, int sinks) {
    const int t = n_ctx - 1;
    bench b;
    float expected[A_HEADS][A_MOST_D];
    const char *const broken = open_bench(&b, scheme, d_head, n_ctx, sinks, 100, 2);
    if (broken) return broken;
    run_bench(&b, a_out, 0, t, 100, false);
    for (int h = 0; h < A_HEADS; h++) attend_plainly(expected[h], &b, t, h);
    run_bench(&b, a_out, t, t + 1, 1, false);
    close_bench(&b);
    for (int h = 0; h < A_HEADS; h++) {
        for (int c = 0; c < d_head; c++) {
            const float got = a_out[(t * A_HEADS + h) * d_head + c];
            /* fast queries meet keys with a mean in 8 bits: u1, u2, u4 and mixed */
            const kvq_track *const track = &b.tracks[0];
            const bool has_mean = kvq_codec_mean_at(track->codec, &track->shape) > 0;
            const float most = has_mean && b.a.isa != &kvq_isa_ref ? 6e-2f : 3e-5f;
            if (!(fabsf(got - expected[h][c]) <= most)) {
                return TEST_FAIL("%s, width %d, %d sinks, head %d, channel %d: %g, expected %g",
                                 scheme, d_head, sinks, h, c, (double)got, (double)expected[h][c]);
            }
        }
    }
    return NULL;
}

static const char *attention_is_softmax_over_the_cache(void) {
    static const int sinks[] = {5, 0, 70};
    make_inputs(PROFILE_D, A_CTX);
    for (int32_t i = 0; i < kvq_scheme_count() * 3; i++) {
        kvq_scheme_info info;
        if (kvq_scheme_describe(i / 3, PROFILE_D, &info) != KVQ_OK) {
            return TEST_FAIL("%s", kvq_error());
        }
        const char *const broken = check_attention(info.name, PROFILE_D, A_CTX, sinks[i % 3]);
        if (broken) return broken;
    }
    return NULL;
}

static const char *attention_at_widths(const int *widths, size_t n_widths,
                                       const char *const *schemes, size_t n_schemes) {
    for (size_t w = 0; w < n_widths; w++) {
        make_inputs(widths[w], A_SHORT);
        for (size_t i = 0; i < n_schemes; i++) {
            const char *const broken = check_attention(schemes[i], widths[w], A_SHORT, 5);
            if (broken) return broken;
        }
    }
    return NULL;
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* Schemes without a profile that among them have every codec and basis that needs none. 40 is
 * padded to 48. */
static const char *attention_at_other_widths_without_profile(void) {
    static const int widths[] = {16, 40, 80, 128, A_MOST_D};
    static const char *const schemes[] = {"f16",      "skvq", "skvq-k2v2", "asymkv",
                                          "asymkv-4", "nqkv", "nqkv-3",    "nqkv-2"};
    return attention_at_widths(widths, COUNT(widths), schemes, COUNT(schemes));
}

static const char *attention_at_other_widths_with_profile(void) {
    static const int widths[] = {40, 80, PROFILE_MOST_D};
    static const char *const schemes[] = {"auto", "svdq"};
    return attention_at_widths(widths, COUNT(widths), schemes, COUNT(schemes));
}

static const char *check_cuts(const char *scheme, int n_ctx, int trials) {
    static const int steps[] = {1, 7, 64, 100};
    const size_t bytes = (size_t)(n_ctx * A_HEADS * PROFILE_D) * sizeof *a_out;
    for (int k = 0; k < trials; k++) {
        bench b;
        const char *const broken = open_bench(&b, scheme, PROFILE_D, n_ctx, 5, 100, 1 + k % 3);
        if (broken) return broken;
        run_bench(&b, k ? a_other : a_out, 0, n_ctx, steps[k % 4], true);
        close_bench(&b);
        if (k && memcmp(a_out, a_other, bytes) != 0) {
            return TEST_FAIL("%s: passes of %d tokens on %d threads change the result", scheme,
                             steps[k % 4], 1 + k % 3);
        }
    }
    return NULL;
}

static const char *attention_does_not_depend_on_cuts_or_threads(void) {
    make_inputs(PROFILE_D, A_CTX);
    for (int32_t i = 0; i < kvq_scheme_count(); i++) {
        kvq_scheme_info info;
        if (kvq_scheme_describe(i, PROFILE_D, &info) != KVQ_OK) {
            return TEST_FAIL("%s", kvq_error());
        }
        const char *const broken = check_cuts(info.name, A_CTX, 8);
        if (broken) return broken;
    }
    return NULL;
}

static const char *both_hold_over_several_segments(void) {
    static const char *const schemes[] = {"skvq", "auto"};
    make_inputs(PROFILE_D, A_LONG);
    for (size_t i = 0; i < sizeof schemes / sizeof *schemes; i++) {
        const char *broken = check_attention(schemes[i], PROFILE_D, A_LONG, 5);
        if (!broken) broken = check_cuts(schemes[i], A_LONG, 3);
        if (broken) return broken;
    }
    return NULL;
}

/* ---- waves ------------------------------------------------------------------------------- */

static const char *waves_match_the_reference(void) {
    enum { MOST = 9 };
    static const int pairs[] = {0, 1, 3, KVQ_WAVES};
    static float s[MOST * KVQ_BLOCK], t[MOST * KVQ_BLOCK], factor[MOST * KVQ_WAVE_FACTORS];
    static float samples[KVQ_WAVE_FACTORS * KVQ_BLOCK];
    const float *waves[KVQ_WAVE_FACTORS];
    const kvq_isa *isa;
    if (kvq_isa_choose(&isa) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    test_normals(factor, sizeof factor / sizeof *factor, 41);
    test_normals(samples, sizeof samples / sizeof *samples, 42);
    for (int j = 0; j < KVQ_WAVE_FACTORS; j++) waves[j] = samples + j * KVQ_BLOCK;
    for (size_t p = 0; p < sizeof pairs / sizeof *pairs; p++) {
        for (int n = 1; n <= MOST; n++) {
            test_normals(s, sizeof s / sizeof *s, 43);
            memcpy(t, s, sizeof s);
            kvq_run_add_waves(isa, s, factor, n, waves, 2 * pairs[p]);
            kvq_add_waves_reference(t, factor, n, waves, 2 * pairs[p]);
            for (int i = 0; i < MOST * KVQ_BLOCK; i++) {
                if (!(fabsf(s[i] - t[i]) <= 1e-5f)) {
                    return TEST_FAIL("%d pairs, score %d of %d queries: %g, expected %g", pairs[p],
                                     i, n, (double)s[i], (double)t[i]);
                }
            }
        }
    }
    return NULL;
}

/* ---- bases ------------------------------------------------------------------------------- */

static const char *bases_are_the_references_to_the_bit(void) {
    static const int widths[] = {16, 48, 64, 80, 128, 160, 256, KVQ_D_MAX};
    enum { MOST = 5 };
    static float matrix[KVQ_D_MAX * KVQ_D_MAX], x[MOST * KVQ_D_MAX], y[MOST * KVQ_D_MAX];
    const kvq_isa *isa;
    if (kvq_isa_choose(&isa) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    test_normals(matrix, sizeof matrix / sizeof *matrix, 5);
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
        const int d = widths[w];
        for (int n = 1; n <= MOST; n++) {
            const size_t bytes = (size_t)n * (size_t)d * sizeof *x;
            test_normals(x, (size_t)n * (size_t)d, (unsigned long long)(d + n));
            memcpy(y, x, bytes);
            kvq_run_hadamard(isa, x, n, d);
            kvq_hadamard_reference(y, n, d);
            if (memcmp(x, y, bytes) != 0) return TEST_FAIL("Hadamard, %d of width %d", n, d);
            kvq_run_multiply(isa, x, matrix, n, d);
            kvq_multiply_reference(y, matrix, n, d);
            if (memcmp(x, y, bytes) != 0) return TEST_FAIL("matrix, %d of width %d", n, d);
        }
    }
    return NULL;
}

const kvq_test tests_kv[] = {
    {"kv: the maps of bases are the references' to the bit", bases_are_the_references_to_the_bit},
    {"kv: the ring holds every token where it says", ring_holds_every_token},
    {"kv: attention is softmax over the decoded cache", attention_is_softmax_over_the_cache},
    {"kv: the same at other widths of heads, without a profile",
     attention_at_other_widths_without_profile},
    {"kv: the same at other widths of heads, with a profile",
     attention_at_other_widths_with_profile},
    {"kv: attention does not depend on cuts or threads",
     attention_does_not_depend_on_cuts_or_threads},
    {"kv: both hold over several segments of a long context", both_hold_over_several_segments},
    {"kv: waves are added as the reference adds them", waves_match_the_reference},
    {NULL, NULL},
};
