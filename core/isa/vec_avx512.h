/* vec_avx512.h: the vector words that the kernel texts (*_kernels.inl) are written in, for AVX-512
 * (F, BW, DQ, VL) with VNNI.
 *
 * The words mean what they mean in vec_avx2.h. vf: 16 f32. vi: 16 i32. vb: 64 bytes. Included by
 * isa_avx512.c after it has switched its target on.
 */
#ifndef KVQ_VEC_AVX512_H
#define KVQ_VEC_AVX512_H

#include <immintrin.h>

#define VF_LANES 16 /* f32 in a vector */
#define VF_REGISTERS 32
#define VS_LANES (2 * VF_LANES)

typedef __m512 vf;
typedef __m512i vi;
typedef __m512i vb;

static inline vf vf_zero(void) { return _mm512_setzero_ps(); }
static inline vf vf_set(float x) { return _mm512_set1_ps(x); }
static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); } /* a * b + c */
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_neg_abs(vf a) { return _mm512_or_ps(a, vf_set(-0.0f)); }
static inline vf vf_where_negative(vf x, vf yes, vf no) { /* by the sign bit of x */
    return _mm512_mask_mov_ps(no, _mm512_movepi32_mask(_mm512_castps_si512(x)), yes);
}
static inline vf vf_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline vf vf_load_bf16(const void *p) {
    const __m256i halves = _mm256_loadu_si256((const __m256i *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
static inline vf vf_from_vi(vi a) { return _mm512_cvtepi32_ps(a); }
static inline vf vf_from_f16_low(vi a) { /* the f16 in the low half of each lane */
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a));
}
static inline float vf_first(vf a) { return _mm512_cvtss_f32(a); } /* lane 0 */
static inline float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }

/* x - floor(x), and y * 2^floor(x) with gradual underflow; as in vec_avx2.h */
static inline vf vf_fraction(vf x) {
    return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
static inline vf vf_times_exp2_floor(vf y, vf x) { return _mm512_scalef_ps(y, x); }

static inline vi vi_zero(void) { return _mm512_setzero_si512(); }
static inline vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
static inline vi vi_set_lanes(const void *p) { /* 4 bytes, repeated in all lanes */
    int32_t x;
    memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
}
static inline vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
#define vi_shr(a, n) _mm512_srli_epi32(a, n) /* n: a constant; zeros come in */
#define vi_byte(a, n)                        /* signed byte n of each lane; n: a constant */       \
    _mm512_srai_epi32(_mm512_slli_epi32(a, 24 - 8 * (n)), 24)

static inline vb vb_set(int x) { return _mm512_set1_epi8((char)x); }
static inline vb vb_and(vb a, vb b) { return _mm512_and_si512(a, b); }
#define vb_shr(a, n, mask) /* per byte, if mask clears the rest */                                 \
    _mm512_and_si512(_mm512_srli_epi16(a, n), mask)
#define vb_shl(a, n, mask) _mm512_and_si512(_mm512_slli_epi16(a, n), mask)

/* ---- words of the weight kernels --------------------------------------------------------- */

#define PANEL_VECTORS 2 /* of rows that share a load of activations */
#define TILE_TOKENS 8   /* that share a load of codes: sixteen sums */

#define prefetch_line(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)

/* Two i16 to a lane. */
static inline vi vi_set16(int16_t x) { return _mm512_set1_epi16(x); }
static inline vi vi_sub16(vi a, vi b) { return _mm512_sub_epi16(a, b); }
static inline vi vi_mul16(vi a, vi b) { return _mm512_mullo_epi16(a, b); }
static inline vi vi_dot16(vi sum, vi a, vi b) {
    sum = _mm512_dpwssd_epi32(sum, a, b);
    __asm__("" : "+v"(sum)); /* else gcc copies it */
    return sum;
}
#define vi_shr16(a, n) _mm512_srli_epi16(a, n)
static inline vi vi_low16(vi a) { /* the low one, twice */
    return _mm512_or_si512(_mm512_slli_epi32(a, 16), _mm512_and_si512(a, vi_set(0xffff)));
}
/* The low or high byte of each, widened. */
static inline vi vi_low_bytes(vb a) { return _mm512_and_si512(a, vi_set16(255)); }
static inline vi vi_high_bytes(vb a) { return _mm512_srli_epi16(a, 8); }
static inline vi vi_low_signed_bytes(vb a) { return _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8); }
static inline vi vi_high_signed_bytes(vb a) { return _mm512_srai_epi16(a, 8); }

