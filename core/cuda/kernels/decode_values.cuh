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
 * 256 * high + low into the scale of the running result. */
struct block_weights {
    uint32_t a[2][4];
    float unit;
};

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
            /* relative to the largest of the block, so that 16 bits suffice for all of it */
            const float p = kvq_exp2(s[4 * four + i] - largest);
            sum += p;
            /* the last bits of 2^23 + x are x, rounded */
            v[i] = __float_as_uint(fmaf(p * 257.0f, scales.at(4 * four + i), 8388608.0f));
        }
        split_bytes(out.a[four / 2][four % 2 * 2], out.a[four / 2][four % 2 * 2 + 1], v);
    }
    const float of_block = kvq_exp2(largest - r.largest);
    r.sum += of_block * sum;
    out.unit = of_block * (KVQ_LEVEL_UNIT / 257.0f);
    return out;
}

/* Adds the sums of a tile of 8 channels. */
template <int D>
static __device__ __forceinline__ void add_tile(running<D> &r, int tile, const int32_t sum[4],
                                                float unit) {
#pragma unroll
    for (int e = 0; e < 2; e++) r.o[tile][e] += unit * (float)(sum[e] * 256 + sum[2 + e]);
}

static constexpr __device__ uint32_t four_bytes(const int8_t *x) {
    return (uint32_t)(uint8_t)x[0] | (uint32_t)(uint8_t)x[1] << 8 | (uint32_t)(uint8_t)x[2] << 16 |
           (uint32_t)(uint8_t)x[3] << 24;
}

/* ---- c8 ----------------------------------------------------------------------------------- */

struct c8_values {
    typedef octets order;

    /* The number that a lane's channel e of a tile has: pairs are two apart (kvq_c8_channel). */
    static __device__ __forceinline__ int channel(int tile, int e) {
        return tile / 2 * 16 + (int)(threadIdx.x % 4) * 4 + tile % 2 * 2 + e;
    }

    template <int D>
    __device__ __forceinline__ void add(running<D> &r, const float s[16], const uint8_t *block,
                                        int d) const {
        const int lane = threadIdx.x % 32, part = lane % 4, g = lane / 4, u = part / 2;
        const block_weights w = weigh_block(r, s, order(block + KVQ_C8_SCALES));
        const float unit = w.unit * kvq_half_at(block);
        const uint8_t *const words = block + KVQ_C8_SCALES + KVQ_BLOCK + g * 8 + part % 2 * 4;
        constexpr int8_t x_entries[8] = {KVQ_C8_X}, y_entries[8] = {KVQ_C8_Y};
        constexpr uint32_t x_levels[2] = {four_bytes(x_entries), four_bytes(x_entries + 4)};
        constexpr uint32_t y_levels[2] = {four_bytes(y_entries), four_bytes(y_entries + 4)};
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
                const uint32_t bx[2] = {kvq_permute(x_levels[0], x_levels[1], codes[which]),
                                        kvq_permute(x_levels[0], x_levels[1], next)};
                const uint32_t by[2] = {kvq_permute(y_levels[0], y_levels[1], codes[which]),
                                        kvq_permute(y_levels[0], y_levels[1], next)};
                kvq_mma_u8_s8(x, w.a[which], bx);
                kvq_mma_u8_s8(y, w.a[which], by);
            }
            add_tile(r, 2 * i, x, unit);
            add_tile(r, 2 * i + 1, y, unit);
        }
    }
};

/* ---- t1, t2 ------------------------------------------------------------------------------- */

/* Windows of the stream, two to a byte, of the 16 tokens of this lane: byte t % 4 of numbers[t / 4]
 * has those of tokens t and t + 8 in its low and its high half. A window ends with the code of its
 * token; bits before the word come from the word before. */
template <int BITS>
static __device__ __forceinline__ void trellis_windows(uint32_t numbers[2], const uint8_t *words) {
    const int part = threadIdx.x % 4;
    if (BITS == 2) { /* the windows lie side by side, as they are wanted */
        const uint32_t word = word_at(words + part * 64);
        const uint32_t shifted = __shfl_up_sync(0xffffffffu, word, 1, 4);
        numbers[0] = __funnelshift_l(part ? shifted : 0, word, 2);
        numbers[1] = word;
    } else {
        const uint32_t word = word_at(words + part / 2 * 64);
        const uint32_t shifted = __shfl_up_sync(0xffffffffu, word, 2, 4);
        const uint32_t before = part < 2 ? 0 : shifted;
        /* the lanes of odd number begin 4 places further */
        const uint32_t mine = word >> part % 2 * 4;
        const uint32_t ahead = __funnelshift_r(before, word, part % 2 * 4);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t x = __funnelshift_l(ahead, mine, 3 - i);
            numbers[i] = (x & 0x0f0f0f0fu) | (x << 2 & 0xf0f0f0f0u);
        }
    }
}

