/* decode_rows.cuh: scores and sums of one token's queries over plain rows of halves.
 *
 * Rows are read as they lie, 16 bytes at a time: which channel stands in which row of B is free as
 * long as A has the same order, and the same holds for the columns of the second product. Queries
 * and weights are sums of two halves, the second of which has the lower rows of A.
 */
#ifndef KVQ_CUDA_DECODE_ROWS_CUH
#define KVQ_CUDA_DECODE_ROWS_CUH

#include "cuda/kernels/decode_parts.cuh"
#include "cuda/kernels/unpack.cuh"

/* Channels 8 * (4 * step + lane % 4) .. + 7. */
template <int D> struct row_queries {
    uint32_t high[D / 32][4], low[D / 32][4];
};

static __device__ __forceinline__ void split_halves(uint32_t &high, uint32_t &low, float x,
                                                    float y) {
    const float x_high = __half2float(__float2half_rn(x)),
                y_high = __half2float(__float2half_rn(y));
    high = kvq_pack_halves(x_high, y_high);
    low = kvq_pack_halves(x - x_high, y - y_high);
}

/* x[d] is the query of the lane's row; zeros where it is not `there`. */
template <int D>
static __device__ __forceinline__ void load_queries(row_queries<D> &q, const float *x, int d,
                                                    bool there) {
#pragma unroll
    for (int step = 0; step < D / 32; step++) {
        const int c = 8 * (4 * step + threadIdx.x % 4);
        const bool here = there && c < d;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            split_halves(q.high[step][i], q.low[step][i], here ? KVQ_LOG2E * x[c + 2 * i] : 0.0f,
                         here ? KVQ_LOG2E * x[c + 2 * i + 1] : 0.0f);
        }
    }
}

static __device__ __forceinline__ uint4 eight_halves(const uint16_t *row, int c, int d) {
    return c < d ? *reinterpret_cast<const uint4 *>(row + c) : make_uint4(0, 0, 0, 0);
}

/* Adds `n_tokens` rows to a warp's result, 16 at a time; row(side, t) is where token t has its own.
 */
template <int D, class Row>
static __device__ __forceinline__ void add_rows(running<D> &r, const row_queries<D> &q, int d,
                                                int n_tokens, Row row) {
    const int lane = threadIdx.x % 32, g = lane / 4, pair = lane % 4 * 2;
#pragma unroll 1
    for (int first = 0; first < n_tokens; first += 16) {
        float s[2][2]; /* of tokens 8 * tile + pair + e */
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            const uint16_t *const key = row(0, min(first + 8 * tile + g, n_tokens - 1));
            float c[4] = {0, 0, 0, 0};
#pragma unroll
            for (int step = 0; step < D / 32; step++) {
                const uint4 x = eight_halves(key, 8 * (4 * step + lane % 4), d);
                const uint32_t a[2][4] = {
                    {q.high[step][0], q.low[step][0], q.high[step][1], q.low[step][1]},
                    {q.high[step][2], q.low[step][2], q.high[step][3], q.low[step][3]}};
                const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
                kvq_mma_f16(c, a[0], b[0]);
                kvq_mma_f16(c, a[1], b[1]);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const bool there = first + 8 * tile + pair + e < n_tokens;
                s[tile][e] = there ? c[e] + c[2 + e] : -INFINITY;
            }
        }
        raise_largest(r, largest_of_row(fmaxf(fmaxf(s[0][0], s[0][1]), fmaxf(s[1][0], s[1][1]))));
        uint32_t a[4];
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            const float p[2] = {kvq_exp2(s[tile][0] - r.largest), kvq_exp2(s[tile][1] - r.largest)};
            r.sum += p[0] + p[1];
            split_halves(a[2 * tile], a[2 * tile + 1], p[0], p[1]);
        }
        const uint16_t *values[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            values[i] = row(1, min(first + i / 2 * 8 + pair + i % 2, n_tokens - 1));
        }
#pragma unroll
        for (int part = 0; part < D / 64; part++) { /* of 64 channels: tile i has 8 g + i */
            uint4 v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = eight_halves(values[i], 64 * part + 8 * g, d);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint32_t select = i % 2 ? 0x7632 : 0x5410;
                const uint32_t b[2] = {
                    __byte_perm(word_of(v[0], i / 2), word_of(v[1], i / 2), select),
                    __byte_perm(word_of(v[2], i / 2), word_of(v[3], i / 2), select)};
                float c[4] = {0, 0, 0, 0};
                kvq_mma_f16(c, a, b);
                r.o[8 * part + i][0] += c[0] + c[2];
                r.o[8 * part + i][1] += c[1] + c[3];
            }
        }
    }
}

/* The number that a lane's channel e of a tile has. */
static __device__ __forceinline__ int row_channel(int tile, int e) {
    return tile / 8 * 64 + 8 * ((int)(threadIdx.x % 4) * 2 + e) + tile % 8;
}

#endif
