/* vec_neon.h: the vector words that the kernel texts (*_kernels.inl) are written in, for NEON with
 * the dot products of FEAT_DotProd, on little-endian AArch64.
 *
 * The words mean what they mean in vec_avx2.h. A vector is two registers, so that the layouts of
 * AVX2 serve. vf: 8 f32. vi: 8 i32. vb: 32 bytes. A cast between the vectors of the compiler keeps
 * the bits. Included by isa_neon.c after it has switched its target on.
 */
#ifndef KVQ_VEC_NEON_H
#define KVQ_VEC_NEON_H

#include <arm_neon.h>

#define VF_LANES 8      /* f32 in a vector */
#define VF_REGISTERS 16 /* vectors that fit the 32 registers */
#define VS_LANES (2 * VF_LANES)

typedef struct vf {
    float32x4_t lo, hi;
} vf;
typedef struct vi {
    int32x4_t lo, hi;
} vi;
typedef vi vb;

static inline vf vf_set(float x) { return (vf){vdupq_n_f32(x), vdupq_n_f32(x)}; }
static inline vf vf_zero(void) { return vf_set(0); }
static inline vf vf_load(const float *p) { return (vf){vld1q_f32(p), vld1q_f32(p + 4)}; }
static inline void vf_store(float *p, vf a) {
    vst1q_f32(p, a.lo);
    vst1q_f32(p + 4, a.hi);
}
static inline vf vf_add(vf a, vf b) { return (vf){vaddq_f32(a.lo, b.lo), vaddq_f32(a.hi, b.hi)}; }
static inline vf vf_sub(vf a, vf b) { return (vf){vsubq_f32(a.lo, b.lo), vsubq_f32(a.hi, b.hi)}; }
static inline vf vf_mul(vf a, vf b) { return (vf){vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)}; }
static inline vf vf_div(vf a, vf b) { return (vf){vdivq_f32(a.lo, b.lo), vdivq_f32(a.hi, b.hi)}; }
static inline vf vf_max(vf a, vf b) { return (vf){vmaxq_f32(a.lo, b.lo), vmaxq_f32(a.hi, b.hi)}; }
static inline vf vf_max_abs(vf a, vf b) {
    return (vf){vmaxq_f32(a.lo, vabsq_f32(b.lo)), vmaxq_f32(a.hi, vabsq_f32(b.hi))};
}
static inline vf vf_fma(vf a, vf b, vf c) { /* a * b + c */
    return (vf){vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)};
}
static inline float vf_first(vf a) { return vgetq_lane_f32(a.lo, 0); } /* lane 0 */
static inline float vf_sum(vf a) { return vaddvq_f32(vaddq_f32(a.lo, a.hi)); }

static inline vi vi_set(int32_t x) { return (vi){vdupq_n_s32(x), vdupq_n_s32(x)}; }
static inline vi vi_zero(void) { return vi_set(0); }
static inline vi vi_load(const void *p) {
    return (vi){(int32x4_t)vld1q_u8(p), (int32x4_t)vld1q_u8((const uint8_t *)p + 16)};
}
static inline vi vi_and(vi a, vi b) { return (vi){vandq_s32(a.lo, b.lo), vandq_s32(a.hi, b.hi)}; }
static inline vi vi_or(vi a, vi b) { return (vi){vorrq_s32(a.lo, b.lo), vorrq_s32(a.hi, b.hi)}; }
static inline vi vi_add(vi a, vi b) { return (vi){vaddq_s32(a.lo, b.lo), vaddq_s32(a.hi, b.hi)}; }
static inline vi vi_mul(vi a, vi b) { return (vi){vmulq_s32(a.lo, b.lo), vmulq_s32(a.hi, b.hi)}; }
static inline vi vi_shr(vi a, int n) { /* n: a constant; zeros come in */
    return (vi){(int32x4_t)((uint32x4_t)a.lo >> n), (int32x4_t)((uint32x4_t)a.hi >> n)};
}
static inline vi vi_shl(vi a, int n) {
    return (vi){(int32x4_t)((uint32x4_t)a.lo << n), (int32x4_t)((uint32x4_t)a.hi << n)};
}
static inline vi vi_shr_lanes(vi a, vi n) { /* n: by lane */
    return (vi){(int32x4_t)vshlq_u32((uint32x4_t)a.lo, vnegq_s32(n.lo)),
                (int32x4_t)vshlq_u32((uint32x4_t)a.hi, vnegq_s32(n.hi))};
}
static inline vi vi_from_halves(int16x8_t a) { /* widened */
    return (vi){vmovl_s16(vget_low_s16(a)), vmovl_high_s16(a)};
}
static inline vf vf_from_vi(vi a) { return (vf){vcvtq_f32_s32(a.lo), vcvtq_f32_s32(a.hi)}; }
static inline vi vi_from_vf(vf a) { return (vi){vcvtnq_s32_f32(a.lo), vcvtnq_s32_f32(a.hi)}; }

