/* decode_mixed.cuh: scores of one token's queries over keys of codec mixed, and the waves that
 * calibrated keys may have (kv/kv_wave.h). Tokens come in the order of `sixteens`.
 *
 * A lane takes pairs of units of 16 bits (kv_format.h), which it lays side by side: then a word has
 * the codes of two channels under each mask, as a word of u1, u2 and u4 has. Channels of 8 bits are
 * two runs of 4 bits, whose high halves weigh 16 times as much.
 */
#ifndef KVQ_CUDA_DECODE_MIXED_CUH
#define KVQ_CUDA_DECODE_MIXED_CUH

#include "cuda/kernels/decode_halves.cuh"
#include "cuda/kernels/decode_order.cuh"
#include "cuda/kernels/decode_parts.cuh"
#include "cuda/kernels/unpack.cuh"
#include "kv/kv_ids.h"

enum {
    MIXED_RUNS = KVQ_RUNS + 1,
    /* Registers of a lane that hold a query: those of a run of n channels of b bits fill up steps
     * of 32 / b, so that five runs take at most 16 + 16 and what is left of each. */
    MIXED_REGISTERS = 32 + 4 + 4 + 4 + 8 + 16,
};

/* A run of channels with the same width. */
struct mixed_run {
    int bits, first, n, unit; /* first channel and unit */
    int at;                   /* of its registers in mixed_queries */
};

static __device__ __forceinline__ int mixed_steps(const mixed_run &run) {
    const int per_step = 8 * (16 / run.bits); /* channels: 4 lanes, 2 units each */
    return (run.n + per_step - 1) / per_step;
}

/* Run i of a head: the high and the low halves of 8 bits, then 4, 2 and 1. */
static __device__ __forceinline__ mixed_run mixed_run_at(const kvq_kv_shape &sh, int i) {
    mixed_run run = {4, 0, sh.run[0], 0, 0};
    for (int k = 0; k < i; k++) {
        const int per_unit = 16 / run.bits;
        run.at += mixed_steps(run) * 2 * (8 / run.bits);
        run.unit += (run.n + per_unit - 1) / per_unit;
        if (k > 0) { /* both halves of 8 bits are of the same channels */
            run.first += run.n;
            run.bits = k == 1 ? 4 : run.bits / 2;
            run.n = sh.run[k];
        }
    }
    return run;
}

/* Queries as A fragments, for all warps of a block of threads. */
template <int D> struct mixed_queries {
    uint32_t of_codes[MIXED_REGISTERS][32]; /* run by run, of each lane */
    uint32_t plain[D / 8][32]; /* channels 16 * (i / 2) + 4 * part + 2 * (i % 2), and the
                                  next one */
    float turned[KVQ_CUDA_DECODE_WARPS][8][2 * KVQ_WAVES];
};

/* The channel whose code is number k of place j in unit 2 * pair + side of a run; its number in the
 * run may exceed it. */
static __device__ __forceinline__ int mixed_index(const mixed_run &run, int pair, int side, int j,
                                                  int k) {
    return (2 * pair + side) * (16 / run.bits) + 2 * j + k;
}

/* Fills `q`, relative to the largest of each query, which it returns. x[d] is the query of the
 * lane's row. */
template <int D>
static __device__ __forceinline__ float load_queries(mixed_queries<D> &q, const float *x,
                                                     const kvq_kv_shape &sh, bool there) {
    const int lane = threadIdx.x % 32, part = lane % 4, warp = threadIdx.x / 32, d = sh.d;
    const float largest = largest_of_query(x, d, there);
    const float inverse = largest > 0 ? 1.0f / largest : 0.0f;
    for (int r = 0; r < MIXED_RUNS; r++) {
        const mixed_run run = mixed_run_at(sh, r);
        const int places = 8 / run.bits;
        for (int i = warp; i < mixed_steps(run) * places * 2; i += KVQ_CUDA_DECODE_WARPS) {
            const int pair = 4 * (i / (2 * places)) + part, j = i / 2 % places;
            const int low = mixed_index(run, pair, 0, j, i % 2);
            const int high = mixed_index(run, pair, 1, j, i % 2);
            const float unit = inverse / (float)(1 << run.bits * j);
            q.of_codes[run.at + i][lane] =
                kvq_pack_halves(low < run.n && unit > 0 ? unit * x[run.first + low] : 0.0f,
                                high < run.n && unit > 0 ? unit * x[run.first + high] : 0.0f);
        }
    }
    for (int i = warp; i < d / 8; i += KVQ_CUDA_DECODE_WARPS) {
        const int c = 16 * (i / 2) + 4 * part + 2 * (i % 2);
        q.plain[i][lane] = kvq_pack_halves(inverse > 0 ? inverse * x[c] : 0.0f,
                                           inverse > 0 ? inverse * x[c + 1] : 0.0f);
    }
    __syncthreads();
    return largest;
}

