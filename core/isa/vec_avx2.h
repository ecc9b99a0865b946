/* vec_avx2.h: the vector words that the kernel texts (*_kernels.inl) are written in, for AVX2 + FMA
 * + F16C.
 *
 * A word is one idea, not one instruction. vf: 8 f32. vi: 8 i32. vb: 32 bytes. Included by
 * isa_avx2.c after it has switched its target on; another instruction set defines the same words.
 */
#ifndef KVQ_VEC_AVX2_H
#define KVQ_VEC_AVX2_H

#include <immintrin.h>

#define VF_LANES 8 /* f32 in a vector */
#define VF_REGISTERS 16
#define VS_LANES (2 * VF_LANES) /* i16 in a vector */

typedef __m256 vf;
typedef __m256i vi;
typedef __m256i vb;

static inline vf vf_zero(void) { return _mm256_setzero_ps(); }
static inline vf vf_set(float x) { return _mm256_set1_ps(x); }
static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); } /* a * b + c */
static inline vf vf_load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
static inline vf vf_load_i8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline vf vf_load_u8(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline vf vf_from_vi(vi a) { return _mm256_cvtepi32_ps(a); }
static inline float vf_sum(vf a) { /* of all lanes */
    const __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 q = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }

static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vf_neg_abs(vf a) { return _mm256_or_ps(a, vf_set(-0.0f)); }
static inline vf vf_where_negative(vf x, vf yes, vf no) { /* by the sign bit of x */
    return _mm256_blendv_ps(no, yes, x);
}
static inline unsigned vf_negative(vf a) { /* a bit for each lane */
    return (unsigned)_mm256_movemask_ps(a);
}

/* x - floor(x), of which anything for -inf, and y * 2^floor(x) for x <= 0 and y in 1..2: exactly 0
 * for x = -inf and, unless there is gradual underflow, for x < -126. */
static inline vf vf_fraction(vf x) { return _mm256_sub_ps(x, _mm256_floor_ps(x)); }
static inline vf vf_times_exp2_floor(vf y, vf x) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(x)), 23);
    const __m256i product = _mm256_add_epi32(_mm256_castps_si256(y), exponent);
    const __m256 too_small = _mm256_cmp_ps(x, vf_set(-126.0f), _CMP_LT_OQ); /* no NaN is */
    return _mm256_andnot_ps(too_small, _mm256_castsi256_ps(product));
}

/* table[index & 7] in each lane: a codebook of 8 entries */
static inline vf vf_lookup8(vf table, vi index) { return _mm256_permutevar8x32_ps(table, index); }

/* table[index & 15] in each lane, the table as its two halves */
static inline vf vf_lookup16(vf low, vf high, vi index) {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)); /* bit 3 as the sign */
    return _mm256_blendv_ps(vf_lookup8(low, index), vf_lookup8(high, index), upper);
}

static inline vi vi_from_vf(vf a) { return _mm256_cvtps_epi32(a); } /* to nearest even */
static inline vi vi_zero(void) { return _mm256_setzero_si256(); }
static inline vi vi_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline vi vi_set(int32_t x) { return _mm256_set1_epi32(x); }
static inline vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
static inline vi vi_load_u8(const uint8_t *p) { /* 8 bytes, one to a lane */
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
static inline vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
static inline vi vi_set_lanes(const void *p) { /* 4 bytes, repeated in all lanes */
    int32_t x;
    memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
}
#define vi_shr(a, n) _mm256_srli_epi32(a, n) /* n: a constant; zeros come in */
#define vi_shl(a, n) _mm256_slli_epi32(a, n)
static inline vi vi_shr_lanes(vi a, vi n) { return _mm256_srlv_epi32(a, n); } /* n: by lane */

static inline vb vb_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline vb vb_set(int x) { return _mm256_set1_epi8((char)x); }
static inline vb vb_and(vb a, vb b) { return _mm256_and_si256(a, b); }
#define vb_shr(a, n, mask)                                                                         \
    _mm256_and_si256(_mm256_srli_epi16(a, n), mask) /* per byte, if mask clears the rest */

/* Adjacent products u * s summed in pairs into i16: u in 0..255, s in -127..127; the caller keeps
 * every pair sum and the running sums inside i16. */
static inline vi vi_madd_u8s8(vb u, vb s) { return _mm256_maddubs_epi16(u, s); }
static inline vi vi_add16(vi a, vi b) { return _mm256_add_epi16(a, b); }
static inline vi vi_widen16(vi a) { /* adjacent i16 summed into i32 */
    return _mm256_madd_epi16(a, _mm256_set1_epi16(1));
}
static inline vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }

/* ---- words of the weight kernels --------------------------------------------------------- */

#define PANEL_VECTORS 2 /* of rows that share a load of activations */
#define TILE_TOKENS 4   /* that share a load of codes: eight sums */

/* Asks for the cache line at p, which may be any address, to come into L2: what is used next and
 * what is fetched for later are more than an L1 of 32 KB holds, and lines that drive each other out
 * of it cost more than those that are loaded from L2. A macro, because gcc deems a function that
 * only prefetches pure and drops the calls. */
#define prefetch_line(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)

static inline float vf_first(vf a) { return _mm256_cvtss_f32(a); } /* lane 0 */
static inline vf vf_load_bf16(const void *p) {
    const __m128i halves = _mm_loadu_si128((const __m128i *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
static inline vf vf_from_f16_low(vi a) { /* the f16 in the low half of each lane */
    const __m128i low_bytes =
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i low = _mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(low_bytes));
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(low, 0x08)));
}

static inline vi vi_mul(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
#define vi_byte(a, n) /* signed byte n of each lane; n: a constant */                              \
    _mm256_srai_epi32(_mm256_slli_epi32(a, 24 - 8 * (n)), 24)

/* Two i16 to a lane. */
static inline vi vi_set16(int16_t x) { return _mm256_set1_epi16(x); }
static inline vi vi_sub16(vi a, vi b) { return _mm256_sub_epi16(a, b); }
static inline vi vi_mul16(vi a, vi b) { return _mm256_mullo_epi16(a, b); }
/* sum + a0 b0 + a1 b1 in i32, computed now: gcc regroups an unrolled sum of integers into a tree,
 * whose many leaves do not fit the registers. */
static inline vi vi_dot16(vi sum, vi a, vi b) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    __asm__("" : "+x"(sum));
    return sum;
}
#define vi_shr16(a, n) _mm256_srli_epi16(a, n)
static inline vi vi_low16(vi a) { /* the low one, twice */
    return _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(a, 0xa0), 0xa0);
}
/* The low or high byte of each, widened. */
static inline vi vi_low_bytes(vb a) { return _mm256_and_si256(a, _mm256_set1_epi16(255)); }
static inline vi vi_high_bytes(vb a) { return _mm256_srli_epi16(a, 8); }
static inline vi vi_low_signed_bytes(vb a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
static inline vi vi_high_signed_bytes(vb a) { return _mm256_srai_epi16(a, 8); }

/* The high half of each lane of `first`, and above it the low half of `then`. */
static inline vi vi_join16(vi first, vi then) {
    const vi swapped = _mm256_blend_epi16(first, then, 0x55);
    return _mm256_or_si256(_mm256_srli_epi32(swapped, 16), _mm256_slli_epi32(swapped, 16));
}

/* Rows at p, p + stride, ..., one to a lane: 4 bytes of each to a vector, `bytes` of each in all, a
 * multiple of 16. */
static inline __m256i vi_load_halves(const uint8_t *low, const uint8_t *high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                                   _mm_loadu_si128((const __m128i *)high), 1);
}
static inline void vi_load_words(vi *words, const uint8_t *p, size_t stride, size_t bytes) {
    const uint8_t *const end = p + bytes;
    for (; p < end; p += 16, words += 4) {
        const uint8_t *const p4 = p + 4 * stride;
        const __m256i r0 = vi_load_halves(p, p4), r1 = vi_load_halves(p + stride, p4 + stride);
        const __m256i r2 = vi_load_halves(p + 2 * stride, p4 + 2 * stride);
        const __m256i r3 = vi_load_halves(p + 3 * stride, p4 + 3 * stride);
        const __m256i low01 = _mm256_unpacklo_epi32(r0, r1), high01 = _mm256_unpackhi_epi32(r0, r1);
        const __m256i low23 = _mm256_unpacklo_epi32(r2, r3), high23 = _mm256_unpackhi_epi32(r2, r3);
        words[0] = _mm256_unpacklo_epi64(low01, low23);
        words[1] = _mm256_unpackhi_epi64(low01, low23);
        words[2] = _mm256_unpacklo_epi64(high01, high23);
        words[3] = _mm256_unpackhi_epi64(high01, high23);
    }
}

#define vb_shl(a, n, mask) _mm256_and_si256(_mm256_slli_epi16(a, n), mask) /* as vb_shr */

