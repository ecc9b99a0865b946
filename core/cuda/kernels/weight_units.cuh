/* weight_units.cuh: a piece of a weight row in the registers of one lane, for every format of
 * weights.def.
 *
 * A unit is 32 columns: eight quads of four neighbouring columns, of which quads 0-3 are run 0 and
 * quads 4-7 run 1. Unit u begins quad i at column(u, i); which columns share a unit follows from
 * which share the bytes of codes. Quads 2 i and 2 i + 1 are neighbours.
 *
 * Converting integers to floats takes a slow instruction. Instead a code of B bits is put into the
 * upper bits of the mantissa of a float between 2 and 4, v = 2 + code / 2^(B-1), by one permutation
 * of bytes, and the weight is scale * v + offset. A product sums v * x; scale and offset (with
 * the sum of x over the run) come in once per run:
 *     sum of w x = scale * (sum of v x) + offset * (sum of x)
 *
 * The struct kvq_unit_FORMAT of a row of weights.def has
 *     quantized  0: v is the weight itself; neither scale nor offset
 *     runs       1: both runs have the same scale and offset; 2: each its own
 *     load       fetches a unit of a row of n_cols columns, of quantized weights one that is there;
 *                of floats zeros stand for columns that are not. Reads no byte beyond the matrix
 *     values     v of quad i (first four) and quad i + 4 (last four), i < 4
 *     scales     scale and offset of both runs
 *     spread     the same type, or one whose 32 units of 1024 columns are such that the lanes of a
 *                warp that take a unit each read neighbouring bytes
 */
#ifndef KVQ_CUDA_WEIGHT_UNITS_CUH
#define KVQ_CUDA_WEIGHT_UNITS_CUH

#include "cuda/kernels/port.cuh"

#include "bytes.h"

#define KVQ_DEVICE static __device__ __forceinline__

/* Scale and offset of run 0 and run 1. */
struct kvq_unit_scales {
    float scale[2], offset[2];
};

/* Elements and bytes of a block, as weights.def has them. */
#define KVQ_WEIGHT(NAME, ID, BLOCK, BYTES)                                                         \
    struct kvq_block_##NAME {                                                                      \
        enum { block = BLOCK, bytes = BYTES };                                                     \
    };
#include "weights.def"
#undef KVQ_WEIGHT

/* ---- bits to floats ---------------------------------------------------------------------- */

KVQ_DEVICE float kvq_half_bits(uint32_t low_16) {
    return __half2float(__ushort_as_half((unsigned short)low_16));
}

/* Byte i, below 128, as 2 + byte / 64. */
KVQ_DEVICE void kvq_bytes_in_mantissa(float v[4], uint32_t bytes) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[i] = __uint_as_float(__byte_perm(bytes, 0x40000000u, 0x7044u | (uint32_t)i << 8));
    }
}

/* ---- loads ------------------------------------------------------------------------------- */

/* A half and N words behind it from an even address, reading just these bytes: N words on
 * multiples of 4 and the half that they leave in front of them or behind. The half comes in the low
 * bits of `front`. */
template <int N>
KVQ_DEVICE void kvq_load_half_and_words(uint32_t *front, uint32_t words[N], const uint8_t *p) {
    const uint32_t odd = (uint32_t)(uintptr_t)p & 2u; /* 2: the half is in front */
    const uint32_t *const aligned = (const uint32_t *)(p + odd);
    uint32_t raw[N + 1];
    raw[N] = *(const uint16_t *)(p + (4 * N - 2 * N * odd));
#pragma unroll
    for (int i = 0; i < N; i++) raw[i] = aligned[i];
    *front = __byte_perm(raw[0], raw[N], 0x10u + 0x22u * odd);
    const uint32_t selector = 0x5432u - 0x1111u * odd;
#pragma unroll
    for (int i = 0; i < N; i++) words[i] = __byte_perm(raw[i], raw[i + 1], selector);
}

/* Four words from an even address p, with up to two bytes before and four behind them; odd is
 * p % 4. */
