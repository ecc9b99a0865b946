/* decode_mixed.cuh: scores of one token's queries over keys of codec mixed, and the waves that
 * calibrated keys may have (kv/kv_wave.h). Tokens come in the order of `sixteens`.
 *
 * The rows of A are queries times the scales of the block's channels, in 16 bits, the high ones of
 * eight queries above the low ones; the columns of B are tokens. A lane takes pairs of units of 16
 * bits (kv_format.h), which it lays side by side. In each half of the bytes of that word stand the
 * codes of 4 channels, or two or four times as many where codes have 2 bits or 1: that many slots
 * share the pair. Codes stay where they stand in the high half; what that place costs is in the
 * query. Channels of 8 bits are two runs of 4 bits, whose high halves weigh 16 times as much.
 */
#ifndef KVQ_CUDA_DECODE_MIXED_CUH
#define KVQ_CUDA_DECODE_MIXED_CUH

#include "cuda/kernels/decode_halves.cuh"
#include "cuda/kernels/decode_order.cuh"
#include "cuda/kernels/decode_parts.cuh"
#include "cuda/kernels/unpack.cuh"
#include "kv/kv_ids.h"

enum { MIXED_RUNS = KVQ_RUNS + 1 };

/* A run of channels with the same width. */
struct mixed_run {
    int bits, first, n; /* first channel */
    int unit, slot;     /* the first ones */
    int scales;         /* slot where those of its channels are staged */
    float weight;       /* of a step of its codes */
};

static __device__ __forceinline__ int mixed_run_units(const mixed_run &run) {
    const int per_unit = 16 / run.bits;
    return (run.n + per_unit - 1) / per_unit;
}

static __device__ __forceinline__ int mixed_run_slots(const mixed_run &run) {
    return (mixed_run_units(run) + 1) / 2 * (4 / run.bits);
}

/* Run i of a head: the high and the low halves of 8 bits, then 4, 2 and 1; i = MIXED_RUNS: what
 * follows them. */
static __device__ __forceinline__ mixed_run mixed_run_at(const kvq_kv_shape &sh, int i) {
    mixed_run run = {4, 0, sh.run[0], 0, 0, 0, 16.0f};
    for (int k = 0; k < i; k++) {
        run.unit += mixed_run_units(run);
        run.slot += mixed_run_slots(run);
        run.weight = 1.0f;
        if (k == 0) continue; /* both halves of 8 bits are of the same channels */
        run.first += run.n;
        run.bits = k == 1 ? 4 : max(run.bits / 2, 1);
        run.n = k < KVQ_RUNS ? sh.run[k] : 0;
        run.scales = run.slot;
    }
    return run;
}

/* The run that has a slot, or what follows all of them. */
static __device__ __forceinline__ mixed_run mixed_run_of_slot(const kvq_kv_shape &sh, int slot) {
    int i = 0;
    while (i < MIXED_RUNS && slot >= mixed_run_at(sh, i + 1).slot) i++;
    return mixed_run_at(sh, i);
}

/* Codes of a pair of units: those of place i in each half of the bytes, the low halves first; of
 * the first unit and of the second one; of bytes 0 and 1. So a slot has 8 channels: number
 * 4 * half + 2 * side + byte. */
static __device__ __forceinline__ int mixed_index(int bits, int pair, int i, int number) {
    const int half = number / 4, side = number / 2 % 2;
    return (2 * pair + side) * (16 / bits) + 2 * (half * (4 / bits) + i) + number % 2;
}

struct mixed_slot {
    int low, high; /* where both units of a token lie behind the first units of its 16 tokens */
    uint32_t mask; /* of the codes, when they are in the high halves of bytes */
    int scales;    /* slot whose staged scales it takes */
};

/* In shared memory: queries as A fragments, for all warps of a block of threads. */
template <int D> struct mixed_queries {
    enum {
        /* Two slots for each 8 channels of 8 bits, else one; and what is left of each run. */
        STEPS = (2 * (D / 8) + 2 + 1 + 2 + 4 + 3) / 4,
        SLOTS = 4 * STEPS /* a step of the product takes four, one for each lane of a row */
    };
    float4 of_codes[STEPS][2][32]; /* of each lane's slot; by the halves of bytes */
    uint4 plain[D / 32][32];       /* channels D / 4 * part + 8 * i .. + 7 */
    mixed_slot slots[SLOTS];
    float scales[KVQ_CUDA_DECODE_WARPS][8 * SLOTS]; /* of a block's channels, as slots take them */
    float turned[KVQ_CUDA_DECODE_WARPS][8][2 * KVQ_WAVES];
};

/* What a lane knows of the queries besides. */
struct mixed_lane {
    int n_steps, n_units;    /* of the product, 1 at least; of a token */
    float largest[KVQ_RUNS]; /* query of the row times scale in bytes, at most, of each width */
    float largest_of_all;    /* channel of the query */
    int scale;               /* where the block keeps the unit of four channels' scales, */
    int staged[2];           /* and where those are staged, two by two; -1: it has no such */
};

/* The largest number of 16 bits whose high byte, rounded, has a sign of its own: 2^15 - 129. */
#define KVQ_MIXED_LARGEST 32639.0f

