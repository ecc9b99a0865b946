/* decode_halves.cuh: bytes as halves, two to a register, and queries as numbers below 1. */
#ifndef KVQ_CUDA_DECODE_HALVES_CUH
#define KVQ_CUDA_DECODE_HALVES_CUH

#include "cuda/kernels/decode_parts.cuh"

static __device__ __forceinline__ uint32_t bits_of(__half2 x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static __device__ __forceinline__ __half2 halves_of(uint32_t bits) {
    __half2 x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static __device__ __forceinline__ __half2 both(int x) {
    return __floats2half2_rn((float)x, (float)x);
}

/* Two bytes of a word as halves, less what `base` exceeds 1024 by: 0x6400 is 1024, whose last place
 * is 1. The permutation puts them into bytes 0 and 2, and byte 4 of it into the others. */
static __device__ __forceinline__ __half2 halves_at(uint32_t word, uint32_t permutation, int base) {
    return __hsub2(halves_of(__byte_perm(word, 0x64646464u, permutation)), both(base));
}

/* The largest magnitude of the query x[d] of the lane's row, which its four lanes look for. */
static __device__ __forceinline__ float largest_of_query(const float *x, int d, bool there) {
    float largest = 0;
    for (int c = threadIdx.x % 4; c < d && there; c += 4) largest = fmaxf(largest, fabsf(x[c]));
    return largest_of_row(largest);
}

#endif
