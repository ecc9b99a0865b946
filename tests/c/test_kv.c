/* test_kv.c: codecs, their kernels on every instruction set, the ring, and attention over it. */
#include <float.h>

#include "cpu.h"
#include "kv/kv_attend.h"
#include "test.h"

enum { MOST_QUERIES = 9 };

static const int widths[] = {32, 64, 80, 96, 128, 256, 512};
enum { N_WIDTHS = sizeof widths / sizeof *widths };

/* Keys as models have them: an offset per channel, and tokens of differing size. */
static void make_rows(uint16_t *rows, int n, int d, unsigned long long seed) {
    unsigned long long state = seed * 2 + 1;
    float offset[KVQ_D_MAX];
    for (int c = 0; c < d; c++) offset[c] = 2.0f * test_normal(&state);
    for (int t = 0; t < n; t++) {
        const float size = 1.0f + 0.5f * test_uniform(&state);
        for (int c = 0; c < d; c++) {
            rows[t * d + c] = kvq_f32_to_f16(offset[c] + size * test_normal(&state));
        }
    }
}

static void make_floats(float *x, size_t n, unsigned long long seed) {
    unsigned long long state = seed * 2 + 1;
    for (size_t i = 0; i < n; i++) x[i] = test_normal(&state);
}

/* What is tried: every codec with one group of channels, and those that know groups with several.
 */
typedef struct codec_case {
    kvq_codec_id id;
    int group; /* 0: the head */
} codec_case;

static const codec_case more_cases[] = {{KVQ_CODEC_u1, 32}, {KVQ_CODEC_u2, 32}, {KVQ_CODEC_u2, 64},
                                        {KVQ_CODEC_u4, 32}, {KVQ_CODEC_c8, 32}, {KVQ_CODEC_c8, 64}};
enum { N_CASES = KVQ_CODECS + sizeof more_cases / sizeof *more_cases };

static codec_case case_at(int i) {
    return i < KVQ_CODECS ? (codec_case){(kvq_codec_id)i, 0} : more_cases[i - KVQ_CODECS];
}

/* Mixed has every width at once. */
static kvq_kv_shape shape_of(codec_case c, int d) {
    kvq_kv_shape shape = kvq_plain_shape(d);
    const int run[KVQ_RUNS] = {d / 8 / 4 * 4, d / 4 / 4 * 4, d / 4 / 8 * 8, d / 4 / 16 * 16};
    memcpy(shape.run, run, sizeof run);
    if (c.group) shape.group = c.group;
    return shape;
}

static bool fits(codec_case c, int d) {
    return d % kvq_codecs[c.id].d_multiple == 0 && (c.group == 0 || d % c.group == 0);
}

/* "u2", or "u2 in groups of 32" */
static const char *case_name(codec_case c) {
    static char name[64];
    snprintf(name, sizeof name, c.group ? "%s in groups of %d" : "%s", kvq_codecs[c.id].name,
             c.group);
    return name;
}

/* ---- halves ------------------------------------------------------------------------------ */

static const char *halves_round_trip(void) {
    for (uint32_t h = 0; h < 65536; h++) {
        const bool nan = (h & 0x7c00u) == 0x7c00u && (h & 0x3ffu);
        const float f = kvq_f16_to_f32((uint16_t)h);
        if (nan ? f == f : kvq_f32_to_f16(f) != h) return TEST_FAIL("half 0x%04x changed", h);
    }
    return NULL;
}

static const char *halves_round_to_nearest_even(void) {
    for (uint32_t h = 0; h < 0x7bffu; h++) { /* every pair of neighbours, subnormals included */
        const float low = kvq_f16_to_f32((uint16_t)h), high = kvq_f16_to_f32((uint16_t)(h + 1));
        const float middle = low + (high - low) * 0.5f; /* exact */
        const uint32_t even = h & 1u ? h + 1 : h;
        if (kvq_f32_to_f16(middle) != even || kvq_f32_to_f16(nextafterf(middle, 0.0f)) != h ||
            kvq_f32_to_f16(nextafterf(middle, FLT_MAX)) != h + 1) {
            return TEST_FAIL("around %g: not rounded to the nearest half, ties to even",
                             (double)middle);
        }
    }
    TEST_CHECK(kvq_f32_to_f16(65519.0f) == 0x7bffu && kvq_f32_to_f16(65520.0f) == 0x7c00u);
    return NULL;
}

/* ---- codecs ------------------------------------------------------------------------------ */

