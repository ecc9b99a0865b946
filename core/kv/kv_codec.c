/* kv_codec.c: the rows of codecs.def: how each codec packs a block and gives it back.
 *
 * Encoding is plain C, compiled with -ffp-contract=off, so that every machine writes the same
 * bytes. A scale is first rounded to what is stored, then the codes are chosen with the rounded one
 * (methods that do it the other way round lose a few percent; SKVQ's published code does).
 */
#include "kv/kv_codec.h"

#include <math.h>

/* x as an integer in lo..hi; NaN gives lo, so that hostile weights cannot make a conversion
 * undefined. */
static int clamped(float x, int lo, int hi) {
    return x > (float)lo ? (x < (float)hi ? (int)x : hi) : lo;
}

/* ---- f16 --------------------------------------------------------------------------------- */

static void encode_f16(uint8_t *block, const uint16_t *rows, int d) {
    memcpy(block, rows, kvq_f16_bytes(d));
}

static void decode_f16(float *x, const uint8_t *block, int d) {
    for (int i = 0; i < KVQ_BLOCK * d; i++) x[i] = kvq_load_f16(block + 2 * i);
}

/* ---- ggml's Q8_0 and Q4_0, with ggml's rounding ------------------------------------------ */

static void encode_q8_0(uint8_t *block, const uint16_t *rows, int d) {
    for (int first = 0; first < KVQ_BLOCK * d; first += 32, block += 34) {
        float x[32], largest = 0;
        for (int i = 0; i < 32; i++) {
            x[i] = kvq_f16_to_f32(rows[first + i]);
            largest = fmaxf(largest, fabsf(x[i]));
        }
        const float scale = largest / 127.0f, inverse = scale ? 1.0f / scale : 0.0f;
        const uint16_t stored = kvq_f32_to_f16(scale);
        memcpy(block, &stored, 2);
        for (int i = 0; i < 32; i++) {
            block[2 + i] = (uint8_t)clamped(roundf(x[i] * inverse), -128, 127);
        }
    }
}

static void decode_q8_0(float *x, const uint8_t *block, int d) {
    for (int first = 0; first < KVQ_BLOCK * d; first += 32, block += 34) {
        const float scale = kvq_load_f16(block);
        for (int i = 0; i < 32; i++) x[first + i] = scale * (float)(int8_t)block[2 + i];
    }
}

static int q4_0_code(float x, float inverse) { return clamped(x * inverse + 8.5f, 0, 15); }

static void encode_q4_0(uint8_t *block, const uint16_t *rows, int d) {
    for (int first = 0; first < KVQ_BLOCK * d; first += 32, block += 18) {
        float x[32], extreme = 0; /* the value of largest magnitude maps to code 0 = -8 */
        for (int i = 0; i < 32; i++) {
            x[i] = kvq_f16_to_f32(rows[first + i]);
            if (fabsf(x[i]) > fabsf(extreme)) extreme = x[i];
        }
        const float scale = extreme / -8.0f, inverse = scale ? 1.0f / scale : 0.0f;
        const uint16_t stored = kvq_f32_to_f16(scale);
        memcpy(block, &stored, 2);
        for (int i = 0; i < 16; i++) {
            block[2 + i] = (uint8_t)(q4_0_code(x[i], inverse) | q4_0_code(x[i + 16], inverse) << 4);
        }
    }
}

static void decode_q4_0(float *x, const uint8_t *block, int d) {
    for (int first = 0; first < KVQ_BLOCK * d; first += 32, block += 18) {
        const float scale = kvq_load_f16(block);
        for (int i = 0; i < 16; i++) {
            x[first + i] = scale * (float)((block[2 + i] & 15) - 8);
            x[first + i + 16] = scale * (float)((block[2 + i] >> 4) - 8);
        }
    }
}

/* ---- scales of u2 and c8 ----------------------------------------------------------------- */

/* Stores n scales >= 0 in 8 bits each below one half for the block; gives them back as stored. The
 * half is the largest scale / 255 rounded up a little, so that no code exceeds 255. Eight bits cost
 * nothing against exact scales (measured: docs/kv-schemes.md). */
static void store_scales(uint8_t *half, uint8_t *codes, float *scale, int n) {
    float largest = 0;
    for (int i = 0; i < n; i++) largest = fmaxf(largest, scale[i]);
    const uint16_t unit_half = kvq_f32_to_f16(fminf(largest / 255.0f * 1.001f, 65504.0f));
    const float unit = kvq_f16_to_f32(unit_half), inverse = unit > 0 ? 1.0f / unit : 0.0f;
    memcpy(half, &unit_half, 2);
    for (int i = 0; i < n; i++) {
        codes[i] = (uint8_t)clamped(scale[i] * inverse + 0.5f, 0, 255);
        scale[i] = unit * (float)codes[i];
    }
}

