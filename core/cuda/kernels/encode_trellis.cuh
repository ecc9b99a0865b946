/* encode_trellis.cuh: t1, t2 (kv/kv_codec_trellis.c). */
#ifndef KVQ_CUDA_ENCODE_TRELLIS_CUH
#define KVQ_CUDA_ENCODE_TRELLIS_CUH

#include "cuda/kernels/encode_parts.cuh"

namespace kvq_encode_trellis {

/* What led to the states at 4 places in a row, a byte for each, then which windows the path has
 * there: [KVQ_BLOCK / 4][KVQ_CUDA_TRELLIS_STRIDE], a column for each thread. */
typedef uint32_t trace;

template <int BITS> static __device__ __forceinline__ float level_of(int window) {
    const int8_t t1[16] = {KVQ_T1_LEVELS}, t2[16] = {KVQ_T2_LEVELS};
    return KVQ_LEVEL_UNIT * (float)(BITS == 1 ? t1[window] : t2[window]);
}

/* The path of least error for channel c: its words, and its windows in the trace. */
template <int BITS>
static __device__ __forceinline__ void find_path(uint8_t *words, trace *column,
                                                 const kvq_rows &rows, const float *over_scale,
                                                 int c) {
    const int states = 16 >> BITS, branches = 1 << BITS, codes = 32 / BITS;
    float cost[states];
#pragma unroll
    for (int s = 0; s < states; s++) cost[s] = s ? 1e30f : 0.0f;
    for (int p = 0; p < KVQ_BLOCK; p += 4) {
        uint32_t led = 0;
        for (int i = 0; i < 4; i++) {
            const int t = kvq_t_token(p + i, BITS);
            const float z = rows.at(t, c) * over_scale[t];
            float next[states];
#pragma unroll
            for (int s = 0; s < states; s++) {
                uint32_t best = 0;
#pragma unroll
                for (int b = 0; b < branches; b++) {
                    const int window = s * branches + b;
                    const float l = level_of<BITS>(window);
                    const float sum = cost[window % states] + (l * l + -2.0f * l * z);
                    if (b == 0 || sum < next[s]) {
                        next[s] = sum;
                        best = (uint32_t)b;
                    }
                }
                led |= best << (8 * i + BITS * s);
            }
#pragma unroll
            for (int s = 0; s < states; s++) cost[s] = next[s];
        }
        column[p / 4 * KVQ_CUDA_TRELLIS_STRIDE] = led;
    }
    int state = 0;
    float least = cost[0];
#pragma unroll
    for (int s = 1; s < states; s++) {
        if (cost[s] < least) {
            least = cost[s];
            state = s;
        }
    }
    uint32_t word = 0;
    for (int p = KVQ_BLOCK - 4; p >= 0; p -= 4) {
        const uint32_t led = column[p / 4 * KVQ_CUDA_TRELLIS_STRIDE];
        uint32_t windows = 0;
        for (int i = 3; i >= 0; i--) {
            const int branch = (int)(led >> (8 * i + BITS * state)) & (branches - 1);
            const int window = state * branches + branch;
            windows |= (uint32_t)window << (8 * i);
            word = word << BITS | (uint32_t)(window >> (4 - BITS));
            state = window % states;
        }
        column[p / 4 * KVQ_CUDA_TRELLIS_STRIDE] = windows;
        if (p % codes == 0) {
            *(uint32_t *)(words + kvq_t_words_at(c, BITS) + 64 * (p / codes)) = word;
            word = 0;
        }
    }
}

template <int BITS>
static __device__ __forceinline__ void encode(uint8_t *block, const kvq_rows &rows,
                                              float *scratch) {
    const int d = rows.d;
    float *const scale = scratch, *const inverse = scratch + KVQ_BLOCK;
    float *const level = scratch + 2 * KVQ_BLOCK;
    trace *const traces = (trace *)(level + 16);
    const int t = (int)threadIdx.x; /* of the first KVQ_BLOCK threads */
#pragma unroll
    for (int i = 0; i < 16; i++) {
        if (t == i) level[i] = level_of<BITS>(i);
    }
    if (t < KVQ_BLOCK) {
        float power = 0;
        for (int c = 0; c < d; c++) power += rows.at(t, c) * rows.at(t, c);
        scale[t] = sqrtf(power / (float)d);
        inverse[t] = kvq_inverse_or_zero(scale[t]);
    }
    __syncthreads();
    float xy = 0, yy = 0;
    for (int first = 0; first < d; first += KVQ_CUDA_CACHE_THREADS) {
        const int c = first + (int)threadIdx.x, n = min(d - first, KVQ_CUDA_CACHE_THREADS);
        if (c < d) {
            find_path<BITS>(block + KVQ_T_HEADER, traces + threadIdx.x, rows, inverse, c);
        }
        __syncthreads();
        if (t < KVQ_BLOCK) {
            int p = 0; /* the place of token t in the streams */
            for (int i = 0; i < KVQ_BLOCK; i++) p = kvq_t_token(i, BITS) == t ? i : p;
            const trace *const row = traces + p / 4 * KVQ_CUDA_TRELLIS_STRIDE;
            for (int i = 0; i < n; i++) {
                const float z = rows.at(t, first + i) * inverse[t];
                const float y = level[row[i] >> (p % 4 * 8) & 15];
                xy += z * y;
                yy += y * y;
            }
        }
        __syncthreads();
    }
    if (t < KVQ_BLOCK) { /* the scale that fits the levels chosen, stretched */
        const float stretch = kvq_stretch((float)d, xy, yy, KVQ_STRETCH_VALUES);
        scale[t] = yy > 0 ? fmaxf(scale[t] * (xy / yy) * stretch, 0.0f) : 0.0f;
    }
    kvq_put_scales(block, block + 4, scale, KVQ_BLOCK);
    kvq_put_half(block + 2, 0);
}

} // namespace kvq_encode_trellis

#endif
