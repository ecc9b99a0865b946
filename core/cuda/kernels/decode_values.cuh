/* decode_values.cuh: weights and sums of one token's queries over the values of a block of c8.
 *
 * The order of tokens is that of decode.cu. */
#ifndef KVQ_CUDA_DECODE_VALUES_CUH
#define KVQ_CUDA_DECODE_VALUES_CUH

#include "cuda/kernels/decode_parts.cuh"
#include "cuda/kernels/unpack.cuh"

/* The octet of tokens that has number e of part `which` in the lanes of u. */
static __device__ __forceinline__ int lane_octet(int u, int which, int e) {
    return which ? 4 + u + 2 * e : 2 * u + e;
}

/* A byte of each of the lane's four tokens of an octet. */
static __device__ __forceinline__ uint32_t token_bytes(const uint8_t *of_tokens, int which, int e) {
    const int part = threadIdx.x % 4;
    return *reinterpret_cast<const uint32_t *>(of_tokens + 8 * lane_octet(part / 2, which, e) +
                                               part % 2 * 4);
}

/* Byte t of a word as a number, by way of 2^23 + byte. */
static __device__ __forceinline__ float byte_of(uint32_t word, int t) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + t)) - 8388608.0f;
}

/* The order of s[16]: four registers of A, byte by byte. Number i of them is token number i / 2 % 2
 * + i / 4 % 2 * 2 of four in an octet, of the octet of part i / 8 and number i % 2. */
static __device__ __forceinline__ int token_number(int i) { return i / 2 % 4; }

/* Four numbers of 14 bits as the bytes of two registers: bits 7 .. 13, and 0 .. 6. */
static __device__ __forceinline__ void split_bytes(uint32_t &high, uint32_t &low,
                                                   const uint32_t v[4]) {
    const uint32_t left = __byte_perm(v[0], v[1], 0x5410), right = __byte_perm(v[2], v[3], 0x5410);
    low = __byte_perm(left & 0x007f007fu, right & 0x007f007fu, 0x6420);
    high = __byte_perm(left >> 7 & 0x007f007fu, right >> 7 & 0x007f007fu, 0x6420);
}

static __device__ __forceinline__ uint32_t four_levels(const int8_t *level) {
    return (uint32_t)(uint8_t)level[0] | (uint32_t)(uint8_t)level[1] << 8 |
           (uint32_t)(uint8_t)level[2] << 16 | (uint32_t)(uint8_t)level[3] << 24;
}

/* Adds a block to a warp's result, whose scores are s. */
template <int D>
static __device__ __forceinline__ void add_values(running<D> &r, const float s[16],
                                                  const uint8_t *block, const kvq_kv_shape &sh) {
    const int lane = threadIdx.x % 32, part = lane % 4, g = lane / 4, u = part / 2;
    const uint8_t *const scales = block + KVQ_C8_SCALES;
    float largest = s[0];
#pragma unroll
    for (int i = 1; i < 16; i++) largest = fmaxf(largest, s[i]);
    largest = largest_of_row(largest);
    raise_largest(r, largest);

    /* Weights relative to the largest of the block, so that 14 bits suffice for all of it. */
    const float of_block = exp2f(largest - r.largest);
    uint32_t a[2][4];
    float sum = 0;
#pragma unroll
    for (int four = 0; four < 4; four++) {
        const uint32_t scale[2] = {token_bytes(scales, four / 2, 0),
                                   token_bytes(scales, four / 2, 1)};
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float p = exp2f(s[4 * four + i] - largest);
            sum += p;
            /* the last bits of 2^23 + x are x, rounded */
            v[i] = __float_as_uint(
                fmaf(p * 64.0f, byte_of(scale[i % 2], token_number(4 * four + i)), 8388608.0f));
        }
        split_bytes(a[four / 2][four % 2 * 2], a[four / 2][four % 2 * 2 + 1], v);
    }
    r.sum += of_block * sum;

    const float unit = of_block * kvq_half_at(block) * (KVQ_LEVEL_UNIT / 64.0f);
    const uint8_t *const words = block + kvq_c8_words(&sh) + g * 8 + part % 2 * 4;
    const uint32_t x_levels[2] = {four_levels(kvq_device_c8_x), four_levels(kvq_device_c8_x + 4)};
    const uint32_t y_levels[2] = {four_levels(kvq_device_c8_y), four_levels(kvq_device_c8_y + 4)};
#pragma unroll
    for (int i = 0; i < D / 16; i++) { /* 16 channels, 8 pairs */
        if (16 * i >= sh.d) break;
        const uint32_t own = *reinterpret_cast<const uint32_t *>(words + i * 192 + u * 64);
        const uint32_t last = *reinterpret_cast<const uint32_t *>(words + i * 192 + 128);
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
            kvq_mma_s8(x, a[which], bx);
            kvq_mma_s8(y, a[which], by);
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            r.o[2 * i][e] += unit * (float)(x[e] * 128 + x[2 + e]);
            r.o[2 * i + 1][e] += unit * (float)(y[e] * 128 + y[2 + e]);
        }
    }
}

/* The order of channels that add_values() leaves: pairs are two apart (kvq_c8_channel). */
struct pair_channel {
    __device__ __forceinline__ int operator()(int tile, int e) const {
        return tile / 2 * 16 + (int)(threadIdx.x % 4) * 4 + tile % 2 * 2 + e;
    }
};

#endif
