/* kv_codec_levels.c: n2, n3 and nf4, a codebook of levels times a scale per token.
 *
 * Source: NQKV (arXiv 2505.16210), whose 4 bits are nf4 with the largest magnitude of a block as
 * its scale. At fewer bits quantiles are far from optimal (an error of 0.32 with 4 of them), so n2
 * and n3 have the levels of least mean square error and the scale that fits them best: 0.1175 and
 * 0.0345 for normal data.
 */
#include "kv/kv_codec_parts.h"

const float kvq_n2_level[8] = {KVQ_N2_LEVELS}, kvq_n3_level[8] = {KVQ_N3_LEVELS};
const float kvq_nf4_level[16] = {KVQ_NF4_LEVELS};

/* The nearest level to each x[c] * inverse, by the middles between neighbours that it reaches.
 * Level by level, since that vectorizes everywhere. */
static void choose(uint8_t *code, const float *x, int d, float inverse, const float *level,
                   int levels) {
    for (int c = 0; c < d; c += 16) {
        int32_t reached[16] = {0};
        for (int l = 1; l < levels; l++) {
            const float middle = 0.5f * (level[l - 1] + level[l]);
            for (int i = 0; i < 16; i++) reached[i] += x[c + i] * inverse >= middle;
        }
        for (int i = 0; i < 16; i++) code[c + i] = (uint8_t)reached[i];
    }
}

/* From the root mean square: rounds of (codes for the scale, least-squares scale for the codes). */
static float fit_scale(const float *x, int d, const float *level, int levels) {
    uint8_t code[KVQ_D_MAX];
    kvq_partial_sums power = {{0}};
    for (int c = 0; c < d; c += 16) {
        for (int i = 0; i < 16; i++) power.of[i] += x[c + i] * x[c + i];
    }
    float scale = sqrtf(kvq_total(&power) / (float)d);
    for (int round = 0; round < KVQ_FIT_ROUNDS && scale > 0; round++) {
        float xy = 0, yy = 0;
        choose(code, x, d, 1.0f / scale, level, levels);
        for (int c = 0; c < d; c++) {
            xy += x[c] * level[code[c]];
            yy += level[code[c]] * level[code[c]];
        }
        scale = xy / yy;
    }
    return scale;
}

static float largest_magnitude(const float *x, int d) {
    float largest = 0;
    for (int c = 0; c < d; c++) largest = fmaxf(largest, fabsf(x[c]));
    return largest;
}

static void encode(uint8_t *block, const uint16_t *rows, int d, const float *level, int bits) {
    const size_t row_bytes = (size_t)(d / 8 * bits);
    uint8_t *codes = block + KVQ_N_HEADER;
    memset(codes, 0, KVQ_BLOCK * row_bytes);
    for (int t = 0; t < KVQ_BLOCK; t++, codes += row_bytes) {
        float x[KVQ_D_MAX];
        uint8_t code[KVQ_D_MAX];
        for (int c = 0; c < d; c++) x[c] = kvq_f16_to_f32(rows[t * d + c]);
        const float fit = bits == 4 ? largest_magnitude(x, d) : fit_scale(x, d, level, 1 << bits);
        const uint16_t stored = kvq_f32_to_f16(fminf(fit, 65504.0f));
        memcpy(block + 2 * t, &stored, 2);
        choose(code, x, d, kvq_inverse_or_zero(kvq_f16_to_f32(stored)), level, 1 << bits);
        for (int c = 0; c < d; c++) {
            const int at = c * bits;
            codes[at / 8] |= (uint8_t)(code[c] << at % 8);
            if (at % 8 + bits > 8) codes[at / 8 + 1] |= (uint8_t)(code[c] >> (8 - at % 8));
        }
    }
}

static void decode(float *x, const uint8_t *block, int d, const float *level, int bits) {
    const size_t row_bytes = (size_t)(d / 8 * bits);
    const uint8_t *codes = block + KVQ_N_HEADER;
    for (int t = 0; t < KVQ_BLOCK; t++, codes += row_bytes, x += d) {
        const float scale = kvq_load_f16(block + 2 * t);
        for (int c = 0; c < d; c++) {
            const int at = c * bits;
            int code = codes[at / 8] >> at % 8;
            if (at % 8 + bits > 8) code |= codes[at / 8 + 1] << (8 - at % 8);
            x[c] = scale * level[code & ((1 << bits) - 1)];
        }
    }
}

#define LEVELS_CODEC(NAME, BITS)                                                                   \
    void kvq_encode_##NAME(uint8_t *block, const uint16_t *rows, const kvq_kv_shape *sh) {         \
        encode(block, rows, sh->d, kvq_##NAME##_level, BITS);                                      \
    }                                                                                              \
    void kvq_decode_##NAME(float *x, const uint8_t *block, const kvq_kv_shape *sh) {               \
        decode(x, block, sh->d, kvq_##NAME##_level, BITS);                                         \
    }
LEVELS_CODEC(n2, 2)
LEVELS_CODEC(n3, 3)
LEVELS_CODEC(nf4, 4)
