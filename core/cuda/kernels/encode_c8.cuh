/* encode_c8.cuh: c8 (kv/kv_codec_c8.c). */
#ifndef KVQ_CUDA_ENCODE_C8_CUH
#define KVQ_CUDA_ENCODE_C8_CUH

#include "cuda/kernels/encode_parts.cuh"

namespace kvq_encode_c8 {

/* The first four points over the scale of a token, and at unit scale. */
struct points {
    float x[4], y[4], unit_x[4], unit_y[4], half_square[4];
};

static __device__ __forceinline__ points points_over(float scale) {
    const int8_t xs[8] = {KVQ_C8_X}, ys[8] = {KVQ_C8_Y};
    const float inverse = kvq_inverse_or_zero(scale);
    points p;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        p.unit_x[i] = KVQ_LEVEL_UNIT * (float)xs[i];
        p.unit_y[i] = KVQ_LEVEL_UNIT * (float)ys[i];
        p.half_square[i] = 0.5f * (p.unit_x[i] * p.unit_x[i] + p.unit_y[i] * p.unit_y[i]);
        p.x[i] = p.unit_x[i] * inverse;
        p.y[i] = p.unit_y[i] * inverse;
    }
    return p;
}

/* The code of the nearest point, whose coordinates are *px and *py. */
static __device__ __forceinline__ int choose(const points &p, float first, float second, float *px,
                                             float *py) {
    float most = -1e30f; /* less than any gain, which is at least -|point|^2 / 2 */
    int best = 0;
    *px = p.unit_x[0];
    *py = p.unit_y[0];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float dot = first * p.x[i] + second * p.y[i];
        const float gain = fabsf(dot) - p.half_square[i];
        if (gain > most) {
            const bool negated = dot < 0.0f;
            most = gain;
            best = negated ? i | 4 : i;
            *px = negated ? -p.unit_x[i] : p.unit_x[i];
            *py = negated ? -p.unit_y[i] : p.unit_y[i];
        }
    }
    return best;
}

/* The scale that fits a token best, stretched; *stretch is what by. */
static __device__ __forceinline__ float fit_scale(float *stretch, const kvq_rows &rows, int t,
                                                  int first, int width) {
    float power = 0;
    for (int c = first; c < first + width; c++) power += rows.at(t, c) * rows.at(t, c);
    float scale = sqrtf(power / (float)width);
    *stretch = 1.0f;
    for (int round = 0; round < KVQ_FIT_ROUNDS; round++) {
        const points p = points_over(scale);
        float xy = 0, yy = 0;
        for (int c = first; c < first + width; c += 4) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float x = rows.at(t, c + i), y = rows.at(t, c + i + 2);
                float px, py;
                choose(p, x, y, &px, &py);
                xy += x * px + y * py;
                yy += px * px + py * py;
            }
        }
        if (!(scale > 0)) continue;
        scale = xy / yy;
        *stretch = kvq_stretch(power, xy, yy, KVQ_STRETCH_VALUES);
    }
    return scale * *stretch;
}

static __device__ __forceinline__ void encode(uint8_t *block, const kvq_rows &rows,
                                              const kvq_kv_shape &shape, float *scratch) {
    const int width = shape.group, scales = kvq_groups(&shape) * KVQ_BLOCK;
    float *const scale = scratch, *const stretch = scratch + scales;
    uint8_t *const words = block + kvq_c8_words(&shape);
    for (KVQ_EACH(i, scales)) {
        scale[i] = fit_scale(&stretch[i], rows, i % KVQ_BLOCK, i / KVQ_BLOCK * width, width);
    }
    kvq_put_scales(block, block + KVQ_C8_SCALES, scale, scales);
    kvq_put_half(block + 2, 0);
    for (KVQ_EACH(i, scales)) scale[i] /= stretch[i];
    __syncthreads();
    for (KVQ_EACH(i, 4 * rows.d)) { /* byte j of the three words of a pair: tokens j, j + 8, ... */
        const int pair = i / 8, j = i % 8, c = kvq_c8_channel(pair);
        int code[8];
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const int t = 8 * k + j;
            const points p = points_over(scale[c / width * KVQ_BLOCK + t]);
            float px, py;
            code[k] = choose(p, rows.at(t, c), rows.at(t, c + 2), &px, &py);
        }
        uint8_t *const word = words + kvq_c8_pair_at(pair) + j;
        word[0] = (uint8_t)(code[0] | code[1] << 3 | (code[6] & 3) << 6);
        word[64] = (uint8_t)(code[2] | code[3] << 3 | (code[7] & 3) << 6);
        word[128] = (uint8_t)(code[4] | code[5] << 3 | code[6] >> 2 << 6 | code[7] >> 2 << 7);
    }
}

} // namespace kvq_encode_c8

#endif
