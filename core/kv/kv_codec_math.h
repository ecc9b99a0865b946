/* kv_codec_math.h: the arithmetic of encoders that CPUs and GPUs share, number by number. Both must
 * write the same bytes, so all of it is compiled without contraction of products into sums.
 *
 * C11 and C++14. Called by kv_codec_*.c and cuda/kernels/encode_*.cuh.
 */
#ifndef KVQ_KV_CODEC_MATH_H
#define KVQ_KV_CODEC_MATH_H

#include "bytes.h"

/* x as an integer in lo..hi; NaN gives lo, so that hostile weights cannot make a conversion
 * undefined. */
KVQ_BOTH int kvq_clamped(float x, int lo, int hi) {
    return x > (float)lo ? (x < (float)hi ? (int)x : hi) : lo;
}

KVQ_BOTH float kvq_inverse_or_zero(float x) { return x > 0 ? 1.0f / x : 0.0f; }

/* The half in units of which numbers up to `largest` are stored in codes up to `highest`: rounded
 * up a little, so that no code exceeds it. */
KVQ_BOTH uint16_t kvq_unit_of(float largest, float highest) {
    const float unit = largest / highest * 1.001f;
    return kvq_f32_to_f16(unit < 65504.0f ? unit : 65504.0f);
}

/* What levels fitted by least squares are stretched by, from the sums of x * x, x * y and y * y
 * over numbers x and levels y.
 *
 * Least squares make what is read back too short: along x it is 1 - D of x, where D is the relative
 * error. Attention averages over many tokens, in which the rest of the error cancels out and this
 * does not. Undone whole (`part` 1), <x, read back> = <x, x>: the estimate has no bias, as in
 * RaBitQ (arXiv 2405.12497, section 3). Codes are chosen before, for the scales that fit best. */
KVQ_BOTH float kvq_stretch(float xx, float xy, float yy, float part) {
    const float kept = xx > 0 && yy > 0 ? xy * xy / (xx * yy) : 1.0f; /* 1 - D */
    const float left = 1.0f - part * (1.0f - kept);
    return left > 0.25f ? 1.0f / left : 4.0f;
}

/* How much of it is undone. Values: all, since weights average them. Keys: half, since what noise
 * adds to a logit raises its weight on average (E[e^x] > e^E[x]), as the whole would. Measured:
 * docs/schemes/skvq.md. */
#define KVQ_STRETCH_KEYS 0.5f
#define KVQ_STRETCH_VALUES 1.0f

/* The step of 2^b uniform levels that quantizes a unit normal variable with least mean square error
 * (Max, 1960), for b bits. */
#define KVQ_STEP_1 1.5958f
#define KVQ_STEP_2 0.9957f
#define KVQ_STEP_4 0.3352f
#define KVQ_STEP_8 0.0308f

/* u1, u2, u4: x in steps -> the level that it falls to: code - (levels - 1) / 2. Beyond 1.5 * 2^23
 * floats have no fractions, so that adding and subtracting it rounds, which vectorizes everywhere.
 */
KVQ_BOTH float kvq_level_of(float x, float levels) {
    const float rounding = 12582912.0f;
    const float lowest = 0.5f - 0.5f * levels, highest = 0.5f * levels - 0.5f;
    const float level = x - 0.5f + rounding - rounding + 0.5f;
    const float low = level > lowest ? level : lowest;
    return low < highest ? low : highest;
}

/* mixed: factors of the step for normal data that are tried for each channel, since channels differ
 * in how heavy their tails are. */
#define KVQ_MIXED_FACTORS 0.7f, 0.85f, 1.0f, 1.2f, 1.5f, 2.0f

/* Rounds of (codes for the scales, least-squares scales for the codes). */
#define KVQ_FIT_ROUNDS 2

/* Sums over a row in 16 partial sums: a fixed order that compilers can vectorize. */
typedef struct kvq_partial_sums {
    float of[16];
} kvq_partial_sums;

KVQ_BOTH float kvq_total(const kvq_partial_sums *p) {
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += p->of[i];
    return sum;
}

#endif
