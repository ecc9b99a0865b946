/* matvec.cu: products of weights with the activations of 1 to 8 tokens, bound by reading the
 * weights: each of their bytes is read once, straight into registers, and unpacked once for all
 * tokens.
 *
 * A warp takes ROWS rows of a chunk of 1024 columns at a time, a lane a unit of each of them
 * (weight_units.cuh). `panel` warps share the rows and split the columns; the other warps of the
 * block take other rows. The activations of a panel of chunks lie in shared memory, in the order in
 * which lanes take them.
 */
#include "cuda/kernels/matmul_args.h"
#include "cuda/kernels/weight_units.cuh"

namespace {

/* x[t][c], c = column..column + 3, zeros where there is no such token or column. */
KVQ_DEVICE float4 load_activations(const kvq_cuda_matmul_args &a, int t, int column) {
    const int left = t < a.n ? a.n_cols - column : 0;
    const float *const x = a.x + (size_t)t * a.n_cols + column;
    if (left >= 4 && a.n_cols % 4 == 0) return *(const float4 *)x;
    return make_float4(left > 0 ? x[0] : 0.0f, left > 1 ? x[1] : 0.0f, left > 2 ? x[2] : 0.0f,
                       left > 3 ? x[3] : 0.0f);
}

/* Fills x[TOKENS][panel][32][KVQ_MATVEC_UNIT_STRIDE] and the sums of its runs
 * [TOKENS][panel][32][2] from unit `first_unit` of the rows on. */
template <typename UNIT, int TOKENS>
KVQ_DEVICE void stage_activations(float *x, float *sums, const kvq_cuda_matmul_args &a,
                                  int first_unit) {
    const int units = a.panel * 32;
#pragma unroll 1
    for (int t = 0; t < TOKENS; t++) {
        for (int i = (int)threadIdx.x; i < units * 8; i += KVQ_MATVEC_THREADS) {
            const int unit = i / 8, quad = i % 8;
            const float4 v = load_activations(a, t, UNIT::column(first_unit + unit, quad));
            float *const to = x + (size_t)(t * units + unit) * KVQ_MATVEC_UNIT_STRIDE + 4 * quad;
            *(float4 *)to = v;
            if (!UNIT::quantized) continue;
            float sum = (v.x + v.y) + (v.z + v.w);
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            if (quad % 4 == 0) sums[(t * units + unit) * 2 + quad / 4] = sum;
        }
    }
}

KVQ_DEVICE float add_product(float sum, const float v[4], const float4 &x) {
    return sum + v[0] * x.x + v[1] * x.y + v[2] * x.z + v[3] * x.w;
}

/* out[r * TOKENS + t]: this lane's share of row r by token t; x and x_sums are those of its unit,
 * a token `units` units after the one before. */
template <typename UNIT, int TOKENS, int ROWS>
KVQ_DEVICE void multiply_units(float out[ROWS * TOKENS], const UNIT unit[ROWS], const float *x,
                               const float *x_sums, int units) {
    float sum[ROWS][TOKENS][UNIT::runs] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float v[ROWS][8];
#pragma unroll
        for (int r = 0; r < ROWS; r++) unit[r].values(v[r], i);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const float *const at = x + t * units * KVQ_MATVEC_UNIT_STRIDE + 4 * i;
            const float4 x0 = *(const float4 *)at, x1 = *(const float4 *)(at + 16);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float *const s = sum[r][t];
                s[0] = add_product(s[0], v[r], x0);
                s[UNIT::runs - 1] = add_product(s[UNIT::runs - 1], v[r] + 4, x1);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const kvq_unit_scales scales = unit[r].scales();
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const float *const s = sum[r][t];
            float *const o = &out[r * TOKENS + t];
            if (!UNIT::quantized) {
                *o = s[0];
                continue;
            }
            const float2 of_x = *(const float2 *)(x_sums + t * units * 2);
            if (UNIT::runs == 1) {
                *o = scales.scale[0] * s[0] + scales.offset[0] * (of_x.x + of_x.y);
            } else {
                *o = scales.scale[0] * s[0] + scales.offset[0] * of_x.x +
                     (scales.scale[1] * s[UNIT::runs - 1] + scales.offset[1] * of_x.y);
            }
        }
    }
}

/* The sums of N values, a power of two, over the warp: lane l returns that of value l / (32 / N).
 * While there are more values than one, a lane gives half of them away for the other half. */
template <int N> KVQ_DEVICE float sum_over_warp(float v[N]) {
    const int lane = (int)threadIdx.x % 32;
    int held = N;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        if (held == 1) {
            v[0] += __shfl_xor_sync(0xffffffffu, v[0], offset);
            continue;
        }
        held /= 2;
        const bool upper = (lane & offset) != 0;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            if (i >= held) break;
            const float kept = upper ? v[i + held] : v[i];
            const float given = upper ? v[i] : v[i + held];
            v[i] = kept + __shfl_xor_sync(0xffffffffu, given, offset);
        }
    }
    return v[0];
}