/* Byte j of a lane of sixteens[i] is 16 where bit 4 i + j of that lane of `bits` is set, else 0. */
static inline void vb_spread_bits(vb sixteens[8], vi bits) {
    const __m128i first_bytes = _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c);
    const __m256i byte0 = _mm256_broadcastsi128_si256(first_bytes);
    const __m256i high_bits = _mm256_set1_epi32((int)0x80402010u), sixteen = _mm256_set1_epi8(16);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* byte i of a lane in all its bytes, one bit kept in each */
        const __m256i byte_i = _mm256_add_epi8(byte0, _mm256_set1_epi8((char)i));
        const __m256i high = _mm256_shuffle_epi8(bits, byte_i), low = _mm256_slli_epi16(high, 4);
        sixteens[2 * i] = _mm256_min_epu8(_mm256_and_si256(low, high_bits), sixteen);
        sixteens[2 * i + 1] = _mm256_min_epu8(_mm256_and_si256(high, high_bits), sixteen);
    }
}

/* The largest magnitude of n numbers, n % 32 = 0; NaN if one of them is: magnitudes order as their
 * bits do. */
static inline float vf_abs_max(const float *p, int n) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i top = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 8) {
        top = _mm256_max_epi32(top, _mm256_and_si256(vi_load(p + i), magnitude));
    }
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(m));
}
/* q[32]: as many numbers times `factor`, rounded to nearest even, saturated to i16, each four in
 * the order 0, 2, 1, 3. Returns the sum of q, exact below 2^24. */
static inline float vf_quantize32(int16_t *q, const float *p, float factor) {
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < 32; i += 16) {
        const __m256i low = _mm256_cvtps_epi32(vf_mul(vf_load(p + i), vf_set(factor)));
        const __m256i high = _mm256_cvtps_epi32(vf_mul(vf_load(p + i + 8), vf_set(factor)));
        const __m256i words =
            _mm256_packs_epi32(_mm256_shuffle_epi32(low, 0xd8), _mm256_shuffle_epi32(high, 0xd8));
        /* packs works in halves of a vector */
        _mm256_storeu_si256((__m256i *)(q + i), _mm256_permute4x64_epi64(words, 0xd8));
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
    }
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return (float)_mm_cvtsi128_si32(s);
}

/* ---- words of the KV kernels ------------------------------------------------------------- */

static inline float load_half(const void *p) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(kvq_load_u16(p))));
}
static inline vf vf_set_half(const void *p) {
    return _mm256_cvtph_ps(_mm_set1_epi16((int16_t)kvq_load_u16(p)));
}
static inline vf vf_max_abs(vf a, vf b) { /* the larger of magnitudes, for a >= 0 */
    return _mm256_max_ps(a, _mm256_andnot_ps(vf_set(-0.0f), b));
}

/* The first n of the numbers at p, zeros in the other lanes; n may be any number. */
static inline vf vf_load_first(const float *p, int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(vi_set(n), lane));
}

/* 16 i16: a query in 16 bits. vs_mul: a * b / 2^15, rounded. vs_top: of each two lanes, none of
 * them negative, the larger. vs_store_i8: lanes in -128 .. 127 as bytes. */
static inline void vi_store(void *p, vi a) { _mm256_storeu_si256((__m256i *)p, a); }
static inline vi vs_load(const int16_t *p) { return vi_load(p); }
static inline vi vs_load_i8(const int8_t *p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
}
static inline vi vs_load_u8_times_128(const uint8_t *p) {
    return _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
}
static inline vi vs_mul(vi a, vi b) { return _mm256_mulhrs_epi16(a, b); }
static inline vi vs_max_abs(vi top, vi a) { return _mm256_max_epi16(top, _mm256_abs_epi16(a)); }
static inline vf vs_top(vi top) {
    const __m256i larger = _mm256_max_epi16(top, _mm256_srli_epi32(top, 16));
    return vf_from_vi(_mm256_and_si256(larger, vi_set(0xffff)));
}
static inline void vs_store_i8(int8_t *p, vi a) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, a), 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(bytes));
}

/* Of four vectors, the sum or the largest of all lanes of each, in the first four lanes; zeros in
 * the others. The order of the additions is the same for all. */
#define VF_OF_EACH(NAME, OP)                                                                       \
    static inline vf NAME(const vf a[4]) {                                                         \
        __m128 h[4];                                                                               \
        for (int i = 0; i < 4; i++) {                                                              \
            h[i] = OP(_mm256_castps256_ps128(a[i]), _mm256_extractf128_ps(a[i], 1));               \
        }                                                                                          \
        const __m128 ab = OP(_mm_unpacklo_ps(h[0], h[1]), _mm_unpackhi_ps(h[0], h[1]));            \
        const __m128 cd = OP(_mm_unpacklo_ps(h[2], h[3]), _mm_unpackhi_ps(h[2], h[3]));            \
        return _mm256_zextps128_ps256(OP(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));           \
    }