/* The high half of each lane of `first`, and above it the low half of `then`. */
static inline vi vi_join16(vi first, vi then) {
    return _mm512_rol_epi32(_mm512_mask_blend_epi16(0x55555555u, first, then), 16);
}

/* Rows at p, p + stride, ..., one to a lane: 4 bytes of each to a vector, `bytes` of each in all, a
 * multiple of 16. 64 at a time are a square of 16 x 16; fewer are put together from parts. */
static inline void vi_load_square(vi words[16], const uint8_t *p, size_t stride) {
    __m512i pairs[16], fours[16];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* in each quarter of 16 bytes: a word of four rows */
        const uint8_t *const row = p + (size_t)i * 4 * stride;
        __m512i r0 = _mm512_loadu_si512(row), r1 = _mm512_loadu_si512(row + stride);
        __m512i r2 = _mm512_loadu_si512(row + 2 * stride);
        __m512i r3 = _mm512_loadu_si512(row + 3 * stride);
        /* once: gcc would make each an operand of two instructions, and most cross a cache line */
        __asm__("" : "+v"(r0), "+v"(r1), "+v"(r2), "+v"(r3));
        const __m512i low01 = _mm512_unpacklo_epi32(r0, r1), high01 = _mm512_unpackhi_epi32(r0, r1);
        const __m512i low23 = _mm512_unpacklo_epi32(r2, r3), high23 = _mm512_unpackhi_epi32(r2, r3);
        fours[i * 4] = _mm512_unpacklo_epi64(low01, low23);
        fours[i * 4 + 1] = _mm512_unpackhi_epi64(low01, low23);
        fours[i * 4 + 2] = _mm512_unpacklo_epi64(high01, high23);
        fours[i * 4 + 3] = _mm512_unpackhi_epi64(high01, high23);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) { /* words j, 4 + j, 8 + j, 12 + j: quarters of four vectors */
        pairs[0] = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x44);
        pairs[1] = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xee);
        pairs[2] = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x44);
        pairs[3] = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xee);
        words[j] = _mm512_shuffle_i32x4(pairs[0], pairs[2], 0x88);
        words[4 + j] = _mm512_shuffle_i32x4(pairs[0], pairs[2], 0xdd);
        words[8 + j] = _mm512_shuffle_i32x4(pairs[1], pairs[3], 0x88);
        words[12 + j] = _mm512_shuffle_i32x4(pairs[1], pairs[3], 0xdd);
    }
}
static inline __m512i vi_load_quarters(const uint8_t *p, size_t apart) {
    __m512i rows = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
    rows = _mm512_inserti32x4(rows, _mm_loadu_si128((const __m128i *)(p + apart)), 1);
    rows = _mm512_inserti32x4(rows, _mm_loadu_si128((const __m128i *)(p + 2 * apart)), 2);
    return _mm512_inserti32x4(rows, _mm_loadu_si128((const __m128i *)(p + 3 * apart)), 3);
}
static inline void vi_load_words(vi *words, const uint8_t *p, size_t stride, size_t bytes) {
    const uint8_t *const squares = p + bytes / 64 * 64, *const end = p + bytes;
    for (; p < squares; p += 64, words += 16) vi_load_square(words, p, stride);
    for (; p < end; p += 16, words += 4) {
        const __m512i r0 = vi_load_quarters(p, 4 * stride);
        const __m512i r1 = vi_load_quarters(p + stride, 4 * stride);
        const __m512i r2 = vi_load_quarters(p + 2 * stride, 4 * stride);
        const __m512i r3 = vi_load_quarters(p + 3 * stride, 4 * stride);
        const __m512i low01 = _mm512_unpacklo_epi32(r0, r1), high01 = _mm512_unpackhi_epi32(r0, r1);
        const __m512i low23 = _mm512_unpacklo_epi32(r2, r3), high23 = _mm512_unpackhi_epi32(r2, r3);
        words[0] = _mm512_unpacklo_epi64(low01, low23);
        words[1] = _mm512_unpackhi_epi64(low01, low23);
        words[2] = _mm512_unpacklo_epi64(high01, high23);
        words[3] = _mm512_unpackhi_epi64(high01, high23);
    }
}