/* Mean square error over variance, of normal data without offsets: a few percent above the optimum
 * of their levels (kv_format.h, methods in docs/kv-schemes.md), of which a scale per token and per
 * channel gains a part, and stretching loses one: D becomes D / (1 - D) where it is whole. */
static const double most_error[KVQ_CODECS] = {
    [KVQ_CODEC_f16] = 1e-7,  [KVQ_CODEC_q8_0] = 6e-5,  [KVQ_CODEC_q4_0] = 0.012,
    [KVQ_CODEC_u1] = 0.39,   [KVQ_CODEC_u2] = 0.122,   [KVQ_CODEC_u4] = 0.0125,
    [KVQ_CODEC_c8] = 0.252,  [KVQ_CODEC_mixed] = 0.27, [KVQ_CODEC_t1] = 0.46,
    [KVQ_CODEC_t2] = 0.106,  [KVQ_CODEC_n1] = 0.3634,  [KVQ_CODEC_n2] = 0.1175,
    [KVQ_CODEC_n3] = 0.0345, [KVQ_CODEC_nf4] = 0.0094};

/* Of rows[KVQ_BLOCK][d]. */
static double error_of(kvq_codec_id id, const uint16_t *rows, const kvq_kv_shape *shape) {
    static uint8_t block[KVQ_BLOCK * KVQ_D_MAX * 2];
    static float y[KVQ_BLOCK * KVQ_D_MAX];
    double error = 0, power = 0;
    kvq_codecs[id].encode(block, rows, shape);
    kvq_codecs[id].decode(y, block, shape);
    for (int i = 0; i < KVQ_BLOCK * shape->d; i++) {
        const double x = kvq_f16_to_f32(rows[i]);
        error += (y[i] - x) * (y[i] - x);
        power += x * x;
    }
    return error / power;
}

static const char *codecs_lose_no_more_than_their_bits_imply(void) {
    enum { D = 128, ROUNDS = 8 };
    static uint16_t rows[KVQ_BLOCK * D];
    static float y[KVQ_BLOCK * D];
    for (int i = 0; i < N_CASES; i++) {
        const codec_case c = case_at(i);
        const kvq_kv_shape shape = shape_of(c, D);
        double error = 0;
        for (int round = 0; round < ROUNDS; round++) {
            make_floats(y, (size_t)KVQ_BLOCK * D, (unsigned)round);
            for (int k = 0; k < KVQ_BLOCK * D; k++) rows[k] = kvq_f32_to_f16(y[k]);
            error += error_of(c.id, rows, &shape) / ROUNDS;
        }
        if (!(error <= most_error[c.id])) {
            return TEST_FAIL("%s: error %.4g of the power, expected at most %.4g", case_name(c),
                             error, most_error[c.id]);
        }
    }
    return NULL;
}

/* Tokens whose groups of channels differ in size, now these and now those, in normal data: one
 * scale for all groups cannot fit them, one for each does as well as if they were alike. */
static const char *groups_have_scales_of_their_own(void) {
    enum { D = 128 };
    static const kvq_codec_id grouped[] = {KVQ_CODEC_u1, KVQ_CODEC_u2, KVQ_CODEC_u4, KVQ_CODEC_c8};
    static uint16_t rows[KVQ_BLOCK * D];
    unsigned long long state = 5;
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < D; c++) {
            const float size = (t + c / 32) % 4 ? 0.1f : 1.0f;
            rows[t * D + c] = kvq_f32_to_f16(size * test_normal(&state));
        }
    }
    for (size_t i = 0; i < sizeof grouped / sizeof *grouped; i++) {
        const kvq_codec_id id = grouped[i];
        const kvq_kv_shape one = shape_of((codec_case){id, 0}, D);
        const kvq_kv_shape four = shape_of((codec_case){id, 32}, D);
        const double alone = error_of(id, rows, &one), apart = error_of(id, rows, &four);
        TEST_CHECK(kvq_codecs[id].bytes(&four) == kvq_codecs[id].bytes(&one) + 3 * KVQ_BLOCK);
        if (!(apart <= 1.03 * most_error[id] && alone > 1.3 * apart)) {
            return TEST_FAIL(
                "%s: error %.4g in groups of 32, %.4g with one scale, expected at most "
                "%.4g and more",
                kvq_codecs[id].name, apart, alone, 1.03 * most_error[id]);
        }
    }
    return NULL;
}

/* What is read back is as long as the rows in their direction where values are stretched whole, and
 * half way to it from least squares where keys are: <x, y> = |x|^2 and the mean of that and |y|^2.
 */
