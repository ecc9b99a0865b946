/* encode_u.cuh: u1, u2, u4 (kv/kv_codec_u.c). */
#ifndef KVQ_CUDA_ENCODE_U_CUH
#define KVQ_CUDA_ENCODE_U_CUH

#include "cuda/kernels/encode_parts.cuh"

namespace kvq_encode_u {

/* Shared memory. Scales of tokens stand group by group of channels. */
struct state {
    float *mean, *b, *over_b; /* [d] */
    float *a, *over_a;        /* [groups * KVQ_BLOCK]; over_a is the stretch in the end */
    float levels;
    int width; /* of a group */
};

/* Makes b[c] such that x / (a * b) has unit mean square along the tokens; then a, along the
 * channels. */
static __device__ __forceinline__ void balance(const state &s, const kvq_rows &rows, int scales) {
    for (KVQ_EACH(c, rows.d)) {
        const float mean = s.mean[c], *const over_a = s.over_a + c / s.width * KVQ_BLOCK;
        float power = 0;
        for (int t = 0; t < KVQ_BLOCK; t++) {
            const float y = (rows.at(t, c) - mean) * over_a[t];
            power += y * y;
        }
        s.b[c] = sqrtf(power * (1.0f / KVQ_BLOCK));
        s.over_b[c] = kvq_inverse_or_zero(s.b[c]);
    }
    __syncthreads();
    for (KVQ_EACH(i, scales)) {
        const int t = i % KVQ_BLOCK, first = i / KVQ_BLOCK * s.width;
        kvq_partial_sums power = {{0}};
        for (int c = first; c < first + s.width; c += 16) {
#pragma unroll
            for (int k = 0; k < 16; k++) {
                const float y = (rows.at(t, c + k) - s.mean[c + k]) * s.over_b[c + k];
                power.of[k] += y * y;
            }
        }
        s.a[i] = sqrtf(kvq_total(&power) / (float)s.width);
        s.over_a[i] = kvq_inverse_or_zero(s.a[i]);
    }
    __syncthreads();
}

/* Least-squares scales of the channels, then of the tokens, for the codes that the scales before
 * give. */
static __device__ __forceinline__ void refine(const state &s, const kvq_rows &rows, int scales) {
    for (KVQ_EACH(c, rows.d)) {
        const float mean = s.mean[c], over_b = s.over_b[c];
        const float *const a = s.a + c / s.width * KVQ_BLOCK;
        const float *const over_a = s.over_a + c / s.width * KVQ_BLOCK;
        float xy = 0, yy = 0;
        for (int t = 0; t < KVQ_BLOCK; t++) {
            const float x = rows.at(t, c) - mean;
            const float y = a[t] * kvq_level_of(x * over_a[t] * over_b, s.levels);
            xy += x * y;
            yy += y * y;
        }
        s.b[c] = yy > 0 ? fmaxf(xy / yy, 0.0f) : 0.0f;
        s.over_b[c] = kvq_inverse_or_zero(s.b[c]);
    }
    __syncthreads();
    for (KVQ_EACH(i, scales)) {
        const int t = i % KVQ_BLOCK, first = i / KVQ_BLOCK * s.width;
        kvq_partial_sums xy = {{0}}, yy = {{0}};
        for (int c = first; c < first + s.width; c += 16) {
#pragma unroll
            for (int k = 0; k < 16; k++) {
                const float x = rows.at(t, c + k) - s.mean[c + k];
                const float y =
                    s.b[c + k] * kvq_level_of(x * s.over_a[i] * s.over_b[c + k], s.levels);
                xy.of[k] += x * y;
                yy.of[k] += y * y;
            }
        }
        const float power = kvq_total(&yy);
        s.a[i] = power > 0 ? fmaxf(kvq_total(&xy) / power, 0.0f) : 0.0f;
        s.over_a[i] = kvq_inverse_or_zero(s.a[i]);
    }
    __syncthreads();
}

/* Stretches a, and leaves what by in over_a. */
static __device__ __forceinline__ void stretch(const state &s, const kvq_rows &rows, int scales) {
    for (KVQ_EACH(i, scales)) {
        const int t = i % KVQ_BLOCK, first = i / KVQ_BLOCK * s.width;
        kvq_partial_sums xx = {{0}}, xy = {{0}}, yy = {{0}};
        for (int c = first; c < first + s.width; c += 16) {
#pragma unroll
            for (int k = 0; k < 16; k++) {
                const float x = rows.at(t, c + k) - s.mean[c + k];
                const float y =
                    s.b[c + k] * kvq_level_of(x * s.over_a[i] * s.over_b[c + k], s.levels);
                xx.of[k] += x * x;
                xy.of[k] += x * y;
                yy.of[k] += y * y;
            }
        }
        const float by =
            kvq_stretch(kvq_total(&xx), kvq_total(&xy), kvq_total(&yy), KVQ_STRETCH_KEYS);
        s.over_a[i] = by;
        s.a[i] *= by;
    }
    __syncthreads();
}

/* A thread for each word of codes: 32 / bits channels of one token. */
static __device__ __forceinline__ void put_codes(uint32_t *codes, const state &s,
                                                 const kvq_rows &rows, int words, int bits) {
    const float middle = 0.5f * (s.levels - 1.0f);
    for (KVQ_EACH(i, KVQ_BLOCK * words)) {
        const int t = i / 8 / words * 8 + i % 8, first = i / 8 % words * (32 / bits);
        uint32_t word = 0;
        for (int j = 0; j < 32 / bits; j++) { /* channel 4j + k: byte k, bits from bits * j on */
            const int c = first + j;
            if (c >= rows.d) break;
            const int at = c / s.width * KVQ_BLOCK + t;
            const float inverse = s.over_a[at] * kvq_inverse_or_zero(s.a[at] * s.b[c]);
            const float level = kvq_level_of((rows.at(t, c) - s.mean[c]) * inverse, s.levels);
            word |= (uint32_t)(int)(level + middle) << (j % 4 * 8 + j / 4 * bits);
        }
        codes[i] = word;
    }
}

static __device__ __forceinline__ void encode(uint8_t *block, const kvq_rows &rows,
                                              const kvq_kv_shape &shape, float *scratch, int bits,
                                              float step) {
    const int d = rows.d, scales = kvq_groups(&shape) * KVQ_BLOCK;
    const state s = {scratch,
                     scratch + d,
                     scratch + 2 * d,
                     scratch + 3 * d,
                     scratch + 3 * d + scales,
                     (float)(1 << bits),
                     shape.group};
    uint8_t *const means = block + kvq_u_means(&shape), *const channels = means + d;
    kvq_take_mean(block, means, s.mean, rows);
    kvq_put_half(block + 6, 0);
    for (KVQ_EACH(i, scales)) s.over_a[i] = 1.0f;
    __syncthreads();
    for (int round = 0; round < KVQ_FIT_ROUNDS; round++) balance(s, rows, scales);
    for (KVQ_EACH(i, scales)) {
        s.a[i] *= step;
        s.over_a[i] = kvq_inverse_or_zero(s.a[i]);
    }
    __syncthreads();
    for (int round = 0; round < KVQ_FIT_ROUNDS; round++) refine(s, rows, scales);
    stretch(s, rows, scales);
    kvq_put_scales(block + 2, block + KVQ_U_SCALES, s.a, scales);
    kvq_put_scales(block + 4, channels, s.b, d);
    __syncthreads();
    put_codes((uint32_t *)(channels + d), s, rows, kvq_u_words(&shape, bits), bits);
}

} // namespace kvq_encode_u

#endif