/* Byte j of a lane of sixteens[i] is 16 where bit 4 i + j of that lane of `bits` is set, else 0. */
static inline void vb_spread_bits(vb sixteens[8], vi bits) {
    const __m128i first_bytes = _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c);
    const __m512i byte0 = _mm512_broadcast_i32x4(first_bytes);
    const __m512i high_bits = vi_set((int)0x80402010u), sixteen = vb_set(16);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* byte i of a lane in all its bytes, one bit kept in each */
        const __m512i byte_i = _mm512_add_epi8(byte0, vb_set(i));
        const __m512i high = _mm512_shuffle_epi8(bits, byte_i), low = _mm512_slli_epi16(high, 4);
        sixteens[2 * i] = _mm512_min_epu8(_mm512_and_si512(low, high_bits), sixteen);
        sixteens[2 * i + 1] = _mm512_min_epu8(_mm512_and_si512(high, high_bits), sixteen);
    }
}

/* The largest magnitude of n numbers, n % 32 = 0; NaN if one of them is: magnitudes order as their
 * bits do. */
static inline float vf_abs_max(const float *p, int n) {
    const __m512i magnitude = vi_set(0x7fffffff);
    __m512i top = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 16) {
        top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_loadu_si512(p + i), magnitude));
    }
    const int bits = _mm512_reduce_max_epi32(top);
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
}
/* q[32]: as many numbers times `factor`, rounded to nearest even, saturated to i16, each four in
 * the order 0, 2, 1, 3. Returns the sum of q, exact below 2^24. */
static inline float vf_quantize32(int16_t *q, const float *p, float factor) {
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < 32; i += 16) {
        const __m512i rounded = _mm512_cvtps_epi32(vf_mul(vf_load(p + i), vf_set(factor)));
        const __m512i ordered = _mm512_shuffle_epi32(rounded, 0xd8);
        _mm256_storeu_si256((__m256i *)(q + i), _mm512_cvtsepi32_epi16(ordered));
        sum = _mm512_add_epi32(sum, rounded);
    }
    return (float)_mm512_reduce_add_epi32(sum);
}

/* ---- words of the KV kernels ------------------------------------------------------------- */

static inline vf vf_load_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline vi vi_load_u8(const uint8_t *p) { /* 16 bytes, one to a lane */
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
static inline vf vf_load_u8(const uint8_t *p) { return _mm512_cvtepi32_ps(vi_load_u8(p)); }
static inline vf vf_load_first(const float *p, int n) { /* the first n, zeros in the other lanes */
    const __mmask16 mask = n >= 16 ? 0xffff : n > 0 ? (__mmask16)((1 << n) - 1) : 0;
    return _mm512_maskz_loadu_ps(mask, p);
}
static inline vi vi_from_vf(vf a) { return _mm512_cvtps_epi32(a); } /* to nearest even */
static inline vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
#define vi_shl(a, n) _mm512_slli_epi32(a, n)
static inline vb vb_load(const void *p) { return _mm512_loadu_si512(p); }

static inline float load_half(const void *p) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(kvq_load_u16(p))));
}
static inline vf vf_set_half(const void *p) {
    return _mm512_cvtph_ps(_mm256_set1_epi16((int16_t)kvq_load_u16(p)));
}
/* 11: the larger magnitude, without its sign. */
static inline vf vf_max_abs(vf a, vf b) { return _mm512_range_ps(a, b, 11); }
#define VF_OF_EACH(NAME, OP)                                                                       \
    static inline vf NAME(const vf a[4]) {                                                         \
        const __m512 ab =                                                                          \
            _mm512_##OP(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));           \
        const __m512 cd =                                                                          \
            _mm512_##OP(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));           \
        const __m512 q =                                                                           \
            _mm512_##OP(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));         \
        const __m256 h = _mm256_##OP(_mm512_castps512_ps256(q), _mm512_extractf32x8_ps(q, 1));     \
        return _mm512_zextps128_ps512(                                                             \
            _mm_##OP(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));                     \
    }
VF_OF_EACH(vf_sums, add_ps)
VF_OF_EACH(vf_largests, max_ps)
static inline void vf_store_four(float *p, vf a) { _mm_storeu_ps(p, _mm512_castps512_ps128(a)); }
static inline unsigned vf_negative(vf a) { /* a bit for each lane */
    return _mm512_movepi32_mask(_mm512_castps_si512(a));
}

/* 32 i16, as in vec_avx2.h. */
static inline void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
static inline vi vs_load(const int16_t *p) { return _mm512_loadu_si512(p); }
static inline vi vs_load_i8(const int8_t *p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
}
static inline vi vs_load_u8_times_128(const uint8_t *p) {
    return _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p)), 7);
}
static inline vi vs_mul(vi a, vi b) { return _mm512_mulhrs_epi16(a, b); }
static inline vi vs_max_abs(vi top, vi a) { return _mm512_max_epi16(top, _mm512_abs_epi16(a)); }
static inline vf vs_top(vi top) {
    const __m512i larger = _mm512_max_epi16(top, _mm512_srli_epi32(top, 16));
    return vf_from_vi(_mm512_and_si512(larger, vi_set(0xffff)));
}
static inline void vs_store_i8(int8_t *p, vi a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi16_epi8(a));
}