KVQ_DEVICE void kvq_load_words_within(uint32_t words[4], const uint8_t *p, uint32_t odd) {
    const uint32_t *const aligned = (const uint32_t *)(p - odd);
    uint32_t raw[5];
#pragma unroll
    for (int i = 0; i < 5; i++) raw[i] = aligned[i];
    const uint32_t selector = 0x3210u + 0x1111u * odd;
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = __byte_perm(raw[i], raw[i + 1], selector);
}

/* ---- blocks of 32 ------------------------------------------------------------------------ */

/* Q4_0, Q4_1, Q5_0, Q5_1: | scale | minimum? | fifth bits? | 16 bytes of nibbles |. A unit is a
 * block; run 0 are the low nibbles. */
template <typename BLOCK, int BITS, bool MINIMUM> struct kvq_unit_nibbles {
    enum { quantized = 1, runs = 1 };
    uint32_t codes[4], fifth, scale, minimum; /* scale and minimum: halves in the low bits */

    static __device__ __forceinline__ int column(int unit, int quad) {
        return 32 * unit + 4 * quad;
    }

    __device__ __forceinline__ void load(const uint8_t *row, int unit, int) {
        enum { WORDS = 4 + (BITS == 5) };
        static_assert((int)BLOCK::bytes == 2 + 2 * MINIMUM + 4 * WORDS, "the layout of a block");
        const uint8_t *const block = row + (size_t)unit * BLOCK::bytes;
        uint32_t words[WORDS];
        if (MINIMUM) { /* a multiple of 4 bytes */
            const uint32_t *const aligned = (const uint32_t *)block;
            scale = aligned[0];
            minimum = scale >> 16;
#pragma unroll
            for (int i = 0; i < WORDS; i++) words[i] = aligned[1 + i];
        } else {
            kvq_load_half_and_words<WORDS>(&scale, words, block);
            minimum = 0;
        }
        fifth = words[0]; /* of five bits; else not used */
#pragma unroll
        for (int i = 0; i < 4; i++) codes[i] = words[WORDS - 4 + i];
    }

    __device__ __forceinline__ void values(float v[8], int i) const {
        enum { SHIFT = 7 - BITS }; /* the code ends at bit 6 of its byte */
        uint32_t low = (codes[i] << SHIFT) & (0x0f0f0f0fu << SHIFT);
        uint32_t high = (codes[i] >> (4 - SHIFT)) & (0x0f0f0f0fu << SHIFT);
        if (BITS == 5) {
            /* Four neighbouring bits go to bit 6 of the four bytes: the product holds bit k at
             * 6 + k + 7 m for m = 0..3, no two at the same place; m = k is the one wanted. */
            low |= (fifth >> (4 * i) & 15u) * 0x08102040u & 0x40404040u;
            high |= (fifth >> (16 + 4 * i) & 15u) * 0x08102040u & 0x40404040u;
        }
        kvq_bytes_in_mantissa(v, low);
        kvq_bytes_in_mantissa(v + 4, high);
    }

    __device__ __forceinline__ kvq_unit_scales scales() const {
        enum { HALF = 1 << (BITS - 1) }; /* v = 2 + code / HALF; without a minimum HALF is zero */
        const float s = kvq_half_bits(scale);
        const float scale_v = s * HALF;
        const float offset = MINIMUM ? kvq_half_bits(minimum) - 2.0f * scale_v : -3.0f * scale_v;
        return {{scale_v, scale_v}, {offset, offset}};
    }
};

struct kvq_unit_Q4_0 : kvq_unit_nibbles<kvq_block_Q4_0, 4, false> {
    typedef kvq_unit_Q4_0 spread;
};
struct kvq_unit_Q4_1 : kvq_unit_nibbles<kvq_block_Q4_1, 4, true> {
    typedef kvq_unit_Q4_1 spread;
};
struct kvq_unit_Q5_0 : kvq_unit_nibbles<kvq_block_Q5_0, 5, false> {
    typedef kvq_unit_Q5_0 spread;
};
struct kvq_unit_Q5_1 : kvq_unit_nibbles<kvq_block_Q5_1, 5, true> {
    typedef kvq_unit_Q5_1 spread;
};