static float inverse_or_zero(float x) { return x > 0 ? 1.0f / x : 0.0f; }

/* Sums over a row in 16 partial sums: a fixed order that compilers can vectorize. */
typedef struct partial_sums {
    float of[16];
} partial_sums;

static float total(const partial_sums *p) {
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += p->of[i];
    return sum;
}

/* ---- u2 ---------------------------------------------------------------------------------- */

/* The step of 4 uniform levels that quantizes a unit normal variable with least mean square error.
 */
#define U2_STEP 0.9957f

enum { U2_ROUNDS = 2 };

typedef float u2_rows[KVQ_BLOCK][KVQ_D_MAX];

/* x in steps -> code - 1.5, in {-1.5, -0.5, 0.5, 1.5}. Comparisons, since they vectorize
 * everywhere. */
static float u2_level(float x) { return (float)((x >= -1.0f) + (x >= 0.0f) + (x >= 1.0f)) - 1.5f; }

/* Scales a[t] * b[c] such that x[t][c] / (a[t] * b[c]) has unit mean square along rows and columns.
 */
static void u2_balance(float *a, float *b, const u2_rows x, int d) {
    for (int t = 0; t < KVQ_BLOCK; t++) a[t] = 1.0f;
    for (int round = 0; round < U2_ROUNDS; round++) {
        float inverse[KVQ_D_MAX];
        for (int c = 0; c < d; c++) b[c] = 0;
        for (int t = 0; t < KVQ_BLOCK; t++) {
            const float over_a = inverse_or_zero(a[t]);
            for (int c = 0; c < d; c++) b[c] += x[t][c] * over_a * (x[t][c] * over_a);
        }
        for (int c = 0; c < d; c++) {
            b[c] = sqrtf(b[c] * (1.0f / KVQ_BLOCK));
            inverse[c] = inverse_or_zero(b[c]);
        }
        for (int t = 0; t < KVQ_BLOCK; t++) {
            partial_sums power = {{0}};
            for (int c = 0; c < d; c += 16) {
                for (int i = 0; i < 16; i++) {
                    const float y = x[t][c + i] * inverse[c + i];
                    power.of[i] += y * y;
                }
            }
            a[t] = sqrtf(total(&power) / (float)d);
        }
    }
}

/* Least-squares scales of the channels, then of the tokens, for the codes that the scales before
 * give. */
static void u2_refine(float *a, float *b, const u2_rows x, int d) {
    float inverse[KVQ_D_MAX], xy[KVQ_D_MAX] = {0}, yy[KVQ_D_MAX] = {0};
    for (int c = 0; c < d; c++) inverse[c] = inverse_or_zero(b[c]);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        const float over_a = inverse_or_zero(a[t]);
        for (int c = 0; c < d; c++) {
            const float y = a[t] * u2_level(x[t][c] * over_a * inverse[c]);
            xy[c] += x[t][c] * y;
            yy[c] += y * y;
        }
    }
    for (int c = 0; c < d; c++) {
        b[c] = yy[c] > 0 ? fmaxf(xy[c] / yy[c], 0.0f) : 0.0f;
        inverse[c] = inverse_or_zero(b[c]);
    }
    for (int t = 0; t < KVQ_BLOCK; t++) {
        const float over_a = inverse_or_zero(a[t]);
        partial_sums txy = {{0}}, tyy = {{0}};
        for (int c = 0; c < d; c += 16) {
            for (int i = 0; i < 16; i++) {
                const float y = b[c + i] * u2_level(x[t][c + i] * over_a * inverse[c + i]);
                txy.of[i] += x[t][c + i] * y;
                tyy.of[i] += y * y;
            }
        }
        const float power = total(&tyy);
        a[t] = power > 0 ? fmaxf(total(&txy) / power, 0.0f) : 0.0f;
    }
}

static int u2_byte(int t, int c, int d) { /* which byte of the codes holds channel c of token t */
    return (t / 8 * (d / 16) + c / 16) * 32 + t % 8 * 4 + c % 4;
}
static int u2_shift(int c) { return c % 16 / 4 * 2; }