static inline vb vb_load(const void *p) { return vi_load(p); }
static inline vb vb_set(int x) {
    const int32x4_t all = (int32x4_t)vdupq_n_s8((int8_t)x);
    return (vb){all, all};
}
static inline vb vb_and(vb a, vb b) { return vi_and(a, b); }
/* Per byte, n: a constant of 0 to 7; the bytes of a mask are equal. */
static inline vb vb_shr(vb a, int n, vb mask) {
    const uint8x16_t by = vdupq_n_u8((uint8_t)n);
    const vb shifted = {(int32x4_t)((uint8x16_t)a.lo >> by), (int32x4_t)((uint8x16_t)a.hi >> by)};
    const bool clears = (255 >> n & ~vgetq_lane_u8((uint8x16_t)mask.lo, 0)) != 0; /* known */
    return clears ? vb_and(shifted, mask) : shifted;
}
static inline vb vb_shl(vb a, int n, vb mask) {
    const uint8x16_t by = vdupq_n_u8((uint8_t)n);
    return vb_and((vb){(int32x4_t)((uint8x16_t)a.lo << by), (int32x4_t)((uint8x16_t)a.hi << by)},
                  mask);
}

/* ---- f16, bf16, bytes as f32 -------------------------------------------------------------- */

static inline vf vf_from_f16(uint16x8_t a) {
    const float16x8_t halves = (float16x8_t)a;
    return (vf){vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
static inline vf vf_load_f16(const uint16_t *p) {
    return vf_from_f16((uint16x8_t)vld1q_u8((const uint8_t *)p));
}
static inline vf vf_from_f16_low(vi a) { /* the f16 in the low half of each lane */
    return vf_from_f16(vuzp1q_u16((uint16x8_t)a.lo, (uint16x8_t)a.hi));
}
static inline vf vf_set_half(const void *p) {
    const float32x4_t all = vcvt_f32_f16((float16x4_t)vdup_n_u16(kvq_load_u16(p)));
    return (vf){all, all};
}
static inline float load_half(const void *p) { return vf_first(vf_set_half(p)); }
static inline vf vf_load_bf16(const void *p) {
    const uint16x8_t halves = (uint16x8_t)vld1q_u8(p), zero = vdupq_n_u16(0);
    return (vf){(float32x4_t)vzip1q_u16(zero, halves), (float32x4_t)vzip2q_u16(zero, halves)};
}
static inline vi vi_load_u8(const uint8_t *p) { /* 8 bytes, one to a lane */
    return vi_from_halves((int16x8_t)vmovl_u8(vld1_u8(p)));
}
static inline vf vf_load_u8(const uint8_t *p) { return vf_from_vi(vi_load_u8(p)); }
static inline vf vf_load_i8(const int8_t *p) {
    return vf_from_vi(vi_from_halves(vmovl_s8(vld1_s8(p))));
}
static inline vf vf_load_first(const float *p, int n) { /* the first n, zeros in the other lanes */
    float first[8] = {0};
    if (n >= 8) return vf_load(p);
    for (int i = 0; i < n; i++) first[i] = p[i];
    return vf_load(first);
}

/* ---- words of elementwise_kernels.inl ----------------------------------------------------- */

static inline vf vf_neg_abs(vf a) {
    const int32x4_t sign = vdupq_n_s32(INT32_MIN);
    return (vf){(float32x4_t)vorrq_s32((int32x4_t)a.lo, sign),
                (float32x4_t)vorrq_s32((int32x4_t)a.hi, sign)};
}
static inline vf vf_where_negative(vf x, vf yes, vf no) { /* by the sign bit of x */
    return (vf){vbslq_f32(vcltzq_s32((int32x4_t)x.lo), yes.lo, no.lo),
                vbslq_f32(vcltzq_s32((int32x4_t)x.hi), yes.hi, no.hi)};
}

/* x - floor(x), and y * 2^floor(x), as in vec_avx2.h */
static inline vf vf_fraction(vf x) {
    return (vf){vsubq_f32(x.lo, vrndmq_f32(x.lo)), vsubq_f32(x.hi, vrndmq_f32(x.hi))};
}
static inline float32x4_t four_times_exp2_floor(float32x4_t y, float32x4_t x) {
    const int32x4_t exponent = vshlq_n_s32(vcvtmq_s32_f32(x), 23);
    const uint32x4_t too_small = vcltq_f32(x, vdupq_n_f32(-126.0f)); /* no NaN is */
    return (float32x4_t)vbicq_s32(vaddq_s32((int32x4_t)y, exponent), (int32x4_t)too_small);
}
static inline vf vf_times_exp2_floor(vf y, vf x) {
    return (vf){four_times_exp2_floor(y.lo, x.lo), four_times_exp2_floor(y.hi, x.hi)};
}

/* ---- words of the KV kernels -------------------------------------------------------------- */

/* 16 i16, as in vec_avx2.h. */
static inline vi vi_set16(int16_t x) {
    const int32x4_t all = (int32x4_t)vdupq_n_s16(x);
    return (vi){all, all};
}
static inline vi vs_pair(int16x8_t lo, int16x8_t hi) { return (vi){(int32x4_t)lo, (int32x4_t)hi}; }
static inline void vi_store(void *p, vi a) {
    vst1q_s32(p, a.lo);
    vst1q_s32((int32_t *)p + 4, a.hi);
}
static inline vi vs_load(const int16_t *p) { return vs_pair(vld1q_s16(p), vld1q_s16(p + 8)); }
static inline vi vs_load_i8(const int8_t *p) {
    const int8x16_t bytes = vld1q_s8(p);
    return vs_pair(vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
}
static inline vi vs_load_u8_times_128(const uint8_t *p) {
    const uint8x16_t bytes = vld1q_u8(p);
    return vs_pair((int16x8_t)vshll_n_u8(vget_low_u8(bytes), 7),
                   (int16x8_t)vshll_high_n_u8(bytes, 7));
}
static inline vi vs_mul(vi a, vi b) {
    return vs_pair(vqrdmulhq_s16((int16x8_t)a.lo, (int16x8_t)b.lo),
                   vqrdmulhq_s16((int16x8_t)a.hi, (int16x8_t)b.hi));
}
static inline vi vs_max_abs(vi top, vi a) {
    return vs_pair(vmaxq_s16((int16x8_t)top.lo, vqabsq_s16((int16x8_t)a.lo)),
                   vmaxq_s16((int16x8_t)top.hi, vqabsq_s16((int16x8_t)a.hi)));
}
static inline vf vs_top(vi top) {
    const int32x4_t low = vdupq_n_s32(0xffff);
    return (vf){vcvtq_f32_s32(vmaxq_s32(vandq_s32(top.lo, low), vshrq_n_s32(top.lo, 16))),
                vcvtq_f32_s32(vmaxq_s32(vandq_s32(top.hi, low), vshrq_n_s32(top.hi, 16)))};
}
static inline void vs_store_i8(int8_t *p, vi a) {
    vst1q_s8(p, vcombine_s8(vmovn_s16((int16x8_t)a.lo), vmovn_s16((int16x8_t)a.hi)));
}
/* Sums other pairs into a lane than vec_avx2.h does; those of all lanes come to the same. */
static inline vi vi_dot16(vi sum, vi a, vi b) {
    const int16x8_t a_lo = (int16x8_t)a.lo, b_lo = (int16x8_t)b.lo;
    const int16x8_t a_hi = (int16x8_t)a.hi, b_hi = (int16x8_t)b.hi;
    sum.lo = vmlal_s16(sum.lo, vget_low_s16(a_lo), vget_low_s16(b_lo));
    sum.hi = vmlal_s16(sum.hi, vget_low_s16(a_hi), vget_low_s16(b_hi));
    return (vi){vmlal_high_s16(sum.lo, a_lo, b_lo), vmlal_high_s16(sum.hi, a_hi, b_hi)};
}

#define VF_OF_EACH(NAME, OP, PAIRS)                                                                \
    static inline vf NAME(const vf a[4]) {                                                         \
        const float32x4_t ab = PAIRS(OP(a[0].lo, a[0].hi), OP(a[1].lo, a[1].hi));                  \
        const float32x4_t cd = PAIRS(OP(a[2].lo, a[2].hi), OP(a[3].lo, a[3].hi));                  \
        return (vf){PAIRS(ab, cd), vdupq_n_f32(0)};                                                \
    }
VF_OF_EACH(vf_sums, vaddq_f32, vpaddq_f32)
VF_OF_EACH(vf_largests, vmaxq_f32, vpmaxq_f32)
static inline void vf_store_four(float *p, vf a) { vst1q_f32(p, a.lo); }

/* table[index & 7], or [index & 15], in each lane: bytes 4 index to 4 index + 3 of the table */
static inline uint8x16_t bytes_of_lanes(int32x4_t index, int most) {
    const int32x4_t low = vandq_s32(index, vdupq_n_s32(most));
    return (uint8x16_t)vmlaq_s32(vdupq_n_s32(0x03020100), low, vdupq_n_s32(0x04040404));
}
static inline vf vf_lookup8(vf table, vi index) {
    const uint8x16x2_t bytes = {{(uint8x16_t)table.lo, (uint8x16_t)table.hi}};
    return (vf){(float32x4_t)vqtbl2q_u8(bytes, bytes_of_lanes(index.lo, 7)),
                (float32x4_t)vqtbl2q_u8(bytes, bytes_of_lanes(index.hi, 7))};
}
static inline vf vf_lookup16(vf low, vf high, vi index) { /* the table as its two halves */
    const uint8x16x4_t bytes = {
        {(uint8x16_t)low.lo, (uint8x16_t)low.hi, (uint8x16_t)high.lo, (uint8x16_t)high.hi}};
    return (vf){(float32x4_t)vqtbl4q_u8(bytes, bytes_of_lanes(index.lo, 15)),
                (float32x4_t)vqtbl4q_u8(bytes, bytes_of_lanes(index.hi, 15))};
}

static inline float32x4_t add_or_sub(float32x4_t a, float32x4_t b, uint32x4_t subtracted) {
    return vbslq_f32(subtracted, vsubq_f32(a, b), vaddq_f32(a, b));
}
static inline vf vf_butterfly(vf a, int half) { /* as in vec_avx2.h */
    const uint32x4_t odd = (uint32x4_t){0, ~0u, 0, ~0u}, upper = (uint32x4_t){0, 0, ~0u, ~0u};
    if (half == 4) return (vf){vaddq_f32(a.lo, a.hi), vsubq_f32(a.lo, a.hi)};
    if (half == 1)
        return (vf){add_or_sub(vrev64q_f32(a.lo), a.lo, odd),
                    add_or_sub(vrev64q_f32(a.hi), a.hi, odd)};
    return (vf){add_or_sub(vextq_f32(a.lo, a.lo, 2), a.lo, upper),
                add_or_sub(vextq_f32(a.hi, a.hi, 2), a.hi, upper)};
}

/* ---- words of integer products: u in 0..127, so that a product of signed bytes serves ------ */

static inline vb vb_set8(const void *p) { /* 8 bytes, repeated */
    const int32x4_t all = (int32x4_t)vcombine_u8(vld1_u8(p), vld1_u8(p));
    return (vb){all, all};
}
static inline vb vb_set16(const void *p) { /* 16 bytes, the same */
    const int32x4_t all = (int32x4_t)vld1q_u8(p);
    return (vb){all, all};
}

/* table[index & 15] in each byte, the table repeated every 16 bytes */
static inline vb vb_lookup16(vb table, vb index) {
    const vb low = vb_and(index, vb_set(15));
    return (vb){(int32x4_t)vqtbl1q_u8((uint8x16_t)table.lo, (uint8x16_t)low.lo),
                (int32x4_t)vqtbl1q_u8((uint8x16_t)table.hi, (uint8x16_t)low.hi)};
}
static inline vb vb_select(vb mask, vb a, vb b) { /* bits of a where the mask has them, else of b */
    return (vb){vbslq_s32((uint32x4_t)mask.lo, a.lo, b.lo),
                vbslq_s32((uint32x4_t)mask.hi, a.hi, b.hi)};
}

/* Each lane plus its four bytes of `a` times the four at `lane` of the factors. */
#define DOT8(sum, a, factors, lane) vdotq_lane_s32(sum, (int8x16_t)(a), factors, lane)
#define DOT16(sum, a, factors, lane) vdotq_laneq_s32(sum, (int8x16_t)(a), factors, lane)

typedef int8x8_t v8;
typedef int8x16_t v16;
static inline v8 v8_load(const void *p) { return vld1_s8(p); }
static inline v16 v16_load(const void *p) { return vld1q_s8(p); }

#define VD_TOKENS 2 /* vectors of tokens that are summed side by side */
typedef vi vd;
#define vd_fields(u, packed, j, bits, low, next)                                                   \
    do {                                                                                           \
        (u)[0] = vb_shr(packed, (bits) * (j), low);                                                \
        (u)[1] = vb_shr(packed, (bits) * (j) + (bits), low);                                       \
        (void)(next);                                                                              \
    } while (0)
static inline int vd_most(int m) { return INT32_MAX / 2 / m; }
static inline vd vd_zero(void) { return vi_zero(); }
static inline vd vd_add(vd sum, vb u0, vb u1, v8 s) {
    sum = (vd){DOT8(sum.lo, u0.lo, s, 0), DOT8(sum.hi, u0.hi, s, 0)};
    return (vd){DOT8(sum.lo, u1.lo, s, 1), DOT8(sum.hi, u1.hi, s, 1)};
}
static inline vi vd_total(vd sum, int bits) {
    (void)bits;
    return sum;
}

typedef struct vw {
    vd high, low;
} vw;
#define VW_LOW_MOST 0 /* the low plane is never alone */
static inline vw vw_zero(void) { return (vw){vd_zero(), vd_zero()}; }
static inline vw vw_add(vw sum, v8 high, v8 low, vb s0, vb s1) {
    return (vw){vd_add(sum.high, s0, s1, high), vd_add(sum.low, s0, s1, low)};
}
static inline vi vw_total(vw sum) { return vi_add(vi_shl(sum.high, 6), sum.low); }

/* Words of c8 are loaded with the first four tokens of four pairs in one register and their last
 * four in the other: so every product of v16 is one of a lane with its own tokens, and the sums of
 * four pairs fit a register. */
typedef struct vp {
    int32x4_t high, low;
} vp;
static inline vp vp_zero(void) { return (vp){vdupq_n_s32(0), vdupq_n_s32(0)}; }
static inline vb vb_load_pairs(const uint8_t *p) {
    const vb words = vb_load(p);
    return (vb){vuzp1q_s32(words.lo, words.hi), vuzp2q_s32(words.lo, words.hi)};
}
static inline int32x4_t dot_of_sixteen(int32x4_t sum, vb s0, vb s1, v16 factors) {
    sum = DOT16(DOT16(sum, s0.lo, factors, 0), s0.hi, factors, 1);
    return DOT16(DOT16(sum, s1.lo, factors, 2), s1.hi, factors, 3);
}
static inline vp vp_add(vp sum, v16 high, v16 low, vb s0, vb s1) {
    return (vp){dot_of_sixteen(sum.high, s0, s1, high), dot_of_sixteen(sum.low, s0, s1, low)};
}
static inline vi vp_total(vp x, vp y) {
    const int64x2_t x_of = (int64x2_t)vaddq_s32(vshlq_n_s32(x.high, 6), x.low);
    const int64x2_t y_of = (int64x2_t)vaddq_s32(vshlq_n_s32(y.high, 6), y.low);
    return (vi){(int32x4_t)vzip1q_s64(x_of, y_of), (int32x4_t)vzip2q_s64(x_of, y_of)};
}

/* The low bytes of 16 lanes. */
static inline int8x16_t bytes_of(vi a, vi b) {
    const int16x8_t first = vuzp1q_s16((int16x8_t)a.lo, (int16x8_t)a.hi);
    const int16x8_t last = vuzp1q_s16((int16x8_t)b.lo, (int16x8_t)b.hi);
    return vuzp1q_s8((int8x16_t)first, (int8x16_t)last);
}
static inline void vi_store_sixes(uint8_t *high, uint8_t *low, const vi a[4]) {
    for (int i = 0; i < 4; i += 2) {
        const int8x16_t six = vdupq_n_s8(63);
        vst1q_s8((int8_t *)high + 8 * i, bytes_of(vi_shr(a[i], 6), vi_shr(a[i + 1], 6)));
        vst1q_s8((int8_t *)low + 8 * i, vandq_s8(bytes_of(a[i], a[i + 1]), six));
    }
}

static inline vb vb_load_tokens(const uint8_t *p, size_t stride) {
    (void)stride;
    return vb_load(p);
}
static inline void vb_load_units(vb pair[2], const uint8_t *p, size_t stride, int n) {
    const vb first = vb_load(p), second = vb_load(n > 1 ? p + 32 : p);
    (void)stride;
    pair[0].lo = (int32x4_t)vzip1q_s16((int16x8_t)first.lo, (int16x8_t)second.lo);
    pair[0].hi = (int32x4_t)vzip2q_s16((int16x8_t)first.lo, (int16x8_t)second.lo);
    pair[1].lo = (int32x4_t)vzip1q_s16((int16x8_t)first.hi, (int16x8_t)second.hi);
    pair[1].hi = (int32x4_t)vzip2q_s16((int16x8_t)first.hi, (int16x8_t)second.hi);
}
static inline void vf_store_units(float *p, const vf a[2]) {
    vf_store(p, a[0]);
    vf_store(p + 8, a[1]);
}
static inline void vi_store_units(int8_t *p, const vi a[4], int bits) {
    static const uint8_t fours[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
    static const uint8_t eights[16] = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};
    const int8x16_t first = bytes_of(a[0], a[1]), last = bytes_of(a[2], a[3]);
    if (bits == 1) {
        vst1q_s16((int16_t *)(void *)p, vzip1q_s16((int16x8_t)first, (int16x8_t)last));
        vst1q_s16((int16_t *)(void *)(p + 16), vzip2q_s16((int16x8_t)first, (int16x8_t)last));
    } else {
        const uint8x16_t order = vld1q_u8(bits == 4 ? fours : eights);
        vst1q_s8(p, vqtbl1q_s8(first, order));
        vst1q_s8(p + 16, vqtbl1q_s8(last, order));
    }
}

/* ---- words of the weight kernels ---------------------------------------------------------- */

#define PANEL_VECTORS 1 /* of rows that share a load of activations */
#define TILE_TOKENS 4   /* that share a load of codes: sixteen sums, of two parts and two halves */

#define prefetch_line(p) __builtin_prefetch(p)

#define vi_byte(a, n) /* signed byte n of each lane; n: a constant */                              \
    ((vi){vshrq_n_s32(vi_shl(a, 24 - 8 * (n)).lo, 24), vshrq_n_s32(vi_shl(a, 24 - 8 * (n)).hi, 24)})

static inline vb vb_sub8(vb a, vb b) {
    return (vb){(int32x4_t)((int8x16_t)a.lo - (int8x16_t)b.lo),
                (int32x4_t)((int8x16_t)a.hi - (int8x16_t)b.hi)};
}

/* The high half of each lane of `first`, and above it the low half of `then`. */
static inline vi vi_join16(vi first, vi then) {
    const vi low = vi_shr(first, 16);
    return (vi){vsliq_n_s32(low.lo, then.lo, 16), vsliq_n_s32(low.hi, then.hi, 16)};
}

/* Rows at p, p + stride, ..., one to a lane: 4 bytes of each to a vector, `bytes` of each in all, a
 * multiple of 16. */
static inline void load_four_rows(int32x4_t words[4], const uint8_t *p, size_t stride) {
    const int32x4_t r0 = (int32x4_t)vld1q_u8(p), r1 = (int32x4_t)vld1q_u8(p + stride);
    const int32x4_t r2 = (int32x4_t)vld1q_u8(p + 2 * stride);
    const int32x4_t r3 = (int32x4_t)vld1q_u8(p + 3 * stride);
    const int64x2_t even01 = (int64x2_t)vtrn1q_s32(r0, r1), odd01 = (int64x2_t)vtrn2q_s32(r0, r1);
    const int64x2_t even23 = (int64x2_t)vtrn1q_s32(r2, r3), odd23 = (int64x2_t)vtrn2q_s32(r2, r3);
    words[0] = (int32x4_t)vzip1q_s64(even01, even23);
    words[1] = (int32x4_t)vzip1q_s64(odd01, odd23);
    words[2] = (int32x4_t)vzip2q_s64(even01, even23);
    words[3] = (int32x4_t)vzip2q_s64(odd01, odd23);
}
static inline void vi_load_words(vi *words, const uint8_t *p, size_t stride, size_t bytes) {
    const uint8_t *const end = p + bytes;
    for (; p < end; p += 16, words += 4) {
        int32x4_t lo[4], hi[4];
        load_four_rows(lo, p, stride);
        load_four_rows(hi, p + 4 * stride, stride);
        for (int i = 0; i < 4; i++) words[i] = (vi){lo[i], hi[i]};
    }
}

/* Byte j of a lane of sixteens[i] is 16 where bit 4 i + j of that lane of `bits` is set, else 0. */
static inline int32x4_t spread_nibble(int32x4_t bits, int i) {
    const int byte = i / 2;
    const uint8x16_t first = (uint8x16_t)(uint32x4_t){0, 0x04040404, 0x08080808, 0x0c0c0c0c};
    const uint8x16_t all = vqtbl1q_u8((uint8x16_t)bits, vaddq_u8(first, vdupq_n_u8((uint8_t)byte)));
    const uint32x4_t which = vdupq_n_u32(i % 2 ? 0x80402010u : 0x08040201u);
    return (int32x4_t)vandq_u8(vtstq_u8(all, (uint8x16_t)which), vdupq_n_u8(16));
}
static inline void vb_spread_bits(vb sixteens[8], vi bits) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        sixteens[i] = (vb){spread_nibble(bits.lo, i), spread_nibble(bits.hi, i)};
    }
}

/* vq: sums of codes, signed bytes, times activations of 15 bits: four products to a lane. The
 * activations come in two parts, 128 * high + low (vf_quantize32). */
typedef struct vq {
    vi high, low;
} vq;
static inline vq vq_zero(void) { return (vq){vi_zero(), vi_zero()}; }
static inline vq vq_add(vq sum, vb codes, const int16_t *q) { /* q: of four columns */
    const v8 parts = v8_load(q);
    sum.high.lo = DOT8(sum.high.lo, codes.lo, parts, 0);
    sum.high.hi = DOT8(sum.high.hi, codes.hi, parts, 0);
    sum.low.lo = DOT8(sum.low.lo, codes.lo, parts, 1);
    sum.low.hi = DOT8(sum.low.hi, codes.hi, parts, 1);
    /* now: gcc would put it off until a sum is used, but load all that it needs at once */
    __asm__("" : "+w"(sum.high.lo), "+w"(sum.high.hi), "+w"(sum.low.lo), "+w"(sum.low.hi));
    return sum;
}
static inline vi vq_total(vq sum) { return vi_add(vi_shl(sum.high, 7), sum.low); }

/* The largest magnitude of n numbers, n % 32 = 0; NaN if one of them is: magnitudes order as their
 * bits do. */
static inline float vf_abs_max(const float *p, int n) {
    uint32x4_t top = vdupq_n_u32(0);
    for (int i = 0; i < n; i += 4) {
        top = vmaxq_u32(top, (uint32x4_t)vabsq_f32(vld1q_f32(p + i)));
    }
    return vgetq_lane_f32((float32x4_t)vdupq_n_u32(vmaxvq_u32(top)), 0);
}
/* q[32]: as many numbers times `factor`, rounded to nearest even, in -16383..16383. Each four take
 * eight bytes: first what remains of each over 128, rounded down, then the remainders, 0 to 127.
 * Returns the sum of q. */
static inline float vf_quantize32(int16_t *q, const float *p, float factor) {
    vi sum = vi_zero();
    for (int i = 0; i < 32; i += 8) {
        const vi rounded = vi_from_vf(vf_mul(vf_load(p + i), vf_set(factor)));
        const int16x8_t eight = vqmovn_high_s32(vqmovn_s32(rounded.lo), rounded.hi);
        const int32x2_t high = (int32x2_t)vshrn_n_s16(eight, 7);
        const int32x2_t low = (int32x2_t)vmovn_s16(vandq_s16(eight, vdupq_n_s16(127)));
        vst1_s32((int32_t *)(void *)(q + i), vzip1_s32(high, low));
        vst1_s32((int32_t *)(void *)(q + i + 4), vzip2_s32(high, low));
        sum = vi_add(sum, rounded);
    }
    return (float)vaddvq_s32(vaddq_s32(sum.lo, sum.hi));
}

/* ---- words of peak_kernels.inl ------------------------------------------------------------ */

static inline vi vi_peak8(vi sum, vb u, vb s) {
    return (vi){vdotq_s32(sum.lo, (int8x16_t)u.lo, (int8x16_t)s.lo),
                vdotq_s32(sum.hi, (int8x16_t)u.hi, (int8x16_t)s.hi)};
}
/* Sixteen codes times activations in two parts, as in the weight kernels. */
static inline vi vi_peak16(vi sum, vi codes, vi parts) {
    return (vi){vdotq_s32(sum.lo, (int8x16_t)codes.lo, (int8x16_t)parts.lo),
                vdotq_s32(sum.hi, (int8x16_t)codes.lo, (int8x16_t)parts.hi)};
}
#define opaque(a)                                                                                  \
    __asm__("" : "+w"((a).lo), "+w"((a).hi)) /* makes the compiler take it for changed */

#endif