static const char *blocks_are_stretched(void) {
    enum { D = 64 };
    static const kvq_codec_id values[] = {KVQ_CODEC_c8, KVQ_CODEC_t1, KVQ_CODEC_t2};
    static const kvq_codec_id keys[] = {KVQ_CODEC_u1, KVQ_CODEC_u2, KVQ_CODEC_mixed};
    static uint16_t rows[KVQ_BLOCK * D];
    static uint8_t block[KVQ_BLOCK * D * 2];
    static float x[KVQ_BLOCK * D], y[KVQ_BLOCK * D];
    make_floats(x, KVQ_BLOCK * D / 2, 6);
    for (int k = 0; k < KVQ_BLOCK * D / 2; k++) { /* without a mean, which is not stretched */
        rows[k] = kvq_f32_to_f16(x[k]);
        rows[k + KVQ_BLOCK * D / 2] = rows[k] ^ 0x8000u;
    }
    for (int i = 0; i < 6; i++) {
        const kvq_codec_id id = i < 3 ? values[i] : keys[i - 3];
        kvq_kv_shape shape = kvq_plain_shape(D);
        if (id == KVQ_CODEC_mixed) shape.run[2] = D;
        kvq_codecs[id].encode(block, rows, &shape);
        kvq_codecs[id].decode(y, block, &shape);
        double xx = 0, xy = 0, yy = 0;
        for (int k = 0; k < KVQ_BLOCK * D; k++) {
            const double value = kvq_f16_to_f32(rows[k]);
            xx += value * value;
            xy += value * y[k];
            yy += (double)y[k] * y[k];
        }
        /* of least squares z: y = stretch * z, with <x, z> = |z|^2 = (1 - D) |x|^2 */
        const double kept = xy * xy / (xx * yy), found = xy / xx / kept;
        const double expected = 1 / (1 - (i < 3 ? 1.0 : 0.5) * (1 - kept));
        if (fabs(found / expected - 1) > 0.01) {
            return TEST_FAIL("%s: stretched by %.4f, expected %.4f", kvq_codecs[id].name, found,
                             expected);
        }
    }
    return NULL;
}

static const char *codecs_take_any_input(void) {
    static uint16_t rows[KVQ_BLOCK * 64];
    static uint8_t block[KVQ_BLOCK * 64 * 2];
    static float y[KVQ_BLOCK * 64];
    static const uint16_t extremes[] = {0, 0x8000u, 1, 0x7bffu, 0xfbffu, 0x7c00u, 0xfc00u, 0x7e00u};
    for (int i = 0; i < N_CASES; i++) {
        const codec_case c = case_at(i);
        const kvq_kv_shape shape = shape_of(c, 64);
        for (int e = 0; e < 8; e++) { /* all alike, then one among zeros, then mixed */
            for (int k = 0; k < KVQ_BLOCK * 64; k++) rows[k] = extremes[e];
            kvq_codecs[c.id].encode(block, rows, &shape);
            kvq_codecs[c.id].decode(y, block, &shape);
            if (extremes[e] == 0 && y[77] != 0) return TEST_FAIL("%s: zeros changed", case_name(c));
            memset(rows, 0, sizeof rows);
            rows[64 * 5 + 3] = extremes[e];
            kvq_codecs[c.id].encode(block, rows, &shape);
            kvq_codecs[c.id].decode(y, block, &shape);
            for (int k = 0; k < KVQ_BLOCK * 64; k++) rows[k] = extremes[(k * 7 + k / 64) % 8];
            kvq_codecs[c.id].encode(block, rows, &shape);
        }
    }
    return NULL;
}

/* The stored bytes of every codec for fixed rows: [64][64] halves, then a block of each case. A
 * stored format never changes silently. KVQ_WRITE_VECTORS=1 writes the
 * file anew. */
static const char *blocks_are_the_frozen_ones(void) {
    enum { D = 64 };
    const char *const folder = getenv("KVQ_TEST_DIR");
    char path[512];
    uint16_t rows[KVQ_BLOCK * D];
    static uint8_t made[65536], found[65536];
    size_t used = sizeof rows;
    snprintf(path, sizeof path, "%s/vectors/kv_blocks.bin", folder ? folder : "tests");
    make_rows(rows, KVQ_BLOCK, D, 2405);
    memcpy(made, rows, sizeof rows);
    for (int i = 0; i < N_CASES; i++) {
        const kvq_kv_shape shape = shape_of(case_at(i), D);
        kvq_codecs[case_at(i).id].encode(made + used, rows, &shape);
        used += kvq_codecs[case_at(i).id].bytes(&shape);
    }
    const bool write = getenv("KVQ_WRITE_VECTORS") != NULL;
    FILE *const file = fopen(path, write ? "wb" : "rb");
    if (!file) return TEST_FAIL("%.300s cannot be opened", path);
    const size_t moved = write ? fwrite(made, 1, used, file) : fread(found, 1, sizeof found, file);
    fclose(file);
    if (moved != used) return TEST_FAIL("%.300s has %zu bytes, expected %zu", path, moved, used);
    for (size_t i = 0; i < used && !write; i++) {
        if (made[i] != found[i]) return TEST_FAIL("byte %zu of %.300s differs", i, path);
    }
    return NULL;
}

