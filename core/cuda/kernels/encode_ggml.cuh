/* encode_ggml.cuh: f16, q8_0, q4_0 (kv/kv_codec_ggml.c). */
#ifndef KVQ_CUDA_ENCODE_GGML_CUH
#define KVQ_CUDA_ENCODE_GGML_CUH

#include "cuda/kernels/encode_parts.cuh"

namespace kvq_encode_ggml {

static __device__ __forceinline__ void encode_f16(uint8_t *block, const kvq_rows &rows) {
    const int words = rows.d / 2; /* of a row */
    for (KVQ_EACH(i, KVQ_BLOCK * words)) {
        const int at = i / words * rows.stride + i % words * 2;
        ((uint32_t *)block)[i] = *(const uint32_t *)(rows.halves + at);
    }
}

/* Units of 32 channels, a thread for each; units side by side are those of different tokens, whose
 * rows lie in different banks. Unit i of a block begins with its scale. */
static __device__ __forceinline__ void encode_q8_0(uint8_t *block, const kvq_rows &rows) {
    for (KVQ_EACH(i, KVQ_BLOCK * (rows.d / 32))) {
        const int t = i % KVQ_BLOCK, first = i / KVQ_BLOCK * 32;
        uint8_t *const unit = block + (size_t)(t * (rows.d / 32) + first / 32) * 34;
        float largest = 0;
        for (int c = 0; c < 32; c++) largest = fmaxf(largest, fabsf(rows.at(t, first + c)));
        const float scale = largest / 127.0f, inverse = scale ? 1.0f / scale : 0.0f;
        const uint16_t stored = kvq_f32_to_f16(scale);
        memcpy(unit, &stored, 2);
        for (int c = 0; c < 32; c++) {
            const float x = rows.at(t, first + c);
            unit[2 + c] = (uint8_t)kvq_clamped(roundf(x * inverse), -128, 127);
        }
    }
}

static __device__ __forceinline__ int q4_0_code(float x, float inverse) {
    return kvq_clamped(x * inverse + 8.5f, 0, 15);
}

static __device__ __forceinline__ void encode_q4_0(uint8_t *block, const kvq_rows &rows) {
    for (KVQ_EACH(i, KVQ_BLOCK * (rows.d / 32))) {
        const int t = i % KVQ_BLOCK, first = i / KVQ_BLOCK * 32;
        uint8_t *const unit = block + (size_t)(t * (rows.d / 32) + first / 32) * 18;
        float extreme = 0; /* the value of largest magnitude maps to code 0 = -8 */
        for (int c = 0; c < 32; c++) {
            const float x = rows.at(t, first + c);
            if (fabsf(x) > fabsf(extreme)) extreme = x;
        }
        const float scale = extreme / -8.0f, inverse = scale ? 1.0f / scale : 0.0f;
        const uint16_t stored = kvq_f32_to_f16(scale);
        memcpy(unit, &stored, 2);
        for (int c = 0; c < 16; c++) {
            const int low = q4_0_code(rows.at(t, first + c), inverse);
            const int high = q4_0_code(rows.at(t, first + c + 16), inverse);
            unit[2 + c] = (uint8_t)(low | high << 4);
        }
    }
}

} // namespace kvq_encode_ggml

#endif
