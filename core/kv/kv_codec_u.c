/* kv_codec_u.c: u1, u2 and u4, uniform levels around the mean of the block. */
#include "kv/kv_codec_parts.h"

enum { MOST_GROUPS = KVQ_D_MAX / 32 };

typedef float u_rows[KVQ_BLOCK][KVQ_D_MAX];
typedef float u_scales[MOST_GROUPS * KVQ_BLOCK]; /* of tokens, group by group of channels */

/* Scales a[g][t] * b[c] such that x[t][c] / (a * b) has unit mean square along channels and along
 * tokens. */
static void balance(u_scales a, float *b, const u_rows x, const kvq_kv_shape *sh) {
    const int d = sh->d, width = sh->group, groups = kvq_groups(sh);
    for (int i = 0; i < groups * KVQ_BLOCK; i++) a[i] = 1.0f;
    for (int round = 0; round < KVQ_FIT_ROUNDS; round++) {
        float inverse[KVQ_D_MAX];
        for (int c = 0; c < d; c++) b[c] = 0;
        for (int t = 0; t < KVQ_BLOCK; t++) {
            for (int g = 0; g < groups; g++) {
                const float over_a = kvq_inverse_or_zero(a[g * KVQ_BLOCK + t]);
                for (int c = g * width; c < (g + 1) * width; c++) {
                    b[c] += x[t][c] * over_a * (x[t][c] * over_a);
                }
            }
        }
        for (int c = 0; c < d; c++) {
            b[c] = sqrtf(b[c] * (1.0f / KVQ_BLOCK));
            inverse[c] = kvq_inverse_or_zero(b[c]);
        }
        for (int t = 0; t < KVQ_BLOCK; t++) {
            for (int g = 0; g < groups; g++) {
                kvq_partial_sums power = {{0}};
                for (int c = g * width; c < (g + 1) * width; c += 16) {
                    for (int i = 0; i < 16; i++) {
                        const float y = x[t][c + i] * inverse[c + i];
                        power.of[i] += y * y;
                    }
                }
                a[g * KVQ_BLOCK + t] = sqrtf(kvq_total(&power) / (float)width);
            }
        }
    }
}

/* Least-squares scales of the channels, then of the tokens, for the codes that the scales before
 * give. */
static void refine(u_scales a, float *b, const u_rows x, const kvq_kv_shape *sh, float levels) {
    const int d = sh->d, width = sh->group, groups = kvq_groups(sh);
    float inverse[KVQ_D_MAX], xy[KVQ_D_MAX] = {0}, yy[KVQ_D_MAX] = {0};
    for (int c = 0; c < d; c++) inverse[c] = kvq_inverse_or_zero(b[c]);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int g = 0; g < groups; g++) {
            const float scale = a[g * KVQ_BLOCK + t], over_a = kvq_inverse_or_zero(scale);
            for (int c = g * width; c < (g + 1) * width; c++) {
                const float y = scale * kvq_level_of(x[t][c] * over_a * inverse[c], levels);
                xy[c] += x[t][c] * y;
                yy[c] += y * y;
            }
        }
    }
    for (int c = 0; c < d; c++) {
        b[c] = yy[c] > 0 ? fmaxf(xy[c] / yy[c], 0.0f) : 0.0f;
        inverse[c] = kvq_inverse_or_zero(b[c]);
    }
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int g = 0; g < groups; g++) {
            const float over_a = kvq_inverse_or_zero(a[g * KVQ_BLOCK + t]);
            kvq_partial_sums txy = {{0}}, tyy = {{0}};
            for (int c = g * width; c < (g + 1) * width; c += 16) {
                for (int i = 0; i < 16; i++) {
                    const float y =
                        b[c + i] * kvq_level_of(x[t][c + i] * over_a * inverse[c + i], levels);
                    txy.of[i] += x[t][c + i] * y;
                    tyy.of[i] += y * y;
                }
            }
            const float power = kvq_total(&tyy);
            a[g * KVQ_BLOCK + t] = power > 0 ? fmaxf(kvq_total(&txy) / power, 0.0f) : 0.0f;
        }
    }
}

/* What the scales of tokens are stretched by. */
static void find_stretch(u_scales stretch, const u_scales a, const float *b, const u_rows x,
                         const kvq_kv_shape *sh, float levels) {
    const int width = sh->group, groups = kvq_groups(sh);
    float inverse[KVQ_D_MAX];
    for (int c = 0; c < sh->d; c++) inverse[c] = kvq_inverse_or_zero(b[c]);
    for (int i = 0; i < groups * KVQ_BLOCK; i++) {
        const int t = i % KVQ_BLOCK, first = i / KVQ_BLOCK * width;
        const float over_a = kvq_inverse_or_zero(a[i]);
        kvq_partial_sums xx = {{0}}, xy = {{0}}, yy = {{0}};
        for (int c = first; c < first + width; c += 16) {
            for (int k = 0; k < 16; k++) {
                const float z = x[t][c + k];
                const float y = b[c + k] * kvq_level_of(z * over_a * inverse[c + k], levels);
                xx.of[k] += z * z;
                xy.of[k] += z * y;
                yy.of[k] += y * y;
            }
        }
        stretch[i] = kvq_stretch(kvq_total(&xx), kvq_total(&xy), kvq_total(&yy), KVQ_STRETCH_KEYS);
    }
}