/* ---- kernels ----------------------------------------------------------------------------- */

/* Scores: root mean square difference from the reference over a block, relative to that of |q||k| /
 * sqrt(d), the spread of a score. u1, u2, u4 and mixed round queries to 8 bits: with the largest of
 * d normal channels at about 3 standard deviations, 3 / 127 / sqrt(12) = 0.7 % of the spread. Sums:
 * relative to sum |p||v|. */
static const double most_score_off[KVQ_CODECS] = {
    [KVQ_CODEC_f16] = 1e-6, [KVQ_CODEC_q8_0] = 1e-6,   [KVQ_CODEC_q4_0] = 1e-6,
    [KVQ_CODEC_u1] = 0.015, [KVQ_CODEC_u2] = 0.015,    [KVQ_CODEC_u4] = 0.015,
    [KVQ_CODEC_c8] = 1e-6,  [KVQ_CODEC_mixed] = 0.015, [KVQ_CODEC_t1] = 1e-6,
    [KVQ_CODEC_t2] = 1e-6,  [KVQ_CODEC_n1] = 1e-6,     [KVQ_CODEC_n2] = 1e-6,
    [KVQ_CODEC_n3] = 1e-6,  [KVQ_CODEC_nf4] = 1e-6};
/* c8, t1 and t2 round weights to 1/4095 of the largest of a block: off by 3e-5 on average here, and
 * by ten times as much where large errors meet. */
static const float most_accum_off[KVQ_CODECS] = {
    [KVQ_CODEC_f16] = 1e-6f, [KVQ_CODEC_q8_0] = 1e-6f,  [KVQ_CODEC_q4_0] = 1e-6f,
    [KVQ_CODEC_u1] = 1e-6f,  [KVQ_CODEC_u2] = 1e-6f,    [KVQ_CODEC_u4] = 1e-6f,
    [KVQ_CODEC_c8] = 5e-4f,  [KVQ_CODEC_mixed] = 1e-6f, [KVQ_CODEC_t1] = 5e-4f,
    [KVQ_CODEC_t2] = 5e-4f,  [KVQ_CODEC_n1] = 1e-6f,    [KVQ_CODEC_n2] = 1e-6f,
    [KVQ_CODEC_n3] = 1e-6f,  [KVQ_CODEC_nf4] = 1e-6f};

static const char *check_kernels(const kvq_isa *isa, codec_case which, int d, int n) {
    const kvq_codec_id id = which.id;
    static uint16_t rows[KVQ_BLOCK * KVQ_D_MAX];
    static uint8_t block[KVQ_BLOCK * KVQ_D_MAX * 2];
    static float decoded[KVQ_BLOCK * KVQ_D_MAX], q[MOST_QUERIES * KVQ_D_MAX];
    static float s[MOST_QUERIES * KVQ_BLOCK], s_ref[MOST_QUERIES * KVQ_BLOCK];
    static float o[MOST_QUERIES * KVQ_D_MAX], o_ref[MOST_QUERIES * KVQ_D_MAX];
    make_rows(rows, KVQ_BLOCK, d, (unsigned)(d + n));
    make_floats(q, (size_t)(n * d), 7);
    const kvq_kv_shape shape = shape_of(which, d);
    kvq_codecs[id].encode(block, rows, &shape);
    kvq_codecs[id].decode(decoded, block, &shape);
    const kvq_query query = {.x = q, .n = n};

    kvq_score_reference(id, s_ref, &query, block, &shape);
    kvq_run_score(isa, id, s, &query, block, &shape);
    for (int i = 0; i < n; i++) {
        double off = 0, spread = 0, qq = 0;
        for (int c = 0; c < d; c++) qq += (double)q[i * d + c] * (double)q[i * d + c];
        for (int t = 0; t < KVQ_BLOCK; t++) {
            const double difference =
                (double)s[i * KVQ_BLOCK + t] - (double)s_ref[i * KVQ_BLOCK + t];
            off += difference * difference;
            for (int c = 0; c < d; c++) {
                spread += qq * (double)decoded[t * d + c] * (double)decoded[t * d + c] / d;
            }
        }
        if (!(off <= most_score_off[id] * most_score_off[id] * spread)) {
            return TEST_FAIL(
                "%s on %s, width %d, query %d of %d: scores are off by %.3g of their spread",
                case_name(which), isa->name, d, i, n, sqrt(off / spread));
        }
    }
    for (int i = 0; i < n * KVQ_BLOCK; i++) s[i] = fabsf(s_ref[i]) * 0.01f;
    make_floats(o, (size_t)(n * d), 9);
    memcpy(o_ref, o, sizeof o);
    kvq_accum_reference(id, o_ref, s, n, block, &shape);
    kvq_run_accum(isa, id, o, s, n, block, &shape);
    for (int i = 0; i < n; i++) {
        for (int c = 0; c < d; c++) {
            float scale = 1;
            for (int t = 0; t < KVQ_BLOCK; t++)
                scale += fabsf(s[i * KVQ_BLOCK + t] * decoded[t * d + c]);
            if (!(fabsf(o[i * d + c] - o_ref[i * d + c]) <= most_accum_off[id] * scale)) {
                return TEST_FAIL(
                    "%s on %s, width %d, query %d of %d, channel %d: sum %g, expected %g",
                    case_name(which), isa->name, d, i, n, c, o[i * d + c], o_ref[i * d + c]);
            }
        }
    }
    return NULL;
}