/* | scale | 32 codes i8 |. Too wide for the trick above without loss: 2^23 + code + 128, from which
 * the first two are taken away again, is exact. */
struct kvq_unit_Q8_0 {
    typedef kvq_unit_Q8_0 spread;
    enum { quantized = 1, runs = 1 };
    uint32_t codes[8], scale;

    static __device__ __forceinline__ int column(int unit, int quad) {
        return 32 * unit + 4 * quad;
    }

    __device__ __forceinline__ void load(const uint8_t *row, int unit, int) {
        kvq_load_half_and_words<8>(&scale, codes, row + (size_t)unit * kvq_block_Q8_0::bytes);
    }

    __device__ __forceinline__ void values(float v[8], int i) const {
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const uint32_t shifted = codes[i + k / 4 * 4] ^ 0x80808080u;
            const uint32_t bits = __byte_perm(shifted, 0x4b000000u, 0x7440u | (uint32_t)(k % 4));
            v[k] = __uint_as_float(bits) - 8388736.0f;
        }
    }

    __device__ __forceinline__ kvq_unit_scales scales() const {
        const float s = kvq_half_bits(scale);
        return {{s, s}, {0.0f, 0.0f}};
    }
};

/* ---- super-blocks of 256 ----------------------------------------------------------------- */

/* Q4_K, Q5_K: | unit of scales | unit of minima | 12 bytes of both | fifth bits? | nibbles |.
 * Unit u % 8 = 2 p + h of a super-block takes the low (run 0) and high (run 1) nibbles of 16 bytes,
 * half h of the sub-blocks 2 p and 2 p + 1. */
template <typename BLOCK, int BITS> struct kvq_unit_sub_blocks {
    enum { quantized = 1, runs = 2 };
    uint4 codes, fifth, head;
    int part; /* u % 8 */

    static __device__ __forceinline__ int column(int unit, int quad) {
        return unit / 2 * 64 + unit % 2 * 16 + quad / 4 * 32 + quad % 4 * 4;
    }

    __device__ __forceinline__ void load(const uint8_t *row, int unit, int) {
        static_assert(BLOCK::bytes == 16 + (BITS == 5) * 32 + 128, "the layout of a super-block");
        part = unit % 8;
        const uint4 *const block = (const uint4 *)(row + (size_t)(unit / 8) * BLOCK::bytes);
        head = block[0];
        fifth = BITS == 5 ? block[1 + part % 2] : make_uint4(0, 0, 0, 0);
        codes = block[(BITS == 5 ? 3 : 1) + part];
    }

    __device__ __forceinline__ void values(float v[8], int i) const {
        enum { SHIFT = 7 - BITS };
        const uint32_t word = kvq_word(codes, i);
        uint32_t low = (word << SHIFT) & (0x0f0f0f0fu << SHIFT);
        uint32_t high = (word >> (4 - SHIFT)) & (0x0f0f0f0fu << SHIFT);
        if (BITS == 5) { /* bits 2 p and 2 p + 1 of each byte */
            const uint32_t bits = kvq_word(fifth, i) >> (part & 6);
            low |= bits << 6 & 0x40404040u;
            high |= bits << 5 & 0x40404040u;
        }
        kvq_bytes_in_mantissa(v, low);
        kvq_bytes_in_mantissa(v + 4, high);
    }

    __device__ __forceinline__ kvq_unit_scales scales() const {
        /* Scales and minima (weights.c has the picture) of four sub-blocks at a time. */
        const bool late = part >= 4;
        const uint32_t scale_bits =
            late ? (head.w & 0x0f0f0f0fu) | (head.y >> 2 & 0x30303030u) : head.y & 0x3f3f3f3fu;
        const uint32_t minimum_bits =
            late ? (head.w >> 4 & 0x0f0f0f0fu) | (head.z >> 2 & 0x30303030u) : head.z & 0x3f3f3f3fu;
        /* Byte i as the float 2^23 + i; the fused operations take the 2^23 away without rounding.
         */
        const float unit_scale = kvq_half_bits(head.x) * (1 << (BITS - 1));
        const float unit_minimum = kvq_half_bits(head.x >> 16);
        const float less_scale = -0x1p23f * unit_scale, less_minimum = -0x1p23f * unit_minimum;
        const uint32_t first = part & 2 ? 0x7442u : 0x7440u;
        kvq_unit_scales s;
#pragma unroll
        for (int run = 0; run < 2; run++) {
            const float scale = float_from_byte(scale_bits, first + (uint32_t)run);
            const float minimum = float_from_byte(minimum_bits, first + (uint32_t)run);
            s.scale[run] = __fmaf_rn(unit_scale, scale, less_scale);
            s.offset[run] = -2.0f * s.scale[run] - __fmaf_rn(unit_minimum, minimum, less_minimum);
        }
        return s;
    }

    static __device__ __forceinline__ float float_from_byte(uint32_t bytes, uint32_t selector) {
        return __uint_as_float(__byte_perm(bytes, 0x4b000000u, selector));
    }

    static __device__ __forceinline__ uint32_t kvq_word(const uint4 &words, int i) {
        return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
    }
};