/* Subtracts from x the block's mean, as stored. */
static void u2_take_mean(uint8_t *half, uint8_t *means, u2_rows x, int d) {
    float mean[KVQ_D_MAX] = {0}, largest = 0;
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < d; c++) mean[c] += x[t][c];
    }
    for (int c = 0; c < d; c++) {
        mean[c] *= 1.0f / KVQ_BLOCK;
        largest = fmaxf(largest, fabsf(mean[c]));
    }
    const uint16_t unit_half = kvq_f32_to_f16(largest / 127.0f * 1.001f);
    const float unit = kvq_f16_to_f32(unit_half), inverse = inverse_or_zero(unit);
    memcpy(half, &unit_half, 2);
    for (int c = 0; c < d; c++) {
        const int code = clamped(floorf(mean[c] * inverse + 0.5f), -127, 127);
        means[c] = (uint8_t)code;
        mean[c] = unit * (float)code;
    }
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < d; c++) x[t][c] -= mean[c];
    }
}

static void encode_u2(uint8_t *block, const uint16_t *rows, int d) {
    u2_rows x;
    float a[KVQ_BLOCK], b[KVQ_D_MAX];
    uint8_t *const means = block + KVQ_U2_HEADER, *const channels = means + d,
                   *const codes = channels + d;
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < d; c++) x[t][c] = kvq_f16_to_f32(rows[t * d + c]);
    }
    memset(block, 0, kvq_u2_bytes(d));
    u2_take_mean(block, means, x, d);
    u2_balance(a, b, x, d);
    for (int t = 0; t < KVQ_BLOCK; t++) a[t] *= U2_STEP;
    for (int round = 0; round < U2_ROUNDS; round++) u2_refine(a, b, x, d);
    store_scales(block + 2, block + 8, a, KVQ_BLOCK);
    store_scales(block + 4, channels, b, d);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < d; c++) {
            const float level = u2_level(x[t][c] * inverse_or_zero(a[t] * b[c]));
            codes[u2_byte(t, c, d)] |= (uint8_t)(clamped(level + 1.5f, 0, 3) << u2_shift(c));
        }
    }
}

static void decode_u2(float *x, const uint8_t *block, int d) {
    const uint8_t *const means = block + KVQ_U2_HEADER, *const channels = means + d;
    const uint8_t *const codes = channels + d;
    const float mu = kvq_load_f16(block), au = kvq_load_f16(block + 2),
                bu = kvq_load_f16(block + 4);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        const float a = au * (float)block[8 + t];
        for (int c = 0; c < d; c++) {
            const int code = codes[u2_byte(t, c, d)] >> u2_shift(c) & 3;
            const float step = a * (bu * (float)channels[c]);
            x[t * d + c] = mu * (float)(int8_t)means[c] + step * ((float)code - 1.5f);
        }
    }
}

/* ---- c8 ---------------------------------------------------------------------------------- */

const float kvq_c8_x[8] = {0.357377f,  0.472107f,  0.923501f,  1.605338f,
                           -0.357377f, -0.472107f, -0.923501f, -1.605338f};
const float kvq_c8_y[8] = {-0.320978f, -1.565093f, 1.021948f,  -0.313764f,
                           0.320978f,  1.565093f,  -1.021948f, 0.313764f};

/* The nearest point to each pair: the largest of x * px + y * py - |p|^2 / 2. Points 4..7 are 0..3
 * negated, so half of the products serve. Eight pairs side by side, without branches. */
static void c8_choose(uint8_t *code, const float *x, int d, float scale,
                      const float half_square[4]) {
    const float inverse = inverse_or_zero(scale);
    for (int c = 0; c < d; c += 16, code += 8) {
        float most[8];
        int32_t best[8];
        for (int i = 0; i < 8; i++) {
            most[i] = -INFINITY;
            best[i] = 0;
        }
        for (int p = 0; p < 4; p++) {
            const float px = kvq_c8_x[p] * inverse, py = kvq_c8_y[p] * inverse;
            for (int i = 0; i < 8; i++) {
                const float dot = x[c + i] * px + x[c + i + 8] * py;
                const float gain = fabsf(dot) - half_square[p];
                const int32_t point = dot < 0 ? p + 4 : p;
                best[i] = gain > most[i] ? point : best[i];
                most[i] = gain > most[i] ? gain : most[i];
            }
        }
        for (int i = 0; i < 8; i++) code[i] = (uint8_t)best[i];
    }
}

/* The scale that fits x[d] best: from its root mean square, two rounds of (codes for the scale,
 * least-squares scale for the codes). */
