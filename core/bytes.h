/* bytes.h: numbers and bytes, for host and device code alike: f16, bf16, loads from any address.
 *
 * Leaf: includes no sibling. C11 and C++14.
 */
#ifndef KVQ_BYTES_H
#define KVQ_BYTES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Functions of headers that kernels for GPUs call too. */
#ifdef __CUDACC__
#define KVQ_BOTH __host__ __device__ static inline
#else
#define KVQ_BOTH static inline
#endif

KVQ_BOTH size_t kvq_round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

/* IEEE 754 binary16, round to nearest even; plain integer arithmetic, so the same on every machine.
 */
KVQ_BOTH float kvq_f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    const uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
    uint32_t bits;
    float f;
    if (exponent == 0x1fu) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
    } else { /* zero or subnormal: mantissa * 2^-24 is exact in binary32 */
        f = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    memcpy(&f, &bits, 4);
    return f;
}

KVQ_BOTH uint16_t kvq_f32_to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) { /* infinity, or NaN kept quiet */
        return (uint16_t)(sign | 0x7c00u | (magnitude > 0x7f800000u ? 0x200u : 0u));
    }
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds past 65504 */
    if (magnitude < 0x38800000u) { /* subnormal half: adding 0.5 makes the FPU round at bit 2^-24 */
        float m;
        memcpy(&m, &magnitude, 4);
        m += 0.5f;
        memcpy(&bits, &m, 4);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

KVQ_BOTH float kvq_bf16_to_f32(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Little-endian loads from addresses of any alignment (a mapped file promises none). */
KVQ_BOTH uint16_t kvq_load_u16(const void *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}
KVQ_BOTH uint32_t kvq_load_u32(const void *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}
KVQ_BOTH uint64_t kvq_load_u64(const void *p) {
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}
KVQ_BOTH float kvq_load_f16(const void *p) { return kvq_f16_to_f32(kvq_load_u16(p)); }

#endif
