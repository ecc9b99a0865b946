/* encode_levels.cuh: n2, n3, nf4 (kv/kv_codec_levels.c). */
#ifndef KVQ_CUDA_ENCODE_LEVELS_CUH
#define KVQ_CUDA_ENCODE_LEVELS_CUH

#include "cuda/kernels/encode_parts.cuh"

namespace kvq_encode_levels {

template <int BITS> static __device__ __forceinline__ float level_of(int i) {
    const float n2[8] = {KVQ_N2_LEVELS}, n3[8] = {KVQ_N3_LEVELS}, nf4[16] = {KVQ_NF4_LEVELS};
    return BITS == 2 ? n2[i] : BITS == 3 ? n3[i] : nf4[i];
}

/* The code of the level nearest to x, and the level. */
template <int BITS> static __device__ __forceinline__ int choose(float x, float *level) {
    int code = 0;
    *level = level_of<BITS>(0);
#pragma unroll
    for (int l = 1; l < 1 << BITS; l++) {
        if (x >= 0.5f * (level_of<BITS>(l - 1) + level_of<BITS>(l))) {
            code = l;
            *level = level_of<BITS>(l);
        }
    }
    return code;
}

template <int BITS> static __device__ __forceinline__ float fit_scale(const kvq_rows &rows, int t) {
    kvq_partial_sums power = {{0}};
    for (int c = 0; c < rows.d; c += 16) {
#pragma unroll
        for (int k = 0; k < 16; k++) power.of[k] += rows.at(t, c + k) * rows.at(t, c + k);
    }
    float scale = sqrtf(kvq_total(&power) / (float)rows.d);
    for (int round = 0; round < KVQ_FIT_ROUNDS && scale > 0; round++) {
        const float inverse = 1.0f / scale;
        float xy = 0, yy = 0;
        for (int c = 0; c < rows.d; c++) {
            const float x = rows.at(t, c);
            float y;
            choose<BITS>(x * inverse, &y);
            xy += x * y;
            yy += y * y;
        }
        scale = xy / yy;
    }
    return scale;
}

static __device__ __forceinline__ float largest_magnitude(const kvq_rows &rows, int t) {
    float largest = 0;
    for (int c = 0; c < rows.d; c++) largest = fmaxf(largest, fabsf(rows.at(t, c)));
    return largest;
}

template <int BITS>
static __device__ __forceinline__ void encode(uint8_t *block, const kvq_rows &rows,
                                              float *inverse) {
    const int units = rows.d / 8; /* of 8 channels, which have BITS bytes */
    for (KVQ_EACH(t, KVQ_BLOCK)) {
        const float fit = BITS == 4 ? largest_magnitude(rows, t) : fit_scale<BITS>(rows, t);
        const uint16_t stored = kvq_f32_to_f16(fminf(fit, 65504.0f));
        memcpy(block + 2 * t, &stored, 2);
        inverse[t] = kvq_inverse_or_zero(kvq_f16_to_f32(stored));
    }
    __syncthreads();
    for (KVQ_EACH(i, KVQ_BLOCK * units)) {
        const int t = i / units, first = i % units * 8;
        uint32_t codes = 0;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            float level;
            const int code = choose<BITS>(rows.at(t, first + k) * inverse[t], &level);
            codes |= (uint32_t)code << (BITS * k);
        }
#pragma unroll
        for (int k = 0; k < BITS; k++) {
            block[KVQ_N_HEADER + i * BITS + k] = (uint8_t)(codes >> (8 * k));
        }
    }
}

} // namespace kvq_encode_levels

#endif
