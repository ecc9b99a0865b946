/* gemm.cu: products of weights with the activations of a prompt's many tokens, on tensor cores.
 *
 * A block makes 128 rows by 64 tokens of the product. At each step its 128 threads unpack a unit of
 * 32 columns (weight_units.cuh) of one row each to halves in shared memory, copy the halves of the
 * activations of the same columns, and multiply what the step before has laid there. Each of the
 * four warps multiplies 64 rows by 32 tokens. Sums are f32.
 */
#include "cuda/kernels/weight_units.cuh"

#include "cuda/kernels/matmul_args.h"

/* ---- activations as halves --------------------------------------------------------------- */

extern "C" __global__ void __launch_bounds__(KVQ_HALVE_THREADS)
    kvq_cuda_halve(const kvq_cuda_halve_args a) {
    enum { WARPS = KVQ_HALVE_THREADS / 32 };
    __shared__ float of_warp[WARPS];
    const int thread = (int)threadIdx.x, padded = kvq_cuda_halves_in_row(a.n_cols);
    const float *const x = a.x + (size_t)blockIdx.x * a.n_cols;
    uint16_t *const halves = a.halves + (size_t)blockIdx.x * padded;

    float most = 0.0f;
    for (int c = thread; c < a.n_cols; c += KVQ_HALVE_THREADS) most = fmaxf(most, fabsf(x[c]));
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    }
    if (thread % 32 == 0) of_warp[thread / 32] = most;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; i++) most = fmaxf(most, of_warp[i]);

    /* Exponents of floats: the largest becomes 2^14 to 2^15. Of very small ones no more than
     * 2^113, so that its inverse is a normal number, too. */
    const uint32_t exponent = __float_as_uint(most) >> 23;
    const uint32_t up = 127 + 127 + 14 - exponent, scale = up < 240 ? up : 240;
    const float factor = __uint_as_float(scale << 23);
    if (thread == 0) a.unscale[blockIdx.x] = __uint_as_float((254 - scale) << 23);
    for (int c = thread; c < padded; c += KVQ_HALVE_THREADS) {
        halves[c] = __half_as_ushort(__float2half_rn(c < a.n_cols ? x[c] * factor : 0.0f));
    }
}
KVQ_EXPORT_KERNEL(kvq_cuda_halve)

/* ---- product ----------------------------------------------------------------------------- */

namespace {

/* Halves are exact to 11 bits from 2^-14 on, and most weights are smaller than 1: they are taken
 * times 16, which leaves room for magnitudes up to 4094. */
constexpr float weight_scale = 16.0f;

/* Rows of a tile are four chunks of eight halves. Chunk c of row r lies at place c ^ (r / 2 % 4):
 * so eight lanes that write the same chunk of eight rows, and eight that read all chunks of two
 * rows, meet all banks once. In units of uint4. */
KVQ_DEVICE int chunk_place(int row, int chunk) { return row * 4 + (chunk ^ (row / 2 % 4)); }

KVQ_DEVICE uint32_t pack_halves(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, 4);
    return bits;
}

/* The 32 weights of a unit as halves; quads 2 i and 2 i + 1 are chunk i. */
template <typename UNIT> KVQ_DEVICE void store_unit(uint4 *tile, int row, const UNIT &unit) {
    const kvq_unit_scales s = unit.scales();
    uint32_t words[16]; /* two of each quad */
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float v[8];
        unit.values(v, i);
#pragma unroll
        for (int run = 0; run < 2; run++) {
            const float scale = s.scale[run] * weight_scale, offset = s.offset[run] * weight_scale;
            float w[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                w[j] = UNIT::quantized ? scale * v[4 * run + j] + offset
                                       : weight_scale * v[4 * run + j];
            }
            words[2 * (i + 4 * run)] = pack_halves(w[0], w[1]);
            words[2 * (i + 4 * run) + 1] = pack_halves(w[2], w[3]);
        }
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
        tile[chunk_place(row, c)] =
            make_uint4(words[4 * c], words[4 * c + 1], words[4 * c + 2], words[4 * c + 3]);
    }
}

/* Starts copying the activations of `unit` of the block's tokens. */
template <typename UNIT>
KVQ_DEVICE void copy_activations(uint4 *tile, const kvq_cuda_matmul_args &a, int first_token,
                                 int unit) {
    const int padded = kvq_cuda_halves_in_row(a.n_cols);
#pragma unroll
    for (int i = 0; i < KVQ_GEMM_TOKENS * 4 / KVQ_GEMM_THREADS; i++) {
        const int at = (int)threadIdx.x + i * KVQ_GEMM_THREADS, token = at / 4, chunk = at % 4;
        /* Beyond the last token take it again; that product is not stored. */
        const int there = first_token + token < a.n ? first_token + token : a.n - 1;
        kvq_cp_async16(tile + chunk_place(token, chunk),
                       a.halves + (size_t)there * padded + UNIT::column(unit, 2 * chunk));
    }
}

enum {
    WARP_ROWS = 64,
    WARP_TOKENS = 32,
    TILES_M = WARP_ROWS / 16,  /* of 16 rows */
    TILES_N = WARP_TOKENS / 8, /* of 8 tokens */
};

/* sums += weights * activations, 32 columns. In which order columns are summed is free as long as
 * it is the same for both: lane t of a group of four takes chunk t, four halves of it at each of
 * two steps. */