struct kvq_unit_Q4_K : kvq_unit_sub_blocks<kvq_block_Q4_K, 4> {
    typedef kvq_unit_Q4_K spread;
};
struct kvq_unit_Q5_K : kvq_unit_sub_blocks<kvq_block_Q5_K, 5> {
    typedef kvq_unit_Q5_K spread;
};

/* | 128 bytes of low 4 bits | 64 bytes of high 2 bits | 16 scales i8 | unit of scales |.
 * Unit u % 8 = 4 upper + 2 s + h takes the low (run 0) and high (run 1) nibbles of 16 bytes: of the
 * 128 columns of a half, 16 h.. of its runs of 32 columns s and s + 2. */
struct kvq_unit_Q6_K {
    typedef kvq_unit_Q6_K spread;
    enum { quantized = 1, runs = 2 };
    uint32_t low_bits[4], high_bits[4];
    uint32_t unit_scale;
    int scale[2];

    static __device__ __forceinline__ int column(int unit, int quad) {
        return unit / 4 * 128 + unit % 4 * 16 + quad / 4 * 64 + quad % 4 * 4;
    }

    __device__ __forceinline__ void load(const uint8_t *row, int unit, int) {
        const uint8_t *const block = row + (size_t)(unit / 8) * kvq_block_Q6_K::bytes;
        const int upper = unit % 8 / 4, s = unit % 4 / 2, h = unit % 2;
        const uint32_t odd = (uint32_t)(uintptr_t)block & 2u;
        kvq_load_words_within(low_bits, block + unit % 8 * 16, odd);
        kvq_load_words_within(high_bits, block + 128 + upper * 32 + h * 16, odd);
        const int8_t *const scales_16 = (const int8_t *)block + 192 + upper * 8 + s * 2 + h;
        scale[0] = scales_16[0];
        scale[1] = scales_16[4];
        unit_scale = *(const uint16_t *)(block + 208);
#pragma unroll
        for (int i = 0; i < 4; i++) high_bits[i] >>= 2 * s; /* bits 0-1: run 0, bits 4-5: run 1 */
    }

    __device__ __forceinline__ void values(float v[8], int i) const {
        kvq_bytes_in_mantissa(v,
                              (low_bits[i] << 1 & 0x1e1e1e1eu) | (high_bits[i] << 5 & 0x60606060u));
        kvq_bytes_in_mantissa(v + 4,
                              (low_bits[i] >> 3 & 0x1e1e1e1eu) | (high_bits[i] << 1 & 0x60606060u));
    }

    __device__ __forceinline__ kvq_unit_scales scales() const { /* v = 2 + code / 32, 32 is zero */
        const float s = kvq_half_bits(unit_scale) * 32.0f;
        const float s0 = s * (float)scale[0], s1 = s * (float)scale[1];
        return {{s0, s1}, {-3.0f * s0, -3.0f * s1}};
    }
};

/* ---- floats ------------------------------------------------------------------------------ */