/* Two tables of 8 entries, by which kvq_permute looks 16 levels up. Where a window is 8 or more,
 * the lower table gives not an entry but the sign of one, 0 or -1; so does the upper table below 8,
 * once the windows' highest bit is turned. A level is the sum of what both give, which the product
 * makes. */
struct trellis_tables {
    uint32_t lower[2], upper[2];
};

/* Whether each level stays in a byte, and keeps its sign, when it is 1 more: -1 would become 0, and
 * 127 would become -128. */
static constexpr __device__ bool trellis_fits(const int8_t *levels) {
    for (int i = 0; i < 16; i++)
        if (levels[i] == -1 || levels[i] == 127) return false;
    return true;
}

/* Four entries: levels, less the signs that the other table gives for them. */
static constexpr __device__ uint32_t trellis_entries(const int8_t *levels, int first) {
    uint32_t entries = 0;
    for (int i = 0; i < 4; i++) {
        const int level = levels[first + i] + (levels[(first + i + 8) % 16] < 0);
        entries |= (uint32_t)(uint8_t)level << 8 * i;
    }
    return entries;
}

template <int BITS> static __device__ __forceinline__ trellis_tables trellis_tables_of() {
    constexpr int8_t t1[16] = {KVQ_T1_LEVELS}, t2[16] = {KVQ_T2_LEVELS};
    static_assert(trellis_fits(t1) && trellis_fits(t2), "no level may be -1 or 127");
    constexpr uint32_t lower[2][2] = {{trellis_entries(t1, 0), trellis_entries(t1, 4)},
                                      {trellis_entries(t2, 0), trellis_entries(t2, 4)}};
    constexpr uint32_t upper[2][2] = {{trellis_entries(t1, 8), trellis_entries(t1, 12)},
                                      {trellis_entries(t2, 8), trellis_entries(t2, 12)}};
    return {{lower[BITS - 1][0], lower[BITS - 1][1]}, {upper[BITS - 1][0], upper[BITS - 1][1]}};
}

struct t_values {
    typedef sixteens order;
    bool is_t1; /* else t2 */

    static __device__ __forceinline__ int channel(int tile, int e) {
        return 8 * tile + (int)(threadIdx.x % 4) * 2 + e;
    }

    template <int D>
    __device__ __forceinline__ void add(running<D> &r, const float s[16], const uint8_t *block,
                                        int d) const {
        const block_weights w = weigh_block(r, s, order(block + 4));
        const float unit = w.unit * kvq_half_at(block);
        if (is_t1) {
            add_tiles<1>(r, w, unit, block, d);
        } else {
            add_tiles<2>(r, w, unit, block, d);
        }
    }

    template <int BITS, int D>
    static __device__ __forceinline__ void add_tiles(running<D> &r, const block_weights &w,
                                                     float unit, const uint8_t *block, int d) {
        const int g = threadIdx.x % 32 / 4;
        const trellis_tables tables = trellis_tables_of<BITS>();
#pragma unroll
        for (int tile = 0; tile < D / 8; tile++) {
            if (8 * tile >= d) break;
            const uint8_t *const words =
                block + KVQ_T_HEADER + (tile / 2 * 2 * BITS * 16 + tile % 2 * 8 + g) * 4;
            uint32_t numbers[2];
            int32_t sum[4] = {0, 0, 0, 0};
            trellis_windows<BITS>(numbers, words);
#pragma unroll
            for (int which = 0; which < 2; which++) {
                const uint32_t number = numbers[which], turned = number ^ 0x88888888u;
                const uint32_t lower[2] = {
                    kvq_permute(tables.lower[0], tables.lower[1], number),
                    kvq_permute(tables.lower[0], tables.lower[1], number >> 16)};
                const uint32_t upper[2] = {
                    kvq_permute(tables.upper[0], tables.upper[1], turned),
                    kvq_permute(tables.upper[0], tables.upper[1], turned >> 16)};
                kvq_mma_u8_s8(sum, w.a[which], lower);
                kvq_mma_u8_s8(sum, w.a[which], upper);
            }
            add_tile(r, tile, sum, unit);
        }
    }
};

#endif
