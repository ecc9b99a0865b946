/* kv_codec_c8.c: c8, pairs of channels as points of a plane. */
#include "kv/kv_codec_parts.h"

const int8_t kvq_c8_x[8] = {21, 28, 54, 95, -21, -28, -54, -95};
const int8_t kvq_c8_y[8] = {-19, -92, 60, -19, 19, 92, -60, 19};

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

/* The first channel of a pair; the second one is two further. */
static int c8_channel(int pair) { return pair / 2 * 4 + pair % 2; }

/* The nearest point to each pair: the largest of x * px + y * py - |p|^2 / 2, of which half of the
 * products serve. Eight pairs side by side, without branches. */
static void c8_choose(uint8_t *code, const float *x, int d, float scale, const c8_points *points) {
    const float inverse = kvq_inverse_or_zero(scale);
    for (int c = 0; c < d; c += 16, code += 8) {
        float most[8];
        int32_t best[8];
        for (int i = 0; i < 8; i++) {
            most[i] = -INFINITY;
            best[i] = 0;
        }
        for (int p = 0; p < 4; p++) {
            const float px = points->x[p] * inverse, py = points->y[p] * inverse;
            for (int i = 0; i < 8; i++) {
                const int first = c + c8_channel(i);
                const float dot = x[first] * px + x[first + 2] * py;
                const float gain = fabsf(dot) - points->half_square[p];
                const int32_t point = dot < 0 ? p + 4 : p;
                best[i] = gain > most[i] ? point : best[i];
                most[i] = gain > most[i] ? gain : most[i];
            }
        }
        for (int i = 0; i < 8; i++) code[i] = (uint8_t)best[i];
    }
}

/* The scale that fits x[d] best: from its root mean square, two rounds of (codes for the scale,
 * least-squares scale for the codes); and what it is stretched by. */
static float c8_fit_scale(float *stretch, const float *x, int d, const c8_points *points) {
    float power = 0;
    uint8_t code[KVQ_D_MAX / 2];
    for (int c = 0; c < d; c++) power += x[c] * x[c];
    float scale = sqrtf(power / (float)d);
    *stretch = 1.0f;
    for (int round = 0; round < 2 && scale > 0; round++) {
        float xy = 0, yy = 0;
        c8_choose(code, x, d, scale, points);
        for (int pair = 0; pair < d / 2; pair++) {
            const float px = points->x[code[pair]], py = points->y[code[pair]];
            const int first = c8_channel(pair);
            xy += x[first] * px + x[first + 2] * py;
            yy += px * px + py * py;
        }
        scale = xy / yy;
        *stretch = kvq_stretch(power, xy, yy, KVQ_STRETCH_VALUES);
    }
    return scale;
}

/* Where the first word of a pair lies among the words of a block (kv_format.h). */
static size_t c8_pair_at(int pair) { return (size_t)pair / 8 * 192 + (size_t)pair % 8 * 8; }

/* The code of token t in the three words of a pair, which lie 64 bytes apart. */
static void c8_put(uint8_t *pair, int t, int code) {
    uint8_t *const byte = pair + t % 8;
    if (t < 48) {
        byte[t / 16 * 64] |= (uint8_t)(code << t / 8 % 2 * 3);
    } else {
        const int last = t / 8 - 6;
        byte[last * 64] |= (uint8_t)((code & 3) << 6);
        byte[128] |= (uint8_t)((code >> 2) << (6 + last));
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
    uint8_t *const words = block + kvq_c8_words(sh);
    float x[KVQ_BLOCK][KVQ_D_MAX], scale[KVQ_D_MAX / 32 * KVQ_BLOCK];
    float stretch[KVQ_D_MAX / 32 * KVQ_BLOCK];
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < d; c++) x[t][c] = kvq_f16_to_f32(rows[t * d + c]);
        for (int g = 0; g < groups; g++) {
            const int at = g * KVQ_BLOCK + t;
            scale[at] = c8_fit_scale(&stretch[at], x[t] + g * width, width, &points);
            scale[at] *= stretch[at];
        }
    }
    memset(block, 0, kvq_c8_bytes(sh));
    kvq_store_scales(block, block + KVQ_C8_SCALES, scale, groups * KVQ_BLOCK);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        uint8_t code[KVQ_D_MAX / 2];
        for (int g = 0; g < groups; g++) {
            const int at = g * KVQ_BLOCK + t;
            c8_choose(code + g * width / 2, x[t] + g * width, width, scale[at] / stretch[at],
                      &points);
        }
        for (int pair = 0; pair < d / 2; pair++) c8_put(words + c8_pair_at(pair), t, code[pair]);
    }
}

void kvq_decode_c8(float *x, const uint8_t *block, const kvq_kv_shape *sh) {
    const int d = sh->d;
    const float unit = kvq_load_f16(block) * KVQ_LEVEL_UNIT;
    const uint8_t *const words = block + kvq_c8_words(sh);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int pair = 0; pair < d / 2; pair++) {
            const int first = c8_channel(pair), code = c8_get(words + c8_pair_at(pair), t);
            const float scale =
                unit * (float)block[KVQ_C8_SCALES + first / sh->group * KVQ_BLOCK + t];
            x[t * d + first] = scale * (float)kvq_c8_x[code];
            x[t * d + first + 2] = scale * (float)kvq_c8_y[code];
        }
    }
}