/* Most that 256 * high + low of a sum of products can come to: each channel has one such number,
 * or, of 8 bits, another that is a 16th of it, times a code of at most 15 * 16. */
template <int D> static constexpr __device__ float mixed_largest_sum() {
    return D * (KVQ_MIXED_LARGEST + KVQ_MIXED_LARGEST / 16) * 240;
}

/* Four numbers of at most that magnitude, rounded, as 256 * high + low; bytes have signs. */
static __device__ __forceinline__ void split_signed(uint32_t &high, uint32_t &low, float4 x) {
    /* The last bits of 1.5 * 2^23 + x are x. 128 more: the low byte then lacks only its sign. */
    const float magic = 12582912.0f + 128.0f;
    const uint32_t v[4] = {__float_as_uint(x.x + magic), __float_as_uint(x.y + magic),
                           __float_as_uint(x.z + magic), __float_as_uint(x.w + magic)};
    split_bytes(high, low, v);
    low ^= 0x80808080u;
}

static __device__ __forceinline__ float joined(int32_t high, int32_t low) {
    return (float)(256 * high + low);
}

/* Fills q, and what the lane keeps of it. x[d] is the query of the lane's row. */
template <int D>
static __device__ __forceinline__ mixed_lane load_queries(mixed_queries<D> &q, const float *x,
                                                          const kvq_kv_shape &sh, bool there) {
    const int lane = threadIdx.x % 32, part = lane % 4, warp = threadIdx.x / 32, d = sh.d;
    const int n_slots = mixed_run_at(sh, MIXED_RUNS).slot;
    mixed_lane mine = {max((n_slots + 3) / 4, 1), 0, {0}, 0, 0, {-1, -1}};
#pragma unroll
    for (int r = 0; r < KVQ_RUNS; r++) {
        const mixed_run run = mixed_run_at(sh, r + 1);
        float largest = 0;
        for (int c = run.first + part; c < run.first + run.n && there; c += 4)
            largest = fmaxf(largest, fabsf(x[c]));
        mine.largest[r] = largest_of_row(largest) * (r == 0 ? 16 * 255.0f : 255.0f);
        mine.n_units += kvq_mixed_units(&sh, r);
        if (4 * lane < run.first || 4 * lane >= run.first + run.n) continue;
        mine.scale = 2 + 2 * r;
        const int places = 4 / run.bits, pair = (4 * lane - run.first) / (32 / run.bits);
#pragma unroll
        for (int two = 0; two < 2; two++) {
            const int index = 4 * lane + 2 * two - run.first, place = index % (16 / run.bits) / 2;
            const int side = index / (16 / run.bits) % 2;
            mine.staged[two] =
                8 * (run.scales + pair * places + place % places) + 4 * (place / places) + 2 * side;
        }
    }
    for (int step = warp; step < mine.n_steps; step += KVQ_CUDA_DECODE_WARPS) {
        const int slot = 4 * step + part;
        const mixed_run run = mixed_run_of_slot(sh, slot);
        const int places = 4 / run.bits, pair = (slot - run.slot) / places;
        const int i = (slot - run.slot) % places;
        const float weight = there ? run.weight / (float)(1 << run.bits * i) : 0.0f;
        float of[8];
#pragma unroll
        for (int number = 0; number < 8; number++) {
            const int index = mixed_index(run.bits, pair, i, number);
            of[number] = index < run.n ? weight * x[run.first + index] : 0.0f;
        }
        q.of_codes[step][0][lane] = make_float4(of[0], of[1], of[2], of[3]);
        q.of_codes[step][1][lane] = make_float4(of[4], of[5], of[6], of[7]);
        if (lane < 4) {
            const bool coded = slot < n_slots;
            const int low = run.unit + 2 * pair, n = run.unit + mixed_run_units(run);
            const uint32_t codes = (1u << run.bits) - 1;
            /* a slot without codes reads what lies before them, and takes it times 0 */
            q.slots[slot] = {coded ? 32 * low : -32, coded ? 32 * min(low + 1, n - 1) : -32,
                             (codes << (4 + run.bits * i)) * 0x01010101u,
                             coded ? run.scales + slot - run.slot : 0};
        }
    }
    mine.largest_of_all = largest_of_query(x, d, there);
    const float scale = mine.largest_of_all > 0 ? KVQ_MIXED_LARGEST / mine.largest_of_all : 0.0f;
    for (int i = warp; i < D / 32; i += KVQ_CUDA_DECODE_WARPS) {
        uint32_t a[4];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int c = D / 4 * part + 8 * i + 4 * k;
            const bool here = there && c < d;
            const float unit = here ? scale : 0.0f;
            const float *const at = x + (here ? c : 0);
            split_signed(a[2 * k], a[2 * k + 1],
                         make_float4(unit * at[0], unit * at[1], unit * at[2], unit * at[3]));
        }
        q.plain[i][lane] = make_uint4(a[0], a[1], a[2], a[3]);
    }
    float *const scales = q.scales[warp]; /* channels that are not there keep 0 */
    for (int i = lane; i < 8 * mixed_queries<D>::SLOTS; i += 32) scales[i] = 0;
    __syncthreads();
    return mine;
}

