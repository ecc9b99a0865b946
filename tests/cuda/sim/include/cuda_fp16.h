/* cuda_fp16.h (of the simulator): half and half2 over the conversions of bytes.h; every operation
 * rounds once, to nearest even. */
#ifndef CUSIM_CUDA_FP16_H
#define CUSIM_CUDA_FP16_H

#include "bytes.h"
#include "cuda_runtime.h"

struct __half {
    __half() = default;
    __half(float x) : bits(kvq_f32_to_f16(x)) {}
    operator float() const { return kvq_f16_to_f32(bits); }
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline float __half2float(__half h) { return h; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short bits) {
    __half h;
    h.bits = bits;
    return h;
}

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float2half2_rn(float x) { return {x, x}; }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline float __low2float(__half2 h) { return h.x; }
inline float __high2float(__half2 h) { return h.y; }

namespace cusim {

/* To float so that a second rounding, to half, cannot go wrong: what is not exact gets an odd last
 * bit and so lies on neither a half nor the middle of two. */
inline float round_to_odd(double x) {
    const float nearest = (float)x;
    if (nearest == x || nearest != nearest) return nearest;
    const float below = fabs((double)nearest) > fabs(x) ? nextafterf(nearest, 0.0f) : nearest;
    return __uint_as_float(__float_as_uint(below) | 1);
}

} // namespace cusim

/* Sums and products of halves rounded to float first round to the same half. */
inline __half __hadd(__half a, __half b) { return (float)a + (float)b; }
inline __half __hsub(__half a, __half b) { return (float)a - (float)b; }
inline __half __hmul(__half a, __half b) { return (float)a * (float)b; }
inline __half __hfma(__half a, __half b, __half c) {
    return cusim::round_to_odd((double)(float)a * (double)(float)b + (double)(float)c);
}
inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}

#endif
