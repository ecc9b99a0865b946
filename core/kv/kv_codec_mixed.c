/* kv_codec_mixed.c: mixed, uniform levels whose number falls with the channel's importance.
 *
 * Source: the mixed widths of SVDq (arXiv 2502.15304, section 4.2) and reverse water-filling; which
 * channel gets how many bits is the plan's matter (kv_plan.c). A channel has a scale of its own in
 * each block: how much it varies there is not what calibration saw on average
 * (docs/schemes/auto.md).
 */
#include "kv/kv_codec_parts.h"

static const int widths[KVQ_RUNS] = {8, 4, 2, 1}; /* bits */

/* The step of 2^bits uniform levels that quantizes a unit normal variable with least mean square
 * error. */
static const float steps[KVQ_RUNS] = {0.0308f, 0.3352f, 0.9957f, 1.5958f};

/* Where a code lies in the units of a token. A channel of 8 bits has two places, 4 bits each. */
typedef struct place {
    int unit, byte, shift;
} place;

static place place_of(int first_unit, int index, int bits) {
    const int per_unit = 16 / bits, i = index % per_unit;
    return (place){first_unit + index / per_unit, i % 2, i / 2 * bits};
}

static size_t unit_at(int t, int unit, int n_units) {
    return ((size_t)(t / 16) * (size_t)n_units + (size_t)unit) * 32 + (size_t)(t % 16) * 2;
}

static int count_units(const kvq_kv_shape *sh) {
    int n = 0;
    for (int run = 0; run < KVQ_RUNS; run++) n += kvq_mixed_units(sh, run);
    return n;
}

static void put(uint8_t *units, int n_units, int t, place p, int code) {
    units[unit_at(t, p.unit, n_units) + (size_t)p.byte] |= (uint8_t)(code << p.shift);
}

static int get(const uint8_t *units, int n_units, int t, place p, int bits) {
    return units[unit_at(t, p.unit, n_units) + (size_t)p.byte] >> p.shift & ((1 << bits) - 1);
}

/* The step with which `half` levels to either side of 0 fit x[KVQ_BLOCK] best, of a few around the
 * one for normal data: channels differ in how heavy their tails are. And what it is stretched by:
 * to the least-squares step for these codes, and beyond. */
static float fit_step(float *stretch, const float *x, float step, int half) {
    static const float factors[] = {0.7f, 0.85f, 1.0f, 1.2f, 1.5f, 2.0f};
    float power = 0, best = 0, least = INFINITY;
    *stretch = 1.0f;
    for (int t = 0; t < KVQ_BLOCK; t++) power += x[t] * x[t];
    for (size_t i = 0; i < sizeof factors / sizeof *factors; i++) {
        const float s = factors[i] * step * sqrtf(power / KVQ_BLOCK);
        const float inverse = kvq_inverse_or_zero(s), middle = (float)half - 0.5f;
        float xy = 0, yy = 0;
        for (int t = 0; t < KVQ_BLOCK; t++) {
            const int code = kvq_clamped(x[t] * inverse + (float)half, 0, 2 * half - 1);
            const float y = (float)code - middle;
            xy += x[t] * y;
            yy += y * y;
        }
        const float error = s * (s * yy - 2.0f * xy); /* without x * x, the same for all */
        if (error < least && s > 0) {
            least = error;
            best = s;
            *stretch = fmaxf(xy / yy / s, 0.1f) * kvq_stretch(power, xy, yy, KVQ_STRETCH_KEYS);
        }
    }
    return best;
}

void kvq_encode_mixed(uint8_t *block, const uint16_t *rows, const kvq_kv_shape *sh) {
    const int d = sh->d, n_units = count_units(sh);
    uint8_t *const scales = block + KVQ_MIXED_HEADER + d, *const units =
                                                              block + kvq_mixed_units_at(sh);
    float x[KVQ_D_MAX][KVQ_BLOCK], mean[KVQ_D_MAX] = {0}, step[KVQ_D_MAX];
    float stretch[KVQ_D_MAX];
    memset(block, 0, kvq_mixed_bytes(sh));
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < d; c++) {
            x[c][t] = kvq_f16_to_f32(rows[t * d + c]);
            mean[c] += x[c][t];
        }
    }
    for (int c = 0; c < d; c++) mean[c] *= 1.0f / KVQ_BLOCK;
    kvq_store_mean(block, block + KVQ_MIXED_HEADER, mean, d);
    for (int run = 0, first = 0, unit = 0; run < KVQ_RUNS; run++) {
        const int n = sh->run[run], bits = widths[run], half = (1 << bits) / 2;
        for (int c = first; c < first + n; c++) {
            for (int t = 0; t < KVQ_BLOCK; t++) x[c][t] -= mean[c];
            step[c] = fit_step(&stretch[c], x[c], steps[run], half);
            step[c] *= stretch[c];
        }
        kvq_store_scales(block + 2 + 2 * run, scales + first, step + first, n);
        for (int c = first; c < first + n; c++) {
            const int i = c - first;
            const float inverse = stretch[c] * kvq_inverse_or_zero(step[c]);
            for (int t = 0; t < KVQ_BLOCK; t++) {
                const int code = kvq_clamped(x[c][t] * inverse + (float)half, 0, 2 * half - 1);
                if (bits == 8) {
                    put(units, n_units, t, place_of(unit, i, 4), code >> 4);
                    put(units, n_units, t, place_of(unit + (n + 3) / 4, i, 4), code & 15);
                } else {
                    put(units, n_units, t, place_of(unit, i, bits), code);
                }
            }
        }
        first += n;
        unit += kvq_mixed_units(sh, run);
    }
}

void kvq_decode_mixed(float *x, const uint8_t *block, const kvq_kv_shape *sh) {
    const int d = sh->d, n_units = count_units(sh);
    const int8_t *const means = (const int8_t *)block + KVQ_MIXED_HEADER;
    const uint8_t *const scales = block + KVQ_MIXED_HEADER + d;
    const uint8_t *const units = block + kvq_mixed_units_at(sh);
    const float mean_unit = kvq_load_f16(block);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < d; c++) x[t * d + c] = mean_unit * (float)means[c];
    }
    for (int run = 0, first = 0, unit = 0; run < KVQ_RUNS; run++) {
        const int n = sh->run[run], bits = widths[run];
        for (int c = first; c < first + n; c++) {
            const int i = c - first;
            const float scale = kvq_load_f16(block + 2 + 2 * run) * (float)scales[c];
            for (int t = 0; t < KVQ_BLOCK; t++) {
                int code;
                if (bits == 8) {
                    code = get(units, n_units, t, place_of(unit, i, 4), 4) << 4 |
                           get(units, n_units, t, place_of(unit + (n + 3) / 4, i, 4), 4);
                } else {
                    code = get(units, n_units, t, place_of(unit, i, bits), bits);
                }
                x[t * d + c] += scale * ((float)code - 0.5f * (float)((1 << bits) - 1));
            }
        }
        first += n;
        unit += kvq_mixed_units(sh, run);
    }
}