static float c8_fit_scale(const float *x, int d, const float half_square[4]) {
    float power = 0;
    uint8_t code[KVQ_D_MAX / 2];
    for (int c = 0; c < d; c++) power += x[c] * x[c];
    float scale = sqrtf(power / (float)d);
    for (int round = 0; round < 2 && scale > 0; round++) {
        float xy = 0, yy = 0;
        c8_choose(code, x, d, scale, half_square);
        for (int c = 0, pair = 0; c < d; c += 16) {
            for (int i = 0; i < 8; i++, pair++) {
                const float px = kvq_c8_x[code[pair]], py = kvq_c8_y[code[pair]];
                xy += x[c + i] * px + x[c + i + 8] * py;
                yy += px * px + py * py;
            }
        }
        scale = xy / yy;
    }
    return scale;
}

/* Token t of 32 within the three words of its pair (kv_format.h). */
static void c8_put(uint32_t *word, int t, uint32_t code) {
    if (t < 30) {
        word[t / 10 * 8] |= code << t % 10 * 3;
    } else if (t == 30) {
        word[0] |= (code & 3) << 30;
        word[8] |= (code >> 2) << 30;
    } else {
        word[8] |= (code & 1) << 31;
        word[16] |= (code >> 1) << 30;
    }
}

static uint32_t c8_get(const uint32_t *word, int t) {
    if (t < 30) return word[t / 10 * 8] >> t % 10 * 3 & 7;
    if (t == 30) return word[0] >> 30 | (word[8] >> 30 & 1) << 2;
    return word[8] >> 31 | (word[16] >> 30) << 1;
}

static void encode_c8(uint8_t *block, const uint16_t *rows, int d) {
    float x[KVQ_BLOCK][KVQ_D_MAX], scale[KVQ_BLOCK], half_square[4];
    for (int i = 0; i < 4; i++) {
        half_square[i] = 0.5f * (kvq_c8_x[i] * kvq_c8_x[i] + kvq_c8_y[i] * kvq_c8_y[i]);
    }
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < d; c++) x[t][c] = kvq_f16_to_f32(rows[t * d + c]);
        scale[t] = c8_fit_scale(x[t], d, half_square);
    }
    memset(block, 0, kvq_c8_bytes(d));
    store_scales(block, block + 4, scale, KVQ_BLOCK);
    for (int half = 0; half < 2; half++) {
        uint32_t words[KVQ_D_MAX / 16 * 24] = {0};
        for (int t = 0; t < 32; t++) {
            uint8_t code[KVQ_D_MAX / 2];
            c8_choose(code, x[half * 32 + t], d, scale[half * 32 + t], half_square);
            for (int pair = 0; pair < d / 2; pair++) {
                c8_put(words + pair / 8 * 24 + pair % 8, t, code[pair]);
            }
        }
        for (int group = 0; group < d / 16; group++) {
            memcpy(block + KVQ_C8_HEADER + (group * 2 + half) * 96, words + group * 24, 96);
        }
    }
}

static void decode_c8(float *x, const uint8_t *block, int d) {
    const float unit = kvq_load_f16(block);
    for (int group = 0; group < d / 16; group++) {
        for (int half = 0; half < 2; half++) {
            uint32_t words[24];
            memcpy(words, block + KVQ_C8_HEADER + (group * 2 + half) * 96, 96);
            for (int t = 0; t < 32; t++) {
                const float scale = unit * (float)block[4 + half * 32 + t];
                float *const y = x + (half * 32 + t) * d + group * 16;
                for (int i = 0; i < 8; i++) {
                    const uint32_t code = c8_get(words + i, t);
                    y[i] = scale * kvq_c8_x[code];
                    y[i + 8] = scale * kvq_c8_y[code];
                }
            }
        }
    }
}

/* ---- the table --------------------------------------------------------------------------- */

enum {
    multiple_f16 = KVQ_D_UNIT,
    multiple_u2 = KVQ_D_UNIT,
    multiple_c8 = KVQ_D_UNIT,
    multiple_q8_0 = 32,
    multiple_q4_0 = 32
};

const kvq_codec kvq_codecs[KVQ_CODECS] = {
#define KVQ_CODEC(NAME, SUMMARY)                                                                   \
    {#NAME, SUMMARY, multiple_##NAME, kvq_##NAME##_bytes, encode_##NAME, decode_##NAME},
#include "kv/codecs.def"
#undef KVQ_CODEC
};