/* Adds a run to the products of the eight tiles, and to that of the highest codes. `scale` is what
 * a step of the run is, relative to the largest of all runs. */
template <int BITS, int D>
static __device__ __forceinline__ void add_run(float product[8][4], float middle[4],
                                               const mixed_queries<D> &q, const mixed_run &run,
                                               const uint8_t *scales, const uint8_t *units,
                                               int n_units, float scale) {
    enum { PLACES = 8 / BITS, PER_UNIT = 16 / BITS };
    const int lane = threadIdx.x % 32, part = lane % 4, column = lane / 4;
    const uint32_t lowest = ((1u << BITS) - 1) * 0x00010001u;
    const __half2 of_run = __floats2half2_rn(scale, scale);
    const int n_steps = mixed_steps(run), run_units = (run.n + PER_UNIT - 1) / PER_UNIT;
    for (int step = 0; step < n_steps; step++) {
        const int pair = 4 * step + part;
        uint32_t a[PLACES][2];
#pragma unroll
        for (int j = 0; j < PLACES; j++) {
            const uint32_t highest[2] = {lowest << (BITS * j), lowest << (BITS * j)};
            /* scales of four channels of each unit: two places */
            const int low = mixed_index(run, pair, 0, j & ~1, 0);
            const int high = mixed_index(run, pair, 1, j & ~1, 0);
            const uint32_t of_low = low < run.n ? word_at(scales + run.first + low) : 0;
            const uint32_t of_high = high < run.n ? word_at(scales + run.first + high) : 0;
            const uint32_t four = __byte_perm(of_low, of_high, j % 2 ? 0x7362 : 0x5140);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const __half2 by = __hmul2(halves_at(four, k ? 0x4342 : 0x4140, 1024), of_run);
                a[j][k] = bits_of(
                    __hmul2(halves_of(q.of_codes[run.at + (step * PLACES + j) * 2 + k][lane]), by));
            }
            const uint32_t fragment[4] = {a[j][0], 0, a[j][1], 0};
            kvq_mma_f16(middle, fragment, highest);
        }
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const int token = 8 * which + 4 * sixteens::half(column);
            const uint8_t *const at =
                units + ((column / 2 * n_units + run.unit + 2 * pair) * 16 + token) * 2;
            const uint2 low =
                2 * pair < run_units ? *reinterpret_cast<const uint2 *>(at) : make_uint2(0, 0);
            const uint2 high = 2 * pair + 1 < run_units ? *reinterpret_cast<const uint2 *>(at + 32)
                                                        : make_uint2(0, 0);
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const uint32_t word = __byte_perm(t < 2 ? low.x : low.y, t < 2 ? high.x : high.y,
                                                  t % 2 ? 0x7632 : 0x5410);
#pragma unroll
                for (int j = 0; j < PLACES; j++) {
                    const uint32_t mask = lowest << (BITS * j);
                    const uint32_t fragment[4] = {a[j][0], 0, a[j][1], 0};
                    const uint32_t b[2] = {word & mask, word >> 8 & mask};
                    kvq_mma_f16(product[4 * which + t], fragment, b);
                }
            }
        }
    }
}

/* The scores of a block, in units of log 2. */
template <int D>
static __device__ __forceinline__ void score_mixed(float s[16], const mixed_queries<D> &q,
                                                   float query_scale, const uint8_t *block,
                                                   const kvq_kv_shape &sh) {
    const int lane = threadIdx.x % 32, part = lane % 4, d = sh.d;
    const uint8_t *const means = block + KVQ_MIXED_HEADER, *const scales = means + d;
    const uint8_t *const units = block + kvq_mixed_units_at(&sh);
    float product[8][4], middle[4] = {0, 0, 0, 0}, mean[4] = {0, 0, 0, 0};
    float step[MIXED_RUNS], largest = 0;
    int n_units = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) product[i][j] = 0;
    }
