/* encode_parts.cuh: what the encoders of codecs share (encode_*.cuh): one block of tokens, worked
 * on by all threads of a CUDA block together.
 *
 * An encoder writes the bytes that its kvq_encode_* in kv/kv_codec_*.c writes: every sum has the
 * same terms in the same order, so a sum over tokens belongs to a thread for each channel, one over
 * channels to a thread for each token. Nothing may be contracted (-fmad=false). Each step leaves
 * shared memory complete for the next one.
 */
#ifndef KVQ_CUDA_ENCODE_PARTS_CUH
#define KVQ_CUDA_ENCODE_PARTS_CUH

#include "cuda/kernels/port.cuh"

#include "cuda/kernels/prepare_args.h"
#include "kv/kv_codec_math.h"

/* The rows to encode, in shared memory. */
struct kvq_rows {
    const uint16_t *halves; /* [KVQ_BLOCK][stride] */
    int stride, d;

    __device__ __forceinline__ float at(int t, int c) const {
        return __half2float(__ushort_as_half(halves[t * stride + c]));
    }
};

/* i = threadIdx.x, threadIdx.x + KVQ_CUDA_CACHE_THREADS, ... below n. */
#define KVQ_EACH(i, n)                                                                             \
    int i = (int)threadIdx.x;                                                                      \
    i < (n);                                                                                       \
    i += KVQ_CUDA_CACHE_THREADS

/* The largest x >= 0 of any thread. */
static __device__ __forceinline__ float kvq_largest_of_block(float x) {
    __shared__ float of_warp[KVQ_CUDA_CACHE_THREADS / 32];
    for (int far = 16; far; far /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, far));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    for (int w = 0; w < KVQ_CUDA_CACHE_THREADS / 32; w++) x = fmaxf(x, of_warp[w]);
    __syncthreads(); /* before it is called again */
    return x;
}

static __device__ __forceinline__ void kvq_put_half(uint8_t *at, uint16_t bits) {
    if (threadIdx.x == 0) memcpy(at, &bits, 2);
}

/* As kvq_store_scales; of scale[i], only thread i % KVQ_CUDA_CACHE_THREADS has what is stored until
 * the next barrier. */
static __device__ __forceinline__ void kvq_put_scales(uint8_t *unit_at, uint8_t *codes,
                                                      float *scale, int n) {
    float largest = 0;
    for (KVQ_EACH(i, n)) largest = fmaxf(largest, scale[i]);
    const uint16_t unit_bits = kvq_unit_of(kvq_largest_of_block(largest), 255.0f);
    const float unit = kvq_f16_to_f32(unit_bits), inverse = kvq_inverse_or_zero(unit);
    kvq_put_half(unit_at, unit_bits);
    for (KVQ_EACH(i, n)) {
        const int code = kvq_clamped(scale[i] * inverse + 0.5f, 0, 255);
        codes[i] = (uint8_t)code;
        scale[i] = unit * (float)code;
    }
}

/* mean[c] becomes the mean of the tokens as stored (kvq_store_mean); what is left of x is
 * rows.at(t, c) - mean[c]. The same holds of mean[c] as of scales. */
static __device__ __forceinline__ void kvq_take_mean(uint8_t *unit_at, uint8_t *codes, float *mean,
                                                     const kvq_rows &rows) {
    float largest = 0;
    for (KVQ_EACH(c, rows.d)) {
        float sum = 0;
        for (int t = 0; t < KVQ_BLOCK; t++) sum += rows.at(t, c);
        mean[c] = sum * (1.0f / KVQ_BLOCK);
        largest = fmaxf(largest, fabsf(mean[c]));
    }
    const uint16_t unit_bits = kvq_unit_of(kvq_largest_of_block(largest), 127.0f);
    const float unit = kvq_f16_to_f32(unit_bits), inverse = kvq_inverse_or_zero(unit);
    kvq_put_half(unit_at, unit_bits);
    for (KVQ_EACH(c, rows.d)) {
        const int code = kvq_clamped(floorf(mean[c] * inverse + 0.5f), -127, 127);
        codes[c] = (uint8_t)code;
        mean[c] = unit * (float)code;
    }
}

#endif
