/* decode_values.cuh: weights and sums of one token's queries over the values of a block.
 *
 * Each codec unpacks four tokens of a channel into the bytes of a register, in an order of its own,
 * which the scores have to come in: decode_order.cuh.
 */
#ifndef KVQ_CUDA_DECODE_VALUES_CUH
#define KVQ_CUDA_DECODE_VALUES_CUH

#include "cuda/kernels/decode_order.cuh"
#include "cuda/kernels/decode_parts.cuh"
#include "cuda/kernels/unpack.cuh"

/* ---- weights ------------------------------------------------------------------------------ */

/* A block's weights times the scales of their tokens, as the two A fragments of a product over 64
 * tokens: rows g the high bytes of query g, rows g + 8 the low ones. `unit` is what brings the sum
 * 128 * high + low into the scale of the running result. */
struct block_weights {
    uint32_t a[2][4];
    float unit;
};

/* Four numbers of 14 bits as the bytes of two registers: bits 7 .. 13, and 0 .. 6. */
static __device__ __forceinline__ void split_bytes(uint32_t &high, uint32_t &low,
                                                   const uint32_t v[4]) {
    const uint32_t left = __byte_perm(v[0], v[1], 0x5410), right = __byte_perm(v[2], v[3], 0x5410);
    low = __byte_perm(left & 0x007f007fu, right & 0x007f007fu, 0x6420);
    high = __byte_perm(left >> 7 & 0x007f007fu, right >> 7 & 0x007f007fu, 0x6420);
}

/* Weighs the scores s of a block, whose scales of tokens, in bytes, are `scales`. */
template <int D, class Order>
static __device__ __forceinline__ block_weights weigh_block(running<D> &r, const float s[16],
                                                            const Order &scales) {
    block_weights out;
    float largest = s[0], sum = 0;
#pragma unroll
    for (int i = 1; i < 16; i++) largest = fmaxf(largest, s[i]);
    largest = largest_of_row(largest);
    raise_largest(r, largest);
#pragma unroll
    for (int four = 0; four < 4; four++) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            /* relative to the largest of the block, so that 14 bits suffice for all of it */
            const float p = exp2f(s[4 * four + i] - largest);
            sum += p;
            /* the last bits of 2^23 + x are x, rounded */
            v[i] = __float_as_uint(fmaf(p * 64.0f, scales.at(4 * four + i), 8388608.0f));
        }
        split_bytes(out.a[four / 2][four % 2 * 2], out.a[four / 2][four % 2 * 2 + 1], v);
    }
    const float of_block = exp2f(largest - r.largest);
    r.sum += of_block * sum;
    out.unit = of_block * (KVQ_LEVEL_UNIT / 64.0f);
    return out;
}

/* Adds the sums of a tile of 8 channels. */
template <int D>
static __device__ __forceinline__ void add_tile(running<D> &r, int tile, const int32_t sum[4],
                                                float unit) {
#pragma unroll
    for (int e = 0; e < 2; e++) r.o[tile][e] += unit * (float)(sum[e] * 128 + sum[2 + e]);
}

static __device__ __forceinline__ uint32_t four_levels(const int8_t *level) {
    return (uint32_t)(uint8_t)level[0] | (uint32_t)(uint8_t)level[1] << 8 |
           (uint32_t)(uint8_t)level[2] << 16 | (uint32_t)(uint8_t)level[3] << 24;
}

/* ---- c8 ----------------------------------------------------------------------------------- */

struct c8_values {
    typedef octets order;

    /* The number that a lane's channel e of a tile has: pairs are two apart (kvq_c8_channel). */
    static __device__ __forceinline__ int channel(int tile, int e) {
        return tile / 2 * 16 + (int)(threadIdx.x % 4) * 4 + tile % 2 * 2 + e;
    }

    template <int D>
    static __device__ __forceinline__ void add(running<D> &r, const float s[16],
                                               const uint8_t *block, int d) {
        const int lane = threadIdx.x % 32, part = lane % 4, g = lane / 4, u = part / 2;
        const block_weights w = weigh_block(r, s, order(block + KVQ_C8_SCALES));
        const float unit = w.unit * kvq_half_at(block);
        const uint8_t *const words = block + KVQ_C8_SCALES + KVQ_BLOCK + g * 8 + part % 2 * 4;
        const uint32_t x_levels[2] = {four_levels(kvq_device_c8_x),
                                      four_levels(kvq_device_c8_x + 4)};
        const uint32_t y_levels[2] = {four_levels(kvq_device_c8_y),
                                      four_levels(kvq_device_c8_y + 4)};
#pragma unroll
        for (int i = 0; i < D / 16; i++) { /* 16 channels, 8 pairs */
            if (16 * i >= d) break;
            const uint32_t own = word_at(words + i * 192 + u * 64);
            const uint32_t last = word_at(words + i * 192 + 128);
            /* two codes to a byte, of number 0 and 1 */
            const uint32_t codes[2] = {(own & 0x07070707u) | (own << 1 & 0x70707070u),
                                       (last >> 3 * u & 0x07070707u) | (own >> 2 & 0x30303030u) |
                                           (last >> u & 0x40404040u)};
            int32_t x[4] = {0, 0, 0, 0}, y[4] = {0, 0, 0, 0};
#pragma unroll
            for (int which = 0; which < 2; which++) {
                const uint32_t next = codes[which] >> 16;
                const uint32_t bx[2] = {__byte_perm(x_levels[0], x_levels[1], codes[which]),
                                        __byte_perm(x_levels[0], x_levels[1], next)};
                const uint32_t by[2] = {__byte_perm(y_levels[0], y_levels[1], codes[which]),
                                        __byte_perm(y_levels[0], y_levels[1], next)};
                kvq_mma_s8(x, w.a[which], bx);
                kvq_mma_s8(y, w.a[which], by);
            }
            add_tile(r, 2 * i, x, unit);
            add_tile(r, 2 * i + 1, y, unit);
        }
    }
};