#pragma unroll
    for (int r = 0; r < KVQ_RUNS; r++) {
        n_units += kvq_mixed_units(&sh, r);
        step[r + 1] = kvq_half_at(block + 2 + 2 * r);
    }
    step[0] = 16 * step[1];
#pragma unroll
    for (int r = 0; r < MIXED_RUNS; r++) largest = fmaxf(largest, step[r]);
    const float inverse = largest > 0 ? 1.0f / largest : 0.0f;
    add_run<4>(product, middle, q, mixed_run_at(sh, 0), scales, units, n_units, step[0] * inverse);
    add_run<4>(product, middle, q, mixed_run_at(sh, 1), scales, units, n_units, step[1] * inverse);
    add_run<4>(product, middle, q, mixed_run_at(sh, 2), scales, units, n_units, step[2] * inverse);
    add_run<2>(product, middle, q, mixed_run_at(sh, 3), scales, units, n_units, step[3] * inverse);
    add_run<1>(product, middle, q, mixed_run_at(sh, 4), scales, units, n_units, step[4] * inverse);
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        if (16 * i >= d) break;
        const uint32_t four = word_at(means + 16 * i + 4 * part) ^ 0x80808080u; /* from -128 on */
        const uint32_t a[4] = {q.plain[2 * i][lane], 0, q.plain[2 * i + 1][lane], 0};
        const uint32_t b[2] = {bits_of(halves_at(four, 0x4140, 1152)),
                               bits_of(halves_at(four, 0x4342, 1152))};
        kvq_mma_f16(mean, a, b);
    }
    const float unit = query_scale * largest * (0x1p24f * KVQ_LOG2E);
    const float shift = query_scale * kvq_half_at(block) * mean[0] * KVQ_LOG2E;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        s[i] = (product[i / 2][i % 2] - 0.5f * middle[0]) * unit + shift;
    }
}

/* ---- waves -------------------------------------------------------------------------------- */

/* The products of the lane's query with waves part and part + 4 of its head. */
struct projected {
    float u[2], w[2];
};

static __device__ __forceinline__ projected project(const kvq_cuda_track &keys, const float *x,
                                                    int d) {
    projected on;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const int wave = threadIdx.x % 4 + 4 * k;
        on.u[k] = on.w[k] = 0;
        if (wave >= keys.n_waves) continue;
        for (int c = 0; c < d; c++) {
            on.u[k] += x[c] * keys.wave_u[wave * d + c];
            on.w[k] += x[c] * keys.wave_w[wave * d + c];
        }
    }
    return on;
}

/* Adds to the scores of block b what sealing took from its keys. `turned` is the warp's own. */
static __device__ __forceinline__ void add_waves(float s[16], float turned[8][2 * KVQ_WAVES],
                                                 const kvq_cuda_cache &cache,
                                                 const kvq_cuda_track &keys, const projected &on,
                                                 int b) {
    const int part = threadIdx.x % 4, row = threadIdx.x % 32 / 4;
    __syncwarp(); /* those of the block before are done with */
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const int wave = part + 4 * k;
        if (wave >= keys.n_waves) continue;
        const float *const start =
            cache.turns_first + ((size_t)b * cache.n_pairs + keys.pair[wave]) * 2;
        turned[row][2 * wave] = KVQ_LOG2E * (on.u[k] * start[0] + on.w[k] * start[1]);
        turned[row][2 * wave + 1] = KVQ_LOG2E * (on.w[k] * start[0] - on.u[k] * start[1]);
    }
    __syncwarp();
    for (int j = 0; j < 2 * keys.n_waves; j++) {
        const float factor = turned[row][j];
        const float *const within =
            cache.turns_within + (keys.pair[j / 2] * 2 + j % 2) * KVQ_BLOCK + 16 * part;
#pragma unroll
        for (int i = 0; i < 16; i++) { /* the order of sixteens */
            s[i] += factor * within[8 * (i / 8) + 4 * (i % 2) + i / 2 % 4];
        }
    }
}

#endif