KVQ_DEVICE void multiply_tiles(float sums[TILES_M][TILES_N][4], const uint4 *weights,
                               const uint4 *activations, int first_row, int first_token) {
    const int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint4 b[TILES_N];
#pragma unroll
    for (int n = 0; n < TILES_N; n++) {
        b[n] = activations[chunk_place(first_token + 8 * n + g, t)];
    }
#pragma unroll
    for (int m = 0; m < TILES_M; m++) {
        const int row = first_row + 16 * m + g;
        const uint4 a0 = weights[chunk_place(row, t)], a1 = weights[chunk_place(row + 8, t)];
        const uint32_t a_first[4] = {a0.x, a1.x, a0.y, a1.y};
        const uint32_t a_second[4] = {a0.z, a1.z, a0.w, a1.w};
#pragma unroll
        for (int n = 0; n < TILES_N; n++) {
            const uint32_t b_first[2] = {b[n].x, b[n].y}, b_second[2] = {b[n].z, b[n].w};
            kvq_mma_f16(sums[m][n], a_first, b_first);
            kvq_mma_f16(sums[m][n], a_second, b_second);
        }
    }
}

KVQ_DEVICE void store_sums(const float sums[TILES_M][TILES_N][4], const kvq_cuda_matrix &matrix,
                           const kvq_cuda_matmul_args &a, int first_row, int first_token) {
    const int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < TILES_N; n++) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const int token = first_token + 8 * n + 2 * t + odd;
            if (token >= a.n) continue;
            const float unscale = a.unscale[token] * (1.0f / weight_scale);
            float *const y = matrix.y + (size_t)token * matrix.y_stride;
#pragma unroll
            for (int i = 0; i < 2 * TILES_M; i++) {
                const int row = first_row + 8 * i + g;
                if (row >= matrix.n_rows) continue;
                float sum = sums[i / 2][n][i % 2 * 2 + odd] * unscale;
                if (matrix.bias) sum += matrix.bias[row];
                y[row] = a.add ? y[row] + sum : sum;
            }
        }
    }
}

template <typename BLOCK, typename UNIT> KVQ_DEVICE void gemm(const kvq_cuda_matmul_args &a) {
    KVQ_SHARED_MEMORY(uint4, shared);
    enum { WEIGHTS = KVQ_GEMM_ROWS * 4, TILE = WEIGHTS + KVQ_GEMM_TOKENS * 4 };

    /* Whose rows are these? Indices must be constants, or the arguments were copied to memory. */
    int block = (int)blockIdx.y;
    kvq_cuda_matrix matrix = a.matrices[0];
#pragma unroll
    for (int i = 1; i < 3; i++) {
        const int blocks = (matrix.n_rows + KVQ_GEMM_ROWS - 1) / KVQ_GEMM_ROWS;
        if (i >= a.n_matrices || block < blocks) continue;
        block -= blocks;
        matrix = a.matrices[i];
    }
    const int thread = (int)threadIdx.x, warp = thread / 32;
    const int first_row = block * KVQ_GEMM_ROWS, first_token = (int)blockIdx.x * KVQ_GEMM_TOKENS;
    const int warp_row = warp / 2 * WARP_ROWS, warp_token = warp % 2 * WARP_TOKENS;
    /* Beyond the last row take it again; that product is not stored. */
    const int there = first_row + thread < matrix.n_rows ? first_row + thread : matrix.n_rows - 1;
    const uint8_t *const row =
        matrix.w + (size_t)there * (size_t)(a.n_cols / BLOCK::block * BLOCK::bytes);

    float sums[TILES_M][TILES_N][4] = {};
    UNIT unit;
    copy_activations<UNIT>(shared + WEIGHTS, a, first_token, 0);
    kvq_cp_commit();
    unit.load(row, 0, a.n_cols);
    store_unit(shared, thread, unit);
    kvq_cp_wait<0>();
    __syncthreads();

    const int steps = kvq_cuda_halves_in_row(a.n_cols) / KVQ_GEMM_COLUMNS;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        const uint4 *const now = shared + step % 2 * TILE;
        uint4 *const next = shared + (step + 1) % 2 * TILE;
        const bool more = step + 1 < steps;
        if (more) {
            copy_activations<UNIT>(next + WEIGHTS, a, first_token, step + 1);
            kvq_cp_commit();
            unit.load(row, step + 1, a.n_cols);
        }
        multiply_tiles(sums, now, now + WEIGHTS, warp_row, warp_token);
        if (more) {
            store_unit(next, thread, unit);
            kvq_cp_wait<0>();
        }
        __syncthreads();
    }
    store_sums(sums, matrix, a, first_row + warp_row, first_token + warp_token);
}

} // namespace

/* A processor shall have registers for three blocks; for two where a unit is 32 numbers. */
#define KVQ_WEIGHT(NAME, ID, BLOCK, BYTES)                                                         \
    extern "C" __global__ void __launch_bounds__(KVQ_GEMM_THREADS,                                 \
                                                 kvq_unit_##NAME::quantized ? 3 : 2)               \
        kvq_cuda_gemm_##NAME(const kvq_cuda_matmul_args a) {                                       \
        gemm<kvq_block_##NAME, kvq_unit_##NAME>(a);                                                \
    }                                                                                              \
    KVQ_EXPORT_KERNEL(kvq_cuda_gemm_##NAME)
#include "weights.def"
#undef KVQ_WEIGHT