/* Subtracts from x the block's mean, as stored. */
static void take_mean(uint8_t *half, uint8_t *means, u_rows x, int d) {
    float mean[KVQ_D_MAX] = {0};
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < d; c++) mean[c] += x[t][c];
    }
    for (int c = 0; c < d; c++) mean[c] *= 1.0f / KVQ_BLOCK;
    kvq_store_mean(half, means, mean, d);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < d; c++) x[t][c] -= mean[c];
    }
}

/* Where the code of channel c of token t lies. */
typedef struct place {
    size_t byte;
    int shift;
} place;

static place place_of(int t, int c, int words, int bits) {
    const int n = 32 / bits; /* channels per word */
    return (place){((size_t)(t / 8 * words + c / n) * 8 + (size_t)(t % 8)) * 4 + (size_t)(c % 4),
                   c % n / 4 * bits};
}

static void encode(uint8_t *block, const uint16_t *rows, const kvq_kv_shape *sh, int bits,
                   float step) {
    const int d = sh->d, groups = kvq_groups(sh), words = kvq_u_words(sh, bits);
    const float levels = (float)(1 << bits), middle = 0.5f * (levels - 1.0f);
    u_rows x;
    u_scales a, stretch;
    float b[KVQ_D_MAX];
    uint8_t *const means = block + kvq_u_means(sh), *const channels = means + d;
    uint8_t *const codes = channels + d;
    for (int t = 0; t < KVQ_BLOCK; t++) {
        kvq_halves_to_f32(x[t], rows + t * d, d);
    }
    memset(block, 0, kvq_u_bytes(sh, bits));
    take_mean(block, means, x, d);
    balance(a, b, x, sh);
    for (int i = 0; i < groups * KVQ_BLOCK; i++) a[i] *= step;
    for (int round = 0; round < KVQ_FIT_ROUNDS; round++) refine(a, b, x, sh, levels);
    find_stretch(stretch, a, b, x, sh, levels);
    for (int i = 0; i < groups * KVQ_BLOCK; i++) a[i] *= stretch[i];
    kvq_store_scales(block + 2, block + KVQ_U_SCALES, a, groups * KVQ_BLOCK);
    kvq_store_scales(block + 4, channels, b, d);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < d; c++) {
            const int at = c / sh->group * KVQ_BLOCK + t;
            const float inverse = stretch[at] * kvq_inverse_or_zero(a[at] * b[c]);
            const float level = kvq_level_of(x[t][c] * inverse, levels);
            const place p = place_of(t, c, words, bits);
            codes[p.byte] |= (uint8_t)((int)(level + middle) << p.shift);
        }
    }
}

static void decode(float *x, const uint8_t *block, const kvq_kv_shape *sh, int bits) {
    const int d = sh->d, words = kvq_u_words(sh, bits);
    const float middle = 0.5f * (float)((1 << bits) - 1);
    const uint8_t *const means = block + kvq_u_means(sh), *const channels = means + d;
    const uint8_t *const codes = channels + d;
    const float mu = kvq_load_f16(block), au = kvq_load_f16(block + 2),
                bu = kvq_load_f16(block + 4);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < d; c++) {
            const place p = place_of(t, c, words, bits);
            const int code = codes[p.byte] >> p.shift & ((1 << bits) - 1);
            const float a = au * (float)block[KVQ_U_SCALES + c / sh->group * KVQ_BLOCK + t];
            const float step = a * (bu * (float)channels[c]);
            x[t * d + c] = mu * (float)(int8_t)means[c] + step * ((float)code - middle);
        }
    }
}

#define U_CODEC(NAME, BITS)                                                                        \
    void kvq_encode_##NAME(uint8_t *block, const uint16_t *rows, const kvq_kv_shape *sh) {         \
        encode(block, rows, sh, BITS, KVQ_STEP_##BITS);                                            \
    }                                                                                              \
    void kvq_decode_##NAME(float *x, const uint8_t *block, const kvq_kv_shape *sh) {               \
        decode(x, block, sh, BITS);                                                                \
    }
U_CODEC(u1, 1)
U_CODEC(u2, 2)
U_CODEC(u4, 4)