#define vf_butterfly(a, half) /* as in vec_avx2.h */                                               \
    ((half) == 1   ? vf_add_or_sub(_mm512_permute_ps(a, 0xb1), a, 0xaaaa)                          \
     : (half) == 2 ? vf_add_or_sub(_mm512_permute_ps(a, 0x4e), a, 0xcccc)                          \
     : (half) == 4 ? vf_add_or_sub(_mm512_shuffle_f32x4(a, a, 0xb1), a, 0xf0f0)                    \
                   : vf_add_or_sub(_mm512_shuffle_f32x4(a, a, 0x4e), a, 0xff00))
#define vf_add_or_sub(a, b, subtracted) _mm512_mask_sub_ps(_mm512_add_ps(a, b), subtracted, a, b)

/* ---- words of integer products, as in vec_avx2.h ------------------------------------------ */

static inline vb vb_set8(const void *p) {
    int64_t x;
    memcpy(&x, p, 8);
    return _mm512_set1_epi64(x);
}
static inline vb vb_set16(const void *p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p));
}
static inline vb vb_lookup16(vb table, vb index) {
    return _mm512_shuffle_epi8(table, vb_and(index, vb_set(15)));
}
static inline vb vb_select(vb mask, vb a, vb b) {
    return _mm512_ternarylogic_epi32(mask, a, b, 0xca);
}
static inline vi vi_add_pairs(vi a, vi b) {
    const __m512 fa = _mm512_castsi512_ps(a), fb = _mm512_castsi512_ps(b);
    const __m512 even = _mm512_shuffle_ps(fa, fb, 0x88), odd = _mm512_shuffle_ps(fa, fb, 0xdd);
    return vi_add(_mm512_castps_si512(even), _mm512_castps_si512(odd));
}

typedef struct v8 {
    vb first, last;
} v8;
typedef v8 v16;
static inline v8 v8_load(const void *p) {
    const uint8_t *const bytes = p;
    return (v8){vi_set_lanes(bytes), vi_set_lanes(bytes + 4)};
}
static inline v16 v16_load(const void *p) {
    const uint8_t *const bytes = p;
    return (v16){vb_set8(bytes), vb_set8(bytes + 8)};
}

/* Every other field stays where it is, `bits` higher, and has a sum of its own: fewer shifts, and
 * chains of sums enough to hide the latency of products. */
#define VD_TOKENS 2
typedef struct vd {
    vi here, higher;
} vd;
static inline int vd_most(int m) { return INT32_MAX / 32 / m; }
static inline vd vd_zero(void) { return (vd){vi_zero(), vi_zero()}; }
#define vd_fields(u, packed, j, bits, low, next)                                                   \
    do {                                                                                           \
        const vb shifted = _mm512_srli_epi16(packed, (bits) * (j));                                \
        (u)[0] = vb_and(shifted, low);                                                             \
        (u)[1] = vb_and(shifted, next);                                                            \
    } while (0)
static inline vd vd_add(vd sum, vb u0, vb u1, v8 s) {
    sum.here = _mm512_dpbusd_epi32(sum.here, u0, s.first);
    sum.higher = _mm512_dpbusd_epi32(sum.higher, u1, s.last);
    __asm__("" : "+v"(sum.here), "+v"(sum.higher)); /* else gcc copies them */
    return sum;
}
#define vd_total(sum, bits) vi_add((sum).here, _mm512_srai_epi32((sum).higher, bits))

typedef struct vw {
    vi high, low;
} vw;
static inline vw vw_zero(void) { return (vw){vi_zero(), vi_zero()}; }
static inline vw vw_add(vw sum, v8 high, v8 low, vb s0, vb s1) {
    const vi of_high = _mm512_dpbusd_epi32(sum.high, high.first, s0);
    const vi of_low = _mm512_dpbusd_epi32(sum.low, low.first, s0);
    return (vw){_mm512_dpbusd_epi32(of_high, high.last, s1),
                _mm512_dpbusd_epi32(of_low, low.last, s1)};
}
static inline vi vw_total(vw sum) { return vi_add(vi_shl(sum.high, 6), sum.low); }

/* The low plane alone takes whole bytes. It may have two sums then, for the first four weights and
 * the last: products of few queries would wait for each other. */
