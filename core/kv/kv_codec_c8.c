/* kv_codec_c8.c: c8, pairs of channels as points of a plane. */
#include "kv/kv_codec_parts.h"

const int8_t kvq_c8_x[8] = {KVQ_C8_X}, kvq_c8_y[8] = {KVQ_C8_Y};

/* The points at unit scale; points 4..7 are 0..3 negated. */
typedef struct c8_points {
    float x[8], y[8], half_square[4];
} c8_points;

static c8_points c8_make_points(void) {
    c8_points p;
    for (int i = 0; i < 8; i++) {
        p.x[i] = KVQ_LEVEL_UNIT * (float)kvq_c8_x[i];
        p.y[i] = KVQ_LEVEL_UNIT * (float)kvq_c8_y[i];
    }
    for (int i = 0; i < 4; i++) p.half_square[i] = 0.5f * (p.x[i] * p.x[i] + p.y[i] * p.y[i]);
    return p;
}

/* Numbers by channel, so that all tokens of a block can be worked on side by side; and codes by
 * pair. */
typedef float c8_columns[][KVQ_BLOCK];
typedef int32_t c8_codes[][KVQ_BLOCK];

/* The nearest point to each pair of `width` channels, with a scale for each token: the largest of
 * x * px + y * py - |p|^2 / 2, of which half of the products serve. */
static void c8_choose(c8_codes code, const c8_columns x, int width, const float *scale,
                      const c8_points *points) {
    for (int t = 0; t < KVQ_BLOCK; t += 4) {
        kvq_four inverse = {0}, px[4], py[4];
        for (int i = 0; i < 4; i++) inverse[i] = kvq_inverse_or_zero(scale[t + i]);
        for (int p = 0; p < 4; p++) {
            px[p] = points->x[p] * inverse;
            py[p] = points->y[p] * inverse;
        }
        for (int pair = 0; pair < width / 2; pair++) {
            const kvq_four first = kvq_load_four(x[kvq_c8_channel(pair)] + t);
            const kvq_four second = kvq_load_four(x[kvq_c8_channel(pair) + 2] + t);
            kvq_four most = (kvq_four){0} - INFINITY;
            kvq_four_ints best = {0};
            for (int p = 0; p < 4; p++) {
                const kvq_four dot = first * px[p] + second * py[p];
                const kvq_four magnitude = (kvq_four)((kvq_four_ints)dot & 0x7fffffff);
                const kvq_four gain = magnitude - points->half_square[p];
                const kvq_four_ints point = p | ((dot < 0.0f) & 4), more = gain > most;
                best = kvq_where_ints(more, point, best);
                most = kvq_where(more, gain, most);
            }
            memcpy(code[pair] + t, &best, sizeof best);
        }
    }
}

/* The scale that fits each token best: from its root mean square, two rounds of (codes for the
 * scale, least-squares scale for the codes); and what it is stretched by. */
static void c8_fit_scales(float *scale, float *stretch, c8_codes code, const c8_columns x,
                          int width, const c8_points *points) {
    float power[KVQ_BLOCK] = {0};
    for (int c = 0; c < width; c++) {
        for (int t = 0; t < KVQ_BLOCK; t++) power[t] += x[c][t] * x[c][t];
    }
    for (int t = 0; t < KVQ_BLOCK; t++) {
        scale[t] = sqrtf(power[t] / (float)width);
        stretch[t] = 1.0f;
    }
    for (int round = 0; round < KVQ_FIT_ROUNDS; round++) {
        float xy[KVQ_BLOCK] = {0}, yy[KVQ_BLOCK] = {0};
        c8_choose(code, x, width, scale, points);
        for (int pair = 0; pair < width / 2; pair++) {
            const int c = kvq_c8_channel(pair);
            for (int t = 0; t < KVQ_BLOCK; t++) {
                const float px = points->x[code[pair][t]], py = points->y[code[pair][t]];
                xy[t] += x[c][t] * px + x[c + 2][t] * py;
                yy[t] += px * px + py * py;
            }
        }
        for (int t = 0; t < KVQ_BLOCK; t++) {
            if (!(scale[t] > 0)) continue;
            scale[t] = xy[t] / yy[t];
            stretch[t] = kvq_stretch(power[t], xy[t], yy[t], KVQ_STRETCH_VALUES);
        }
    }
}