VF_OF_EACH(vf_sums, _mm_add_ps)
VF_OF_EACH(vf_largests, _mm_max_ps)
static inline void vf_store_four(float *p, vf a) { /* the first four lanes */
    _mm_storeu_ps(p, _mm256_castps256_ps128(a));
}

/* Adds lanes whose numbers differ by `half`, a constant power of two below VF_LANES: the lower one
 * of a pair becomes their sum, the other the lower one minus the other. */
#define vf_butterfly(a, half)                                                                      \
    ((half) == 1   ? vf_add_or_sub(_mm256_permute_ps(a, 0xb1), a, 0xaa)                            \
     : (half) == 2 ? vf_add_or_sub(_mm256_permute_ps(a, 0x4e), a, 0xcc)                            \
                   : vf_add_or_sub(_mm256_permute2f128_ps(a, a, 0x01), a, 0xf0))
#define vf_add_or_sub(a, b, subtracted)                                                            \
    _mm256_blend_ps(_mm256_add_ps(a, b), _mm256_sub_ps(a, b), subtracted)

/* ---- words of integer products ----------------------------------------------------------- */

/* 8 or 16 bytes, repeated. */
static inline vb vb_set8(const void *p) {
    int64_t x;
    memcpy(&x, p, 8);
    return _mm256_set1_epi64x(x);
}
static inline vb vb_set16(const void *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
}

/* table[index & 15] in each byte, the table repeated every 16 bytes */
static inline vb vb_lookup16(vb table, vb index) {
    return _mm256_shuffle_epi8(table, vb_and(index, vb_set(15)));
}
static inline vb vb_select(vb mask, vb a, vb b) { /* bits of a where the mask has them, else of b */
    return vi_or(vb_and(mask, a), _mm256_andnot_si256(mask, b));
}

/* Of each four lanes: a0 + a1, a2 + a3, b0 + b1, b2 + b3. */
static inline vi vi_add_pairs(vi a, vi b) { return _mm256_hadd_epi32(a, b); }

/* Factors that all lanes share. v8: four bytes for the lanes of one vector, four for those of the
 * next. v16: eight bytes for each two lanes, twice. */
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

/* vd: sums of products u * s with s in -127..127, each lane those of its four bytes, in the end
 * (vd_total). Until then a half of a lane takes vd_most(m) products of magnitudes up to m; one
 * vd_add gives it four. u[2] are the fields j and j + 1 of `bits` bits, as vd_fields takes them out
 * of bytes; `low` has the bits of field 0 and `next` those of field 1. */
#define VD_TOKENS 1 /* vectors of tokens that are summed side by side */
typedef vi vd;
#define vd_fields(u, packed, j, bits, low, next)                                                   \
    do {                                                                                           \
        (u)[0] = vb_shr(packed, (bits) * (j), low);                                                \
        (u)[1] = vb_shr(packed, (bits) * (j) + (bits), low);                                       \
        (void)(next);                                                                              \
    } while (0)
static inline int vd_most(int m) { return 32767 / m; }
static inline vd vd_zero(void) { return vi_zero(); }
static inline vd vd_add(vd sum, vb u0, vb u1, v8 s) {
    return vi_add16(sum, vi_add16(vi_madd_u8s8(u0, s.first), vi_madd_u8s8(u1, s.last)));
}
static inline vi vd_total(vd sum, int bits) {
    (void)bits;
    return vi_widen16(sum);
}

/* vw: sums of weighed bytes, each lane those of its four. A weight of 12 bits comes as its high and
 * low six: two products fit 16 bits then, and a second two may be added to them. */
typedef vi vw;
static inline vw vw_zero(void) { return vi_zero(); }
static inline vw vw_add(vw sum, v8 high, v8 low, vb s0, vb s1) {
    const vi of_high = vi_add16(vi_madd_u8s8(high.first, s0), vi_madd_u8s8(high.last, s1));
    const vi of_low = vi_add16(vi_madd_u8s8(low.first, s0), vi_madd_u8s8(low.last, s1));
    sum = vi_add(sum, _mm256_madd_epi16(of_high, _mm256_set1_epi16(64)));
    sum = vi_add(sum, vi_widen16(of_low));
    __asm__("" : "+x"(sum)); /* now, as in vi_dot16 */
    return sum;
}
static inline vi vw_total(vw sum) { return sum; }