/* The product of four query channels and scales, split. */
static __device__ __forceinline__ void split_products(uint32_t &high, uint32_t &low, float4 x,
                                                      float4 scale, float unit) {
    split_signed(high, low,
                 make_float4(unit * x.x * scale.x, unit * x.y * scale.y, unit * x.z * scale.z,
                             unit * x.w * scale.w));
}

/* Both units of a lane's slot, of 8 tokens. */
struct mixed_codes {
    uint4 low, high;
};

template <int D>
static __device__ __forceinline__ mixed_codes codes_of_step(const mixed_queries<D> &q,
                                                            const uint8_t *units, int step) {
    const mixed_slot &slot = q.slots[4 * step + threadIdx.x % 4];
    return {*reinterpret_cast<const uint4 *>(units + slot.low),
            *reinterpret_cast<const uint4 *>(units + slot.high)};
}

/* The scores of a block, in units of log 2. */
template <int D>
static __device__ __forceinline__ void score_mixed(float s[16], mixed_queries<D> &q,
                                                   const mixed_lane &mine, const uint8_t *block,
                                                   const kvq_kv_shape &sh) {
    static_assert(mixed_largest_sum<D>() < 2147483648.0f, "sums of products are 32 bits wide");
    const int lane = threadIdx.x % 32, part = lane % 4, column = lane / 4, d = sh.d;
    const uint8_t *const means = block + KVQ_MIXED_HEADER, *const scales = means + d;
    float *const staged = q.scales[threadIdx.x / 32];
    __syncwarp(); /* the scales of the block before are done with */
    if (mine.staged[0] >= 0) {
        const float unit = kvq_half_at(block + mine.scale);
        const uint32_t four = word_at(scales + 4 * lane);
#pragma unroll
        for (int two = 0; two < 2; two++) {
            *reinterpret_cast<float2 *>(staged + mine.staged[two]) =
                make_float2(unit * byte_of(four, 2 * two), unit * byte_of(four, 2 * two + 1));
        }
    }
    float largest = 1e-30f; /* of products of queries and scales; not 0 */
#pragma unroll
    for (int r = 0; r < KVQ_RUNS; r++)
        largest = fmaxf(largest, mine.largest[r] * kvq_half_at(block + 2 + 2 * r));
    const float to_integers = __fdividef(KVQ_MIXED_LARGEST, largest);
    int32_t product[8][4], middle[4] = {0, 0, 0, 0}, mean[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) product[i][j] = 0;
    }
    /* 8 tokens of the lane's column */
    const uint8_t *const units =
        block + kvq_mixed_units_at(&sh) + (column / 2 * mine.n_units * 16 + column % 2 * 8) * 2;
    __syncwarp();
    mixed_codes next = codes_of_step(q, units, 0);
#pragma unroll 1
    for (int step = 0; step < mine.n_steps; step++) {
        const mixed_slot slot = q.slots[4 * step + part];
        const mixed_codes codes = next;
        /* they come while this step is multiplied; the last step asks for its own again */
        next = codes_of_step(q, units, min(step + 1, mine.n_steps - 1));
        const float4 *const of_slot = reinterpret_cast<const float4 *>(staged + 8 * slot.scales);
        const uint32_t highest[2] = {slot.mask, slot.mask};
        uint32_t a[4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            split_products(a[2 * half], a[2 * half + 1], q.of_codes[step][half][lane],
                           of_slot[half], to_integers);
        }
        kvq_mma_s8_u8(middle, a, highest);
#pragma unroll
        for (int t = 0; t < 8; t++) {
            const uint32_t word = kvq_permute(word_of(codes.low, t / 2), word_of(codes.high, t / 2),
                                              t % 2 ? 0x7632 : 0x5410);
            const uint32_t b[2] = {word << 4 & slot.mask, word & slot.mask};
            kvq_mma_s8_u8(product[t], a, b);
        }
    }
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
        const int c = D / 4 * part + 16 * i;
        const uint4 m =
            c < d ? *reinterpret_cast<const uint4 *>(means + c) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const uint4 plain = q.plain[2 * i + k][lane];
            const uint32_t a[4] = {plain.x, plain.y, plain.z, plain.w};
            const uint32_t b[2] = {word_of(m, 2 * k), word_of(m, 2 * k + 1)};
            kvq_mma_s8_s8(mean, a, b);
        }
    }
    /* codes are 16 times as large as they count */
    const float unit = largest * (KVQ_LOG2E / (16 * KVQ_MIXED_LARGEST));
    const float of_mean =
        mine.largest_of_all * kvq_half_at(block) * (KVQ_LOG2E / KVQ_MIXED_LARGEST);
    const float shift =
        of_mean * joined(mean[0], mean[2]) - 0.5f * unit * joined(middle[0], middle[2]);
#pragma unroll
    for (int i = 0; i < 16; i++)
        s[i] = joined(product[i / 2][i % 2], product[i / 2][2 + i % 2]) * unit + shift;
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
            s[i] += factor * within[8 * (i % 2) + i / 2];
        }
    }
}

#endif