/* The three words of a pair (kv_format.h). */
static void c8_put(uint8_t *word, const int32_t code[KVQ_BLOCK]) {
    for (int j = 0; j < 8; j++) {
        const int32_t *const c = code + j;
        word[j] = (uint8_t)(c[0] | c[8] << 3 | (c[48] & 3) << 6);
        word[64 + j] = (uint8_t)(c[16] | c[24] << 3 | (c[56] & 3) << 6);
        word[128 + j] = (uint8_t)(c[32] | c[40] << 3 | c[48] >> 2 << 6 | c[56] >> 2 << 7);
    }
}

static int c8_get(const uint8_t *pair, int t) {
    const uint8_t *const byte = pair + t % 8;
    if (t < 48) return byte[t / 16 * 64] >> t / 8 % 2 * 3 & 7;
    const int last = t / 8 - 6;
    return byte[last * 64] >> 6 | (byte[128] >> (6 + last) & 1) << 2;
}

void kvq_encode_c8(uint8_t *block, const uint16_t *rows, const kvq_kv_shape *sh) {
    const int d = sh->d, width = sh->group, groups = kvq_groups(sh);
    const c8_points points = c8_make_points();
    float x[KVQ_D_MAX][KVQ_BLOCK], scale[KVQ_D_MAX / 32 * KVQ_BLOCK];
    float stretch[KVQ_D_MAX / 32 * KVQ_BLOCK];
    int32_t code[KVQ_D_MAX / 2][KVQ_BLOCK];
    for (int t = 0; t < KVQ_BLOCK; t++) {
        float row[KVQ_D_MAX];
        kvq_halves_to_f32(row, rows + t * d, d);
        for (int c = 0; c < d; c++) x[c][t] = row[c];
    }
    for (int g = 0; g < groups; g++) {
        const int at = g * KVQ_BLOCK;
        c8_fit_scales(scale + at, stretch + at, code, x + g * width, width, &points);
        for (int t = at; t < at + KVQ_BLOCK; t++) scale[t] *= stretch[t];
    }
    kvq_store_scales(block, block + KVQ_C8_SCALES, scale, groups * KVQ_BLOCK);
    memset(block + 2, 0, KVQ_C8_SCALES - 2);
    for (int i = 0; i < groups * KVQ_BLOCK; i++) scale[i] /= stretch[i];
    for (int g = 0; g < groups; g++) {
        c8_choose(code + g * width / 2, x + g * width, width, scale + g * KVQ_BLOCK, &points);
    }
    for (int pair = 0; pair < d / 2; pair++) {
        c8_put(block + kvq_c8_words(sh) + kvq_c8_pair_at(pair), code[pair]);
    }
}

void kvq_decode_c8(float *x, const uint8_t *block, const kvq_kv_shape *sh) {
    const int d = sh->d;
    const float unit = kvq_load_f16(block) * KVQ_LEVEL_UNIT;
    const uint8_t *const words = block + kvq_c8_words(sh);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int pair = 0; pair < d / 2; pair++) {
            const int first = kvq_c8_channel(pair), code = c8_get(words + kvq_c8_pair_at(pair), t);
            const float scale =
                unit * (float)block[KVQ_C8_SCALES + first / sh->group * KVQ_BLOCK + t];
            x[t * d + first] = scale * (float)kvq_c8_x[code];
            x[t * d + first + 2] = scale * (float)kvq_c8_y[code];
        }
    }
}