/* The low plane alone takes seven bits: two products of 127 fit 16 bits, 2 * 127 * 127 < 2^15. */
#define VW_LOW_MOST 127
static inline vw vw_add_low(const bool two_sums, vw sum, v8 low, vb s0, vb s1) {
    (void)two_sums;
    sum = vi_add(sum, vi_widen16(vi_madd_u8s8(low.first, s0)));
    sum = vi_add(sum, vi_widen16(vi_madd_u8s8(low.last, s1)));
    __asm__("" : "+x"(sum)); /* now, as in vi_dot16 */
    return sum;
}
static inline vi vw_total_low(vw sum) { return sum; }

/* vp: sums of weighed bytes of c8, whose words have eight tokens of a pair of channels: loaded so
 * that v16 finds its tokens. vp_total: x and y of the pairs as 8 channels. */
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
static inline vi vp_total_low(vp x, vp y) { return vp_total(x, y); }

/* The low bytes of the lanes, which are in -128..127, in their order. */
static inline vb vb_from_vi(const vi a[4]) {
    const __m256i first = _mm256_packs_epi32(a[0], a[1]), last = _mm256_packs_epi32(a[2], a[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* packs works in halves */
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, last), order);
}
static inline void vi_store_bytes(uint8_t *p, const vi a[4]) { /* of lanes in 0..127 */
    _mm256_storeu_si256((__m256i *)p, vb_from_vi(a));
}
/* The high and the low six of lanes in 0..4095, as bytes in their order. */
static inline void vi_store_sixes(uint8_t *high, uint8_t *low, const vi a[4]) {
    vi h[4], l[4];
    for (int i = 0; i < 4; i++) {
        h[i] = vi_shr(a[i], 6);
        l[i] = vi_and(a[i], vi_set(63));
    }
    _mm256_storeu_si256((__m256i *)high, vb_from_vi(h));
    _mm256_storeu_si256((__m256i *)low, vb_from_vi(l));
}

/* Words of 32 bits of 8 tokens at p; sets with more lanes have the next tokens at p + stride. */
static inline vb vb_load_tokens(const uint8_t *p, size_t stride) {
    (void)stride;
    return vb_load(p);
}

/* Units of 16 bits of 2 * VF_LANES tokens, two units side by side in each lane: those at p and
 * p + 32, or something in place of the second where n, the units that are left, is 1. Sets with
 * more lanes have the next 16 tokens at p + stride. Tokens come in an order that vf_store_units
 * undoes. */
static inline void vb_load_units(vb pair[2], const uint8_t *p, size_t stride, int n) {
    const __m256i first = vb_load(p), second = vb_load(n > 1 ? p + 32 : p);
    (void)stride;
    pair[0] = _mm256_unpacklo_epi16(first, second);
    pair[1] = _mm256_unpackhi_epi16(first, second);
}
static inline void vf_store_units(float *p, const vf a[2]) {
    vf_store(p, _mm256_permute2f128_ps(a[0], a[1], 0x20));
    vf_store(p + 8, _mm256_permute2f128_ps(a[0], a[1], 0x31));
}
/* 32 channels, in -127..127, as what two units in a lane are multiplied with: the bytes of two
 * units of 16 / bits channels alternate in pairs. */
static inline void vi_store_units(int8_t *p, const vi a[4], int bits) {
    const __m128i fours = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    const __m128i eights = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    __m256i bytes = vb_from_vi(a);
    if (bits == 1) bytes = _mm256_permute4x64_epi64(bytes, 0xd8);
    const __m256i order = _mm256_broadcastsi128_si256(bits == 4 ? fours : eights);
    _mm256_storeu_si256((__m256i *)p, _mm256_shuffle_epi8(bytes, order));
}

/* ---- words of peak_kernels.inl ----------------------------------------------------------- */

/* Adds products of bytes, u in 0..255 and s in -127..127, as many as one instruction can, to sums
 * of whatever width it has. */
static inline vi vi_peak8(vi sum, vb u, vb s) { return vi_add16(sum, vi_madd_u8s8(u, s)); }
/* Products of i16, as many as one instruction can. */
static inline vi vi_peak16(vi sum, vi a, vi b) { return vi_dot16(sum, a, b); }
#define opaque(a) __asm__("" : "+x"(a)) /* makes the compiler take a vector for changed */

#endif