#define VW_LOW_MOST 255
static inline vw vw_add_low(const bool two_sums, vw sum, v8 low, vb s0, vb s1) {
    if (two_sums) {
        sum.high = _mm512_dpbusd_epi32(sum.high, low.first, s0);
        sum.low = _mm512_dpbusd_epi32(sum.low, low.last, s1);
        __asm__("" : "+v"(sum.high), "+v"(sum.low)); /* else gcc copies them */
    } else {
        sum.low = _mm512_dpbusd_epi32(sum.low, low.first, s0);
        sum.low = _mm512_dpbusd_epi32(sum.low, low.last, s1);
    }
    return sum;
}
static inline vi vw_total_low(vw sum) { return vi_add(sum.high, sum.low); }

typedef vw vp;
static inline vp vp_zero(void) { return vw_zero(); }
static inline vb vb_load_pairs(const uint8_t *p) { return vb_load(p); }
static inline vp vp_add(vp sum, v16 high, v16 low, vb s0, vb s1) {
    return vw_add(sum, high, low, s0, s1);
}
static inline vp vp_add_low(const bool two_sums, vp sum, v16 low, vb s0, vb s1) {
    return vw_add_low(two_sums, sum, low, s0, s1);
}
static inline vi vp_total(vp x, vp y) { return vi_add_pairs(vw_total(x), vw_total(y)); }
static inline vi vp_total_low(vp x, vp y) { return vi_add_pairs(vw_total_low(x), vw_total_low(y)); }

/* What packs, which work in quarters of a vector, leave in the order of the quarters. */
static inline __m512i in_order(__m512i packed) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, packed);
}
static inline void vi_store_bytes(uint8_t *p, const vi a[4]) {
    const __m512i first = _mm512_packs_epi32(a[0], a[1]), last = _mm512_packs_epi32(a[2], a[3]);
    _mm512_storeu_si512(p, in_order(_mm512_packus_epi16(first, last)));
}
static inline void vi_store_sixes(uint8_t *high, uint8_t *low, const vi a[4]) {
    const __m512i first = _mm512_packs_epi32(a[0], a[1]), last = _mm512_packs_epi32(a[2], a[3]);
    const __m512i h = _mm512_packus_epi16(_mm512_srli_epi16(first, 6), _mm512_srli_epi16(last, 6));
    const __m512i l = _mm512_packus_epi16(_mm512_and_si512(first, _mm512_set1_epi16(63)),
                                          _mm512_and_si512(last, _mm512_set1_epi16(63)));
    _mm512_storeu_si512(high, in_order(h));
    _mm512_storeu_si512(low, in_order(l));
}

static inline vb vb_load_tokens(const uint8_t *p, size_t stride) {
    const __m256i first = _mm256_loadu_si256((const __m256i *)p);
    const __m256i next = _mm256_loadu_si256((const __m256i *)(p + stride));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), next, 1);
}
static inline void vb_load_units(vb pair[2], const uint8_t *p, size_t stride, int n) {
    const __m512i order = _mm512_set_epi32(
        0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007,
        0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
    const __mmask8 there = n > 1 ? 0xff : 0x0f;
    pair[0] = _mm512_permutexvar_epi16(order, _mm512_maskz_loadu_epi64(there, p));
    pair[1] = _mm512_permutexvar_epi16(order, _mm512_maskz_loadu_epi64(there, p + stride));
}
static inline void vf_store_units(float *p, const vf a[2]) {
    vf_store(p, a[0]);
    vf_store(p + 16, a[1]);
}
static inline void vi_store_units(int8_t *p, const vi a[2], int bits) {
    const __m128i fours = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    const __m128i eights = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    __m256i bytes = _mm256_setr_m128i(_mm512_cvtepi32_epi8(a[0]), _mm512_cvtepi32_epi8(a[1]));
    if (bits == 1) bytes = _mm256_permute4x64_epi64(bytes, 0xd8);
    const __m256i order = _mm256_broadcastsi128_si256(bits == 4 ? fours : eights);
    _mm256_storeu_si256((__m256i *)p, _mm256_shuffle_epi8(bytes, order));
}

/* ---- words of peak_kernels.inl ----------------------------------------------------------- */

/* Adds products of bytes, u in 0..255 and s in -127..127, as many as one instruction can, to sums
 * of whatever width it has. */
static inline vi vi_peak8(vi sum, vb u, vb s) { return _mm512_dpbusd_epi32(sum, u, s); }
static inline vi vi_peak16(vi sum, vi a, vi b) { return vi_dot16(sum, a, b); }
#define opaque(a) __asm__("" : "+v"(a)) /* makes the compiler take a vector for changed */

#endif