template <typename BLOCK, typename UNIT, int TOKENS, int ROWS>
KVQ_DEVICE void matvec(const kvq_cuda_matmul_args &a) {
    KVQ_SHARED_MEMORY(float, shared);
    const int panel = a.panel, units = panel * 32;
    float *const x = shared;
    float *const sums = x + TOKENS * units * KVQ_MATVEC_UNIT_STRIDE;
    float *const partial = sums + TOKENS * units * 2; /* [rows_per_block][TOKENS][panel] */

    /* Whose rows are these? Indices must be constants, or the arguments were copied to memory. */
    int block = (int)blockIdx.x;
    kvq_cuda_matrix m = a.matrices[0];
#pragma unroll
    for (int i = 1; i < 3; i++) {
        const int blocks = (m.n_rows + a.rows_per_block - 1) / a.rows_per_block;
        if (i >= a.n_matrices || block < blocks) continue;
        block -= blocks;
        m = a.matrices[i];
    }
    const int first_row = block * a.rows_per_block;
    const int left = m.n_rows - first_row;
    const int n_rows = left < a.rows_per_block ? left : a.rows_per_block;

    const uint32_t row_bytes = (uint32_t)(a.n_cols / BLOCK::block * BLOCK::bytes);
    const uint8_t *const w = m.w + (size_t)first_row * row_bytes;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int chunk = warp % panel, step = KVQ_MATVEC_WARPS / panel * ROWS;
    const int lane_unit = chunk * 32 + lane;
#pragma unroll 1
    for (int first_unit = 0; first_unit * KVQ_MATVEC_UNIT < a.n_cols; first_unit += units) {
        if (first_unit > 0) __syncthreads(); /* all have done with the last panel */
        stage_activations<UNIT, TOKENS>(x, sums, a, first_unit);
        __syncthreads();
        /* Lanes beyond the last unit take it again, with activations that are zero. */
        int unit_taken = first_unit + lane_unit;
        if (UNIT::quantized && unit_taken >= a.n_cols / 32) unit_taken = a.n_cols / 32 - 1;
#pragma unroll 1
        for (int row = warp / panel * ROWS; row < n_rows; row += step) {
            UNIT unit[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                /* Beyond the last row take it again; that product is not stored. */
                const int there = row + r < n_rows ? row + r : n_rows - 1;
                unit[r].load(w + (uint32_t)there * row_bytes, unit_taken, a.n_cols);
            }
            float products[ROWS * TOKENS];
            multiply_units<UNIT, TOKENS, ROWS>(products, unit,
                                               x + lane_unit * KVQ_MATVEC_UNIT_STRIDE,
                                               sums + lane_unit * 2, units);
            const float sum = sum_over_warp<ROWS * TOKENS>(products);
            const int lanes_each = 32 / (ROWS * TOKENS);
            if (lane % lanes_each == 0) { /* the same lane adds to it at every panel */
                float *const to = partial + (row * TOKENS + lane / lanes_each) * panel + chunk;
                *to = first_unit > 0 ? *to + sum : sum;
            }
        }
    }
    __syncthreads();

    for (int i = (int)threadIdx.x; i < n_rows * a.n; i += KVQ_MATVEC_THREADS) {
        const int t = i / n_rows, r = i % n_rows;
        float sum = m.bias ? m.bias[first_row + r] : 0.0f;
        for (int p = 0; p < panel; p++) sum += partial[(r * TOKENS + t) * panel + p];
        float *const y = m.y + (size_t)t * m.y_stride + first_row + r;
        *y = a.add ? *y + sum : sum;
    }
}

/* Rows that a warp takes at a time: 1, 2 or 4, as many as keep enough bytes under way and leave
 * registers for the blocks that KVQ_WEIGHT below asks for. */
template <typename UNIT, int TOKENS> struct rows_per_warp {
    enum {
        of_floats = sizeof(UNIT) <= 64 ? 2 : 1,
        of_weights = UNIT::quantized ? 4 : of_floats,
        of_sums = TOKENS * UNIT::runs * sizeof(UNIT) <= 128 ? 4 : 2,
        value = of_weights < of_sums ? of_weights : of_sums
    };
};

} // namespace

#define KVQ_MATVEC(NAME, TOKENS, BLOCKS)                                                           \
    extern "C" __global__ void __launch_bounds__(KVQ_MATVEC_THREADS, BLOCKS)                       \
        kvq_cuda_matvec_##NAME##_##TOKENS(const kvq_cuda_matmul_args a) {                          \
        matvec<kvq_block_##NAME, kvq_unit_##NAME::spread, TOKENS,                                  \
               rows_per_warp<kvq_unit_##NAME::spread, TOKENS>::value>(a);                          \
    }                                                                                              \
    KVQ_EXPORT_KERNEL(kvq_cuda_matvec_##NAME##_##TOKENS)

/* Tokens, and blocks that a processor shall have registers for. */
#define KVQ_WEIGHT(NAME, ID, BLOCK, BYTES)                                                         \
    KVQ_MATVEC(NAME, 1, 3) KVQ_MATVEC(NAME, 4, 2) KVQ_MATVEC(NAME, 8, 1)
#include "weights.def"
#undef KVQ_WEIGHT