/* ---- t1, t2 ------------------------------------------------------------------------------- */

/* Windows of the stream, two to a byte: bytes of `low` are their tokens 0 .. 3 and 4 .. 7 of the 16
 * of this lane, of `high` 8 .. 11 and 12 .. 15. Bits before the word come from the one before it.
 */
template <int BITS>
static __device__ __forceinline__ void trellis_windows(uint32_t &low, uint32_t &high,
                                                       const uint8_t *words) {
    const int part = threadIdx.x % 4;
    uint32_t x[4]; /* the windows of four tokens in the low halves of bytes */
    if (BITS == 2) {
        const uint32_t word = word_at(words + part * 64);
        const uint32_t shifted = __shfl_up_sync(0xffffffffu, word, 1, 4);
        const uint32_t before = part ? shifted : 0;
        x[0] = word << 2 | before >> 30;
        x[1] = word;
        x[2] = word >> 2;
        x[3] = word >> 4;
    } else {
        const uint32_t word = word_at(words + part / 2 * 64);
        const uint32_t shifted = __shfl_up_sync(0xffffffffu, word, 2, 4);
        const uint32_t before = part < 2 ? 0 : shifted;
        /* the lanes of odd number begin 4 places further */
        const uint32_t mine = word >> part % 2 * 4;
        const uint32_t ahead = __funnelshift_r(before, word, part % 2 * 4);
        x[0] = __funnelshift_r(ahead, mine, 29);
        x[1] = __funnelshift_r(ahead, mine, 30);
        x[2] = __funnelshift_r(ahead, mine, 31);
        x[3] = mine;
    }
    low = (x[0] & 0x0f0f0f0fu) | (x[1] << 4 & 0xf0f0f0f0u);
    high = (x[2] & 0x0f0f0f0fu) | (x[3] << 4 & 0xf0f0f0f0u);
}

/* Looks four of 16 levels up: those that the halves of bytes 2 * half and 2 * half + 1 name. A byte
 * permutation has 8 entries; the last bit of a number chooses between two of them. */
static __device__ __forceinline__ uint32_t look_up(const uint32_t levels[4], uint32_t numbers,
                                                   int half) {
    const uint32_t entry = (numbers & 0x77777777u) >> 16 * half;
    const uint32_t below = __byte_perm(levels[0], levels[1], entry);
    const uint32_t above = __byte_perm(levels[2], levels[3], entry);
    const uint32_t choice = kvq_spread_signs(numbers << 4, numbers, half ? 0xfbea : 0xd9c8);
    return (below & ~choice) | (above & choice);
}

template <int BITS> struct t_values {
    typedef sixteens order;

    static __device__ __forceinline__ int channel(int tile, int e) {
        return 8 * tile + (int)(threadIdx.x % 4) * 2 + e;
    }

    template <int D>
    static __device__ __forceinline__ void add(running<D> &r, const float s[16],
                                               const uint8_t *block, int d) {
        const int g = threadIdx.x % 32 / 4;
        const int8_t *const level = BITS == 2 ? kvq_device_t2_level : kvq_device_t1_level;
        const uint32_t levels[4] = {four_levels(level), four_levels(level + 4),
                                    four_levels(level + 8), four_levels(level + 12)};
        const block_weights w = weigh_block(r, s, order(block + 4));
        const float unit = w.unit * kvq_half_at(block);
#pragma unroll
        for (int tile = 0; tile < D / 8; tile++) {
            if (8 * tile >= d) break;
            const uint8_t *const words =
                block + KVQ_T_HEADER + (tile / 2 * 2 * BITS * 16 + tile % 2 * 8 + g) * 4;
            uint32_t numbers[2];
            int32_t sum[4] = {0, 0, 0, 0};
            trellis_windows<BITS>(numbers[0], numbers[1], words);
#pragma unroll
            for (int which = 0; which < 2; which++) {
                const uint32_t b[2] = {look_up(levels, numbers[which], 0),
                                       look_up(levels, numbers[which], 1)};
                kvq_mma_s8(sum, w.a[which], b);
            }
            add_tile(r, tile, sum, unit);
        }
    }
};

#endif