/* F16, BF16. With SPREAD unit u % 32 of 1024 columns takes four groups of eight columns, 256 apart.
 */
template <bool BRAIN, bool SPREAD> struct kvq_unit_16_bits {
    enum { quantized = 0, runs = 1 };
    uint32_t words[16];

    static __device__ __forceinline__ int column(int unit, int quad) {
        if (!SPREAD) return 32 * unit + 4 * quad;
        return unit / 32 * 1024 + unit % 32 * 8 + quad / 2 * 256 + quad % 2 * 4;
    }

    __device__ __forceinline__ void load(const uint8_t *row, int unit, int n_cols) {
        const bool aligned = ((uintptr_t)row & 15) == 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int first = column(unit, 2 * i);
            const uint16_t *const p = (const uint16_t *)row + first;
            uint4 w = make_uint4(0, 0, 0, 0);
            if (aligned && first + 8 <= n_cols) {
                w = *(const uint4 *)p;
            } else {
                w.x = pair(p, n_cols - first);
                w.y = pair(p + 2, n_cols - first - 2);
                w.z = pair(p + 4, n_cols - first - 4);
                w.w = pair(p + 6, n_cols - first - 6);
            }
            words[4 * i] = w.x;
            words[4 * i + 1] = w.y;
            words[4 * i + 2] = w.z;
            words[4 * i + 3] = w.w;
        }
    }

    /* Two numbers, of which `left` are there; zeros for the others. */
    static __device__ __forceinline__ uint32_t pair(const uint16_t *p, int left) {
        return (left > 0 ? p[0] : 0u) | (left > 1 ? (uint32_t)p[1] << 16 : 0u);
    }

    __device__ __forceinline__ void values(float v[8], int i) const {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint32_t word = words[2 * i + k / 2 * 8 + k % 2];
            v[2 * k] = BRAIN ? __uint_as_float(word << 16) : kvq_half_bits(word & 0xffffu);
            v[2 * k + 1] = BRAIN ? __uint_as_float(word & 0xffff0000u) : kvq_half_bits(word >> 16);
        }
    }

    __device__ __forceinline__ kvq_unit_scales scales() const { return {{1, 1}, {0, 0}}; }
};

struct kvq_unit_F16 : kvq_unit_16_bits<false, false> {
    typedef kvq_unit_16_bits<false, true> spread;
};
struct kvq_unit_BF16 : kvq_unit_16_bits<true, false> {
    typedef kvq_unit_16_bits<true, true> spread;
};

/* With SPREAD unit u % 32 of 1024 columns takes eight quads, 128 columns apart. */
template <bool SPREAD> struct kvq_unit_32_bits {
    enum { quantized = 0, runs = 1 };
    float4 quads[8];

    static __device__ __forceinline__ int column(int unit, int quad) {
        if (!SPREAD) return 32 * unit + 4 * quad;
        return unit / 32 * 1024 + unit % 32 * 4 + quad * 128;
    }

    __device__ __forceinline__ void load(const uint8_t *row, int unit, int n_cols) {
        const bool aligned = ((uintptr_t)row & 15) == 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int first = column(unit, i), left = n_cols - first;
            const float *const p = (const float *)row + first;
            if (aligned && left >= 4) {
                quads[i] = *(const float4 *)p;
            } else {
                quads[i].x = left > 0 ? p[0] : 0.0f;
                quads[i].y = left > 1 ? p[1] : 0.0f;
                quads[i].z = left > 2 ? p[2] : 0.0f;
                quads[i].w = left > 3 ? p[3] : 0.0f;
            }
        }
    }

    __device__ __forceinline__ void values(float v[8], int i) const {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float4 quad = quads[i + 4 * k];
            v[4 * k] = quad.x;
            v[4 * k + 1] = quad.y;
            v[4 * k + 2] = quad.z;
            v[4 * k + 3] = quad.w;
        }
    }

    __device__ __forceinline__ kvq_unit_scales scales() const { return {{1, 1}, {0, 0}}; }
};

struct kvq_unit_F32 : kvq_unit_32_bits<false> {
    typedef kvq_unit_32_bits<true> spread;
};

#endif