static const char *kernels_match_the_reference(void) {
    const kvq_isa *isa;
    if (kvq_isa_choose(&isa) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    for (int i = 0; i < N_CASES; i++) {
        for (int w = 0; w < N_WIDTHS; w++) {
            for (int n = 1; n <= MOST_QUERIES && fits(case_at(i), widths[w]); n++) {
                const char *const broken = check_kernels(isa, case_at(i), widths[w], n);
                if (broken) return broken;
            }
        }
    }
    return NULL;
}

/* A query's result must not depend on which queries it is grouped with: passes are cut anywhere. */
static const char *queries_do_not_disturb_each_other(void) {
    enum { D = 64 };
    const kvq_isa *isa;
    static uint16_t rows[KVQ_BLOCK * D];
    static uint8_t block[KVQ_BLOCK * D * 2];
    static float q[MOST_QUERIES * D], s[MOST_QUERIES * KVQ_BLOCK], one[KVQ_BLOCK];
    static float weights[MOST_QUERIES * KVQ_BLOCK];
    if (kvq_isa_choose(&isa) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    make_rows(rows, KVQ_BLOCK, D, 3);
    make_floats(q, MOST_QUERIES * D, 4);
    for (int k = 0; k < N_CASES; k++) {
        const codec_case c = case_at(k);
        const kvq_kv_shape shape = shape_of(c, D);
        kvq_codecs[c.id].encode(block, rows, &shape);
        kvq_run_score(isa, c.id, s, &(kvq_query){.x = q, .n = MOST_QUERIES}, block, &shape);
        make_floats(weights, MOST_QUERIES * KVQ_BLOCK, 5);
        for (int i = 0; i < MOST_QUERIES * KVQ_BLOCK; i++) weights[i] = fabsf(weights[i]);
        for (int i = 0; i < MOST_QUERIES; i++) {
            float sums[2][MOST_QUERIES * D] = {{0}};
            kvq_run_score(isa, c.id, one, &(kvq_query){.x = q + i * D, .n = 1}, block, &shape);
            if (memcmp(one, s + i * KVQ_BLOCK, sizeof one) != 0) {
                return TEST_FAIL("%s: the scores of query %d change alone", case_name(c), i);
            }
            kvq_run_accum(isa, c.id, sums[0], weights, MOST_QUERIES, block, &shape);
            kvq_run_accum(isa, c.id, sums[1], weights + i * KVQ_BLOCK, 1, block, &shape);
            if (memcmp(sums[0] + i * D, sums[1], D * sizeof(float)) != 0) {
                return TEST_FAIL("%s: the sums of query %d change alone", case_name(c), i);
            }
        }
    }
    return NULL;
}

static const char *softmax_matches_exp(void) {
    const kvq_isa *isa;
    if (kvq_isa_choose(&isa) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    for (int round = 0; round < 200; round++) {
        unsigned long long state = (unsigned)round * 2 + 1;
        float s[KVQ_BLOCK], x[KVQ_BLOCK], largest = round % 3 ? -INFINITY : 1.0f;
        double sum = 0;
        float most = largest;
        for (int t = 0; t < KVQ_BLOCK; t++) {
            x[t] = s[t] = t * 7 % 64 < round % 65 ? -INFINITY : 30.0f * test_uniform(&state);
            most = fmaxf(most, x[t]);
        }
        const float got = isa->softmax(s, &largest);
        TEST_CHECK(largest == most);
        for (int t = 0; t < KVQ_BLOCK; t++) {
            const double expected = x[t] == -INFINITY ? 0 : exp((double)(x[t] - most));
            sum += expected;
            if (fabs((double)s[t] - expected) > 4e-7 * expected + 1e-37) {
                return TEST_FAIL("exp(%g): %g, expected %g", (double)(x[t] - most), (double)s[t],
                                 expected);
            }
        }
        if (fabs((double)got - sum) > 1e-5 * sum)
            return TEST_FAIL("sum %g, expected %g", (double)got, sum);
    }
    return NULL;
}

static const char *swiglu_matches_exp(void) {
    const kvq_isa *isa;
    if (kvq_isa_choose(&isa) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    static const float extremes[] = {0,   -0.0f, 1e-30f, -1e-30f, 88,
                                     -88, 1e4f,  -1e4f,  -87.5f,  87.5f};
    float gate[83], up[83], x[83];
    make_floats(gate, 83, 5);
    make_floats(up, 83, 6);
    for (int i = 0; i < 10; i++) gate[i] = extremes[i];
    memcpy(x, gate, sizeof x);
    isa->swiglu(gate, up, 83);
    for (int i = 0; i < 83; i++) {
        const double expected = (double)x[i] / (1 + exp(-(double)x[i])) * (double)up[i];
        if (fabs((double)gate[i] - expected) > 1e-6 * fabs(expected) + 1e-35) {
            return TEST_FAIL("silu(%g) * %g: %g, expected %g", (double)x[i], (double)up[i],
                             (double)gate[i], expected);
        }
    }
    return NULL;
}

/* ---- ring -------------------------------------------------------------------------------- */

enum { MOST_HEADS = 2, PROFILE_D = 64 };

/* A profile of one layer: T is a diagonal times a Hadamard, whose dual is the inverse diagonal
 * times the same. */
static const kvq_profile *make_profile(void) {
    enum { D = PROFILE_D };
    static float store[MOST_HEADS * D * D], query[MOST_HEADS * D * D], mean[MOST_HEADS * D];
    static float restore[MOST_HEADS * D * D], importance[MOST_HEADS * D], ones[] = {1, 1};
    static uint16_t order[MOST_HEADS * D], pair[MOST_HEADS * KVQ_WAVES];
    static float wave_u[MOST_HEADS * KVQ_WAVES * D], wave_w[MOST_HEADS * KVQ_WAVES * D];
    static uint8_t n_waves[MOST_HEADS] = {3, KVQ_WAVES};
    static kvq_profile p = {.n_layers = 1,
                            .n_heads = MOST_HEADS,
                            .d_head = D,
                            .d = D,
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
    make_floats(wave_u, sizeof wave_u / sizeof *wave_u, 31);
    make_floats(wave_w, sizeof wave_w / sizeof *wave_w, 32);
    for (size_t i = 0; i < sizeof wave_u / sizeof *wave_u; i++) {
        wave_u[i] *= 0.3f;
        wave_w[i] *= 0.3f;
    }
    for (int i = 0; i < MOST_HEADS * KVQ_WAVES; i++) pair[i] = (uint16_t)(i % KVQ_WAVES * 2 + 1);
    for (int i = 0; i < MOST_HEADS * D; i++) {
        float row[D] = {0};
        row[i % D] = 1;
        kvq_basis_store(&hadamard, row, D);
        const float size = 1.5f - (float)(i % D) / D;
        mean[i] = 0.1f * (float)(i % 7);
        importance[i] = powf(0.9f, (float)(i % D));
        order[i] = (uint16_t)(i % D * 3 % D); /* 3 has no factor in common with 64 */
        for (int j = 0; j < D; j++) {
            store[(i / D * D + j) * D + i % D] = size * row[j];
            query[(i / D * D + j) * D + i % D] = row[j] / size;
            restore[i * D + j] = row[j] / size;
        }
    }
    return &p;
}

/* The tracks of one layer. */
static const char *make_tracks(kvq_track *tracks, const char *scheme, int n_heads, int d_head) {
    static const bool no_bias[1] = {false};
    kvq_plan_request request = {.n_layers = 1,
                                .n_heads = n_heads,
                                .d_head = d_head,
                                .key_bias = no_bias,
                                .l_k = -1,
                                .l_v = -1};
    if (d_head == PROFILE_D && n_heads == MOST_HEADS) request.profile = make_profile();
    if (kvq_scheme_find(&request.scheme, scheme) != KVQ_OK ||
        kvq_plan_make(tracks, &request) != KVQ_OK) {
        return TEST_FAIL("%s", kvq_error());
    }
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

/* The cache as plain numbers: what kv_ring.h says the ring holds, decoded, in the basis of the
 * scheme. */
static void decode_ring(const kvq_ring *ring, int head, int side, float *x) {
    const int d = ring->d;
    float block[KVQ_BLOCK * 64];
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

enum { A_HEADS = 6, A_KV_HEADS = 2, A_D = 64, A_CTX = 600 };

typedef struct bench {
    kvq_attention a;
    kvq_ring ring;
    kvq_track tracks[KVQ_SIDES * A_KV_HEADS];
    void *memory[2];
} bench;

static const kvq_turns *make_turns(int sinks) {
    enum { PAIRS = A_D / 2, BLOCKS = A_CTX / KVQ_BLOCK };
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

static const char *open_bench(bench *b, const char *scheme, int n_batch, int n_threads) {
    memset(b, 0, sizeof *b);
    if (kvq_isa_choose(&b->a.isa) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    if (kvq_pool_open(&b->a.pool, n_threads) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    const char *const broken = make_tracks(b->tracks, scheme, A_KV_HEADS, A_D);
    if (broken) return broken;
    kvq_arena kv = {0}, scratch = {0};
    for (int round = 0; round < 2; round++) {
        kvq_ring_bytes bytes = {0};
        if (round) {
            b->memory[0] = kv.base = kvq_alloc(kv.used);
            b->memory[1] = scratch.base = kvq_alloc(scratch.used);
            kv.used = scratch.used = 0;
        }
        kvq_ring_lay_out(&b->ring, &kv, &bytes, b->tracks, make_turns(5), A_KV_HEADS, A_D, 5, 64,
                         A_CTX);
        kvq_attention_lay_out(&b->a, &scratch, &b->ring, A_HEADS, A_D, n_batch, n_threads);
    }
    return NULL;
}

static void close_bench(bench *b) {
    kvq_pool_close(b->a.pool);
    kvq_free(b->memory[0]);
    kvq_free(b->memory[1]);
}

static float a_q[A_CTX * A_HEADS * A_D], a_k[A_CTX * A_KV_HEADS * A_D],
    a_v[A_CTX * A_KV_HEADS * A_D];
static float a_out[A_CTX * A_HEADS * A_D], a_other[A_CTX * A_HEADS * A_D];

static void make_inputs(void) {
    make_floats(a_q, sizeof a_q / sizeof *a_q, 21);
    make_floats(a_k, sizeof a_k / sizeof *a_k, 22);
    make_floats(a_v, sizeof a_v / sizeof *a_v, 23);
    for (size_t i = 0; i < sizeof a_q / sizeof *a_q; i++) a_q[i] *= 2.0f;
}

/* Runs tokens first .. end - 1 through the bench in passes of `step` tokens, none of which crosses
 * a seal if `stop_at_seals`. */
static void run_bench(bench *b, float *out, int first, int end, int step, bool stop_at_seals) {
    for (int t = first, n; t < end; t += n) {
        const int until = kvq_ring_until_seal(&b->ring);
        n = end - t < step ? end - t : step;
        if (stop_at_seals && n > until) n = until;
        kvq_attend(&b->a, &b->ring, out + t * A_HEADS * A_D, a_q + t * A_HEADS * A_D,
                   a_k + t * A_KV_HEADS * A_D, a_v + t * A_KV_HEADS * A_D, n);
    }
}

/* What head h of token t must get, by plain loops in f64 over the decoded ring and the token
 * itself. */
static void attend_plainly(float *out, const bench *b, int t, int h) {
    static float keys[A_CTX * A_D], values[A_CTX * A_D];
    const int kv_head = h / (A_HEADS / A_KV_HEADS);
    float q[A_D];
    double score[A_CTX], most = -1e30, sum = 0, o[A_D] = {0};
    decode_ring(&b->ring, kv_head, KVQ_KEYS, keys);
    decode_ring(&b->ring, kv_head, KVQ_VALUES, values);
    memcpy(q, a_q + (t * A_HEADS + h) * A_D, sizeof q);
    memcpy(keys + t * A_D, a_k + (t * A_KV_HEADS + kv_head) * A_D, A_D * sizeof(float));
    memcpy(values + t * A_D, a_v + (t * A_KV_HEADS + kv_head) * A_D, A_D * sizeof(float));
    kvq_basis_query(&b->ring.track[KVQ_KEYS][kv_head].basis, q, A_D);
    kvq_basis_store(&b->ring.track[KVQ_KEYS][kv_head].basis, keys + t * A_D, A_D);
    kvq_basis_store(&b->ring.track[KVQ_VALUES][kv_head].basis, values + t * A_D, A_D);
    for (int j = 0; j <= t; j++) {
        score[j] = 0;
        for (int c = 0; c < A_D; c++) score[j] += (double)q[c] * (double)keys[j * A_D + c];
        score[j] /= sqrt((double)A_D);
        most = fmax(most, score[j]);
    }
    for (int j = 0; j <= t; j++) {
        const double weight = exp(score[j] - most);
        sum += weight;
        for (int c = 0; c < A_D; c++) o[c] += weight * (double)values[j * A_D + c];
    }
    for (int c = 0; c < A_D; c++) out[c] = (float)(o[c] / sum);
    kvq_basis_restore(&b->ring.track[KVQ_VALUES][kv_head].basis, out, A_D);
}

static const char *attention_is_softmax_over_the_cache(void) {
    const int t = A_CTX - 1;
    make_inputs();
    for (int32_t i = 0; i < kvq_scheme_count(); i++) {
        kvq_scheme_info info;
        bench b;
        float expected[A_HEADS][A_D];
        if (kvq_scheme_describe(i, A_D, &info) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
        const char *const broken = open_bench(&b, info.name, 1, 2);
        if (broken) return broken;
        run_bench(&b, a_out, 0, t, 1, false);
        for (int h = 0; h < A_HEADS; h++) attend_plainly(expected[h], &b, t, h);
        run_bench(&b, a_out, t, t + 1, 1, false);
        close_bench(&b);
        for (int h = 0; h < A_HEADS; h++) {
            for (int c = 0; c < A_D; c++) {
                const float got = a_out[(t * A_HEADS + h) * A_D + c];
                /* queries meet u1, u2, u4 and mixed in 8 bits */
                const float most = most_score_off[b.tracks[0].codec] > 1e-3 ? 3e-2f : 1e-4f;
                if (!(fabsf(got - expected[h][c]) <= most)) {
                    return TEST_FAIL("%s, head %d, channel %d: %g, expected %g", info.name, h, c,
                                     (double)got, (double)expected[h][c]);
                }
            }
        }
    }
    return NULL;
}

static const char *attention_does_not_depend_on_cuts_or_threads(void) {
    static const int steps[] = {1, 7, 64, 100};
    make_inputs();
    for (int32_t i = 0; i < kvq_scheme_count(); i++) {
        kvq_scheme_info info;
        if (kvq_scheme_describe(i, A_D, &info) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
        for (int k = 0; k < 8; k++) {
            bench b;
            const char *const broken = open_bench(&b, info.name, 100, 1 + k % 3);
            if (broken) return broken;
            run_bench(&b, k ? a_other : a_out, 0, A_CTX, steps[k % 4], true);
            close_bench(&b);
            if (k && memcmp(a_out, a_other, sizeof a_out) != 0) {
                return TEST_FAIL("%s: passes of %d tokens on %d threads change the result",
                                 info.name, steps[k % 4], 1 + k % 3);
            }
        }
    }
    return NULL;
}

const kvq_test tests_kv[] = {
    {"kv: halves survive f32 and back", halves_round_trip},
    {"kv: f32 rounds to the nearest half, ties to even", halves_round_to_nearest_even},
    {"kv: codecs lose no more than their bits imply", codecs_lose_no_more_than_their_bits_imply},
    {"kv: groups of channels have scales of their own", groups_have_scales_of_their_own},
    {"kv: what is read back is stretched", blocks_are_stretched},
    {"kv: codecs take zeros, infinities and NaN", codecs_take_any_input},
    {"kv: encoded blocks are the frozen ones", blocks_are_the_frozen_ones},
    {"kv: kernels match the reference", kernels_match_the_reference},
    {"kv: a query's result does not depend on its neighbours", queries_do_not_disturb_each_other},
    {"kv: softmax matches exp", softmax_matches_exp},
    {"kv: swiglu matches exp", swiglu_matches_exp},
    {"kv: the ring holds every token where it says", ring_holds_every_token},
    {"kv: attention is softmax over the decoded cache", attention_is_softmax_over_the_cache},
    {"kv: attention does not depend on cuts or threads",
     attention_does_not_depend_on_cuts_or_threads},
    {NULL, NULL},
};
