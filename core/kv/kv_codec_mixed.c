/* kv_codec_mixed.c: mixed, uniform levels whose number falls with the channel's importance.
 *
 * Source: the mixed widths of SVDq (arXiv 2502.15304, section 4.2) and reverse water-filling; which
 * channel gets how many bits is the plan's matter (kv_plan.c). A channel has a scale of its own in
 * each block: how much it varies there is not what calibration saw on average
 * (docs/schemes/auto.md).
 */
#include "kv/kv_codec_parts.h"

static const int widths[KVQ_RUNS] = {8, 4, 2, 1}; /* bits */
static const float steps[KVQ_RUNS] = {KVQ_STEP_8, KVQ_STEP_4, KVQ_STEP_2, KVQ_STEP_1};

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

static int get(const uint8_t *units, int n_units, int t, place p, int bits) {
    return units[unit_at(t, p.unit, n_units) + (size_t)p.byte] >> p.shift & ((1 << bits) - 1);
}

typedef float mixed_rows[KVQ_BLOCK][KVQ_D_MAX];

/* Codes of four channels of a token, by their steps' inverses. */
static kvq_four_ints codes_of(const float *x, kvq_four inverse, int half) {
    const kvq_four none = {0}, highest = none + (2.0f * (float)half - 1.0f);
    const kvq_four level = kvq_load_four(x) * inverse + (float)half;
    const kvq_four low = kvq_where(level > none, level, none);
    return __builtin_convertvector(kvq_where(low < highest, low, highest), kvq_four_ints);
}

/* The steps with which `half` levels to either side of 0 fit channels c .. c + 3 best, of a few
 * around the one for normal data: channels differ in how heavy their tails are. And what they are
 * stretched by: to the least-squares step for these codes, and beyond. */
static void fit_steps(float step[4], float stretch[4], const mixed_rows x, int c, float normal_step,
                      int half) {
    static const float factors[] = {KVQ_MIXED_FACTORS};
    const float middle = (float)half - 0.5f;
    float least[4];
    kvq_four power = {0};
    for (int t = 0; t < KVQ_BLOCK; t++) {
        power += kvq_load_four(x[t] + c) * kvq_load_four(x[t] + c);
    }
    for (int i = 0; i < 4; i++) {
        step[i] = 0;
        stretch[i] = 1.0f;
        least[i] = INFINITY;
    }
    for (size_t k = 0; k < sizeof factors / sizeof *factors; k++) {
        kvq_four s = {0}, inverse = {0}, xy = {0}, yy = {0};
        for (int i = 0; i < 4; i++) {
            s[i] = factors[k] * normal_step * sqrtf(power[i] / KVQ_BLOCK);
            inverse[i] = kvq_inverse_or_zero(s[i]);
        }
        for (int t = 0; t < KVQ_BLOCK; t++) {
            const kvq_four_ints code = codes_of(x[t] + c, inverse, half);
            const kvq_four y = __builtin_convertvector(code, kvq_four) - middle;
            xy += kvq_load_four(x[t] + c) * y;
            yy += y * y;
        }
        for (int i = 0; i < 4; i++) {
            /* without x * x, the same for all */
            const float error = s[i] * (s[i] * yy[i] - 2.0f * xy[i]);
            if (!(error < least[i] && s[i] > 0)) continue;
            least[i] = error;
            step[i] = s[i];
            stretch[i] = fmaxf(xy[i] / yy[i] / s[i], 0.1f) *
                         kvq_stretch(power[i], xy[i], yy[i], KVQ_STRETCH_KEYS);
        }
    }
}

/* Puts codes[t][i], `bits` of each from `low` on, where the channels of index at .. at + 3 of a run
 * that begins with unit `first` have theirs. */
static void put(uint8_t *units, int n_units, int first, int at, int bits, int low,
                const kvq_four_ints codes[KVQ_BLOCK]) {
    for (int i = 0; i < 4; i++) {
        const place p = place_of(first, at + i, bits);
        for (int t = 0; t < KVQ_BLOCK; t++) {
            const int code = codes[t][i] >> low & ((1 << bits) - 1);
            units[unit_at(t, p.unit, n_units) + (size_t)p.byte] |= (uint8_t)(code << p.shift);
        }
    }
}

void kvq_encode_mixed(uint8_t *block, const uint16_t *rows, const kvq_kv_shape *sh) {
    const int d = sh->d, n_units = count_units(sh);
    uint8_t *const scales = block + KVQ_MIXED_HEADER + d;
    uint8_t *const units = block + kvq_mixed_units_at(sh);
    mixed_rows x;
    float mean[KVQ_D_MAX] = {0}, step[KVQ_D_MAX], stretch[KVQ_D_MAX];
    memset(block, 0, kvq_mixed_bytes(sh));
    for (int t = 0; t < KVQ_BLOCK; t++) {
        kvq_halves_to_f32(x[t], rows + t * d, d);
        for (int c = 0; c < d; c++) mean[c] += x[t][c];
    }
    for (int c = 0; c < d; c++) mean[c] *= 1.0f / KVQ_BLOCK;
    kvq_store_mean(block, block + KVQ_MIXED_HEADER, mean, d);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        for (int c = 0; c < d; c++) x[t][c] -= mean[c];
    }
    for (int run = 0, first = 0, unit = 0; run < KVQ_RUNS; run++) {
        const int n = sh->run[run], bits = widths[run], half = (1 << bits) / 2;
        for (int c = first; c < first + n; c += 4) { /* runs are multiples of 4 */
            fit_steps(step + c, stretch + c, x, c, steps[run], half);
            for (int i = c; i < c + 4; i++) step[i] *= stretch[i];
        }
        kvq_store_scales(block + 2 + 2 * run, scales + first, step + first, n);
        for (int c = first; c < first + n; c += 4) {
            kvq_four_ints codes[KVQ_BLOCK];
            kvq_four inverse = {0};
            for (int i = 0; i < 4; i++) {
                inverse[i] = stretch[c + i] * kvq_inverse_or_zero(step[c + i]);
            }
            for (int t = 0; t < KVQ_BLOCK; t++) codes[t] = codes_of(x[t] + c, inverse, half);
            if (bits == 8) {
                put(units, n_units, unit, c - first, 4, 4, codes);
                put(units, n_units, unit + (n + 3) / 4, c - first, 4, 0, codes);
            } else {
                put(units, n_units, unit, c - first, bits, 0, codes);
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
