/* encode_mixed.cuh: mixed (kv/kv_codec_mixed.c). */
#ifndef KVQ_CUDA_ENCODE_MIXED_CUH
#define KVQ_CUDA_ENCODE_MIXED_CUH

#include "cuda/kernels/encode_parts.cuh"

namespace kvq_encode_mixed {

static __device__ __forceinline__ int width_of(int run) { return 8 >> run; } /* bits */

static __device__ __forceinline__ float normal_step(int run) {
    return run == 0 ? KVQ_STEP_8 : run == 1 ? KVQ_STEP_4 : run == 2 ? KVQ_STEP_2 : KVQ_STEP_1;
}

/* The code of x, among `side` levels to either side of 0. */
static __device__ __forceinline__ int code_of(float x, float inverse, float side) {
    const float level = x * inverse + side, highest = 2.0f * side - 1.0f;
    const float low = level > 0.0f ? level : 0.0f;
    return (int)(low < highest ? low : highest);
}

/* The step that fits channel c best, stretched; *stretch is what by. */
static __device__ __forceinline__ float fit_step(float *stretch, const kvq_rows &rows, float mean,
                                                 int c, int run) {
    const float factors[] = {KVQ_MIXED_FACTORS};
    const int n = sizeof factors / sizeof *factors;
    const float side = (float)(1 << width_of(run)) * 0.5f, middle = side - 0.5f;
    float step[n], inverse[n], xy[n], yy[n], power = 0;
    for (int t = 0; t < KVQ_BLOCK; t++) {
        const float x = rows.at(t, c) - mean;
        power += x * x;
    }
    const float root = sqrtf(power / KVQ_BLOCK);
#pragma unroll
    for (int k = 0; k < n; k++) {
        step[k] = factors[k] * normal_step(run) * root;
        inverse[k] = kvq_inverse_or_zero(step[k]);
        xy[k] = yy[k] = 0;
    }
    for (int t = 0; t < KVQ_BLOCK; t++) {
        const float x = rows.at(t, c) - mean;
#pragma unroll
        for (int k = 0; k < n; k++) {
            const float y = (float)code_of(x, inverse[k], side) - middle;
            xy[k] += x * y;
            yy[k] += y * y;
        }
    }
    float least = __int_as_float(0x7f800000), best = 0; /* infinity */
    *stretch = 1.0f;
#pragma unroll
    for (int k = 0; k < n; k++) {
        const float error = step[k] * (step[k] * yy[k] - 2.0f * xy[k]);
        if (error < least && step[k] > 0) {
            least = error;
            best = step[k];
            *stretch = fmaxf(xy[k] / yy[k] / step[k], 0.1f) *
                       kvq_stretch(power, xy[k], yy[k], KVQ_STRETCH_KEYS);
        }
    }
    return best * *stretch;
}

/* A thread for each unit of a token: 4, 8 or 16 channels of a run. */
static __device__ __forceinline__ uint16_t unit_of(const kvq_rows &rows, const kvq_kv_shape &shape,
                                                   const float *mean, const float *inverse, int t,
                                                   int unit) {
    int run = 0, first = 0;
    for (; unit >= kvq_mixed_units(&shape, run); run++) {
        unit -= kvq_mixed_units(&shape, run);
        first += shape.run[run];
    }
    /* 8 bits: the high halves, then the low ones */
    const int units = run == 0 ? kvq_mixed_units(&shape, 0) / 2 : kvq_mixed_units(&shape, run);
    const int bits = run == 0 ? 4 : width_of(run), low = run == 0 && unit < units ? 4 : 0;
    const int at = unit % units * (16 / bits); /* within the run */
    const float side = (float)(1 << width_of(run)) * 0.5f;
    uint32_t word = 0;
    for (int i = 0; i < 16 / bits && at + i < shape.run[run]; i++) {
        const int c = first + at + i;
        const int code = code_of(rows.at(t, c) - mean[c], inverse[c], side);
        const int part = code >> low & ((1 << bits) - 1);
        word |= (uint32_t)part << (i % 2 * 8 + i / 2 * bits);
    }
    return (uint16_t)word;
}

static __device__ __forceinline__ void encode(uint8_t *block, const kvq_rows &rows,
                                              const kvq_kv_shape &shape, float *scratch) {
    const int d = rows.d, coded = kvq_mixed_coded(&shape);
    float *const mean = scratch, *const step = scratch + d, *const stretch = scratch + 2 * d;
    uint8_t *const scales = block + KVQ_MIXED_HEADER + d;
    uint8_t *const units = block + kvq_mixed_units_at(&shape);
    kvq_take_mean(block, block + KVQ_MIXED_HEADER, mean, rows);
    for (KVQ_EACH(i, 6)) block[10 + i] = 0;
    for (KVQ_EACH(i, (int)(units - scales) - coded)) scales[coded + i] = 0;
    __syncthreads();
    int n_units = 0;
    for (int run = 0, first = 0; run < KVQ_RUNS; run++) {
        for (KVQ_EACH(i, shape.run[run])) {
            const int c = first + i;
            step[c] = fit_step(&stretch[c], rows, mean[c], c, run);
        }
        kvq_put_scales(block + 2 + 2 * run, scales + first, step + first, shape.run[run]);
        for (KVQ_EACH(i, shape.run[run])) {
            step[first + i] = stretch[first + i] * kvq_inverse_or_zero(step[first + i]);
        }
        first += shape.run[run];
        n_units += kvq_mixed_units(&shape, run);
    }
    __syncthreads();
    for (KVQ_EACH(i, KVQ_BLOCK * n_units)) { /* [token / 16][unit][token % 16] */
        const int t = i / 16 / n_units * 16 + i % 16, unit = i / 16 % n_units;
        ((uint16_t *)units)[i] = unit_of(rows, shape, mean, step, t, unit);
    }
}

} // namespace kvq_encode_mixed

#endif
