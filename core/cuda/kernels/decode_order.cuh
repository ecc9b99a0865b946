/* decode_order.cuh: which tokens of a block a lane has the scores of.
 *
 * Which token stands in which column of the product that makes the scores is free. So it is chosen
 * such that a lane gets the scores s[16] of the tokens whose weights the same lane has to bring to
 * the product with the values: they never leave it. s[4 q + i] is the weight that goes into byte i
 * of register q of A (of which there are four for 64 tokens); it comes from tile T = 2 q + i / 2 of
 * the scores, where the lane has columns 2 * (lane % 4) + i % 2. Column c of tile T is loaded by
 * the four lanes of row c.
 *
 * An order says for scores: the octet of tokens of column `column` in tiles 4 * which .. + 3, and
 * which half of it these four tiles are; and for bytes of tokens, such as their scales: the byte of
 * the token of s[i].
 */
#ifndef KVQ_CUDA_DECODE_ORDER_CUH
#define KVQ_CUDA_DECODE_ORDER_CUH

#include "cuda/kernels/port.cuh"

static __device__ __forceinline__ uint32_t word_at(const uint8_t *p) {
    return *reinterpret_cast<const uint32_t *>(p);
}

/* Byte t of a word as a number, by way of 2^23 + byte. */
static __device__ __forceinline__ float byte_of(uint32_t word, int t) {
    return __uint_as_float(kvq_permute(word, 0x4b000000u, 0x7440 + t)) - 8388608.0f;
}

/* As words of c8 have their codes: the lanes of u = lane / 2 % 2 have octets 2 u, 2 u + 1, 4 + u
 * and 6 + u, two of them side by side in a register; those of h = lane % 2 have half h of each. */
struct octets {
    uint32_t words[2][2];

    static __device__ __forceinline__ int octet_of(int u, int which, int e) {
        return which ? 4 + u + 2 * e : 2 * u + e;
    }
    static __device__ __forceinline__ int octet(int column, int which) {
        return octet_of(column / 4, which, column % 2);
    }
    static __device__ __forceinline__ int half(int column, int) { return column / 2 % 2; }

    __device__ __forceinline__ explicit octets(const uint8_t *of_tokens) {
        const int part = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            words[i / 2][i % 2] =
                word_at(of_tokens + 8 * octet_of(part / 2, i / 2, i % 2) + part % 2 * 4);
        }
    }
    __device__ __forceinline__ float at(int i) const {
        return byte_of(words[i / 8][i % 2], i / 2 % 4);
    }
};

/* As windows of t1 and t2 come: a lane has 16 tokens in a row, two octets; a register of A has
 * tokens of one beside those of the other, in turns. */
struct sixteens {
    uint32_t words[2][2]; /* of each octet */

    static __device__ __forceinline__ int octet(int column, int) { return column; }
    static __device__ __forceinline__ int half(int, int which) { return which; }

    __device__ __forceinline__ explicit sixteens(const uint8_t *of_tokens) {
        const uint4 all = *reinterpret_cast<const uint4 *>(of_tokens + 16 * (threadIdx.x % 4));
        words[0][0] = all.x;
        words[0][1] = all.y;
        words[1][0] = all.z;
        words[1][1] = all.w;
    }
    __device__ __forceinline__ float at(int i) const {
        return byte_of(words[i % 2][i / 8], i / 2 % 4);
    }
};

/* Four numbers of 16 bits, in the lower halves of v, as bytes of two registers. */
static __device__ __forceinline__ void split_bytes(uint32_t &high, uint32_t &low,
                                                   const uint32_t v[4]) {
    const uint32_t left = kvq_permute(v[0], v[1], 0x5410);
    const uint32_t right = kvq_permute(v[2], v[3], 0x5410);
    low = kvq_permute(left, right, 0x6420);
    high = kvq_permute(left, right, 0x7531);
}

#endif
