/* isa_avx512.c: the kernels for x86-64 processors with AVX-512 F, BW, DQ, VL and VNNI. */
#if defined(__x86_64__) || defined(_M_X64)

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))),        \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

#include <math.h>

#include "cpu.h"
#include "isa/isa.h"

#include "isa/vec_avx512.h"

#include "isa/elementwise_kernels.inl"
#include "isa/kv_kernels.inl"
#include "isa/kv_kernels_basis.inl"
#include "isa/kv_kernels_calibrated.inl"
#include "isa/peak_kernels.inl"
#include "isa/weight_codes_i16.inl"
#include "isa/weight_kernels.inl"

const kvq_isa kvq_isa_avx512 = {
    .name = "avx512",
    .supported = kvq_cpu_has_avx512,
    .inherits = &kvq_isa_avx2,
    .quantize = quantize,
    .matmul =
        {
#define KVQ_WEIGHT(NAME, ID, BLOCK, BYTES) [KVQ_WEIGHT_##NAME] = matmul_##NAME,
#include "weights.def"
#undef KVQ_WEIGHT
        },
    .score = {[KVQ_CODEC_f16] = score_f16,
              [KVQ_CODEC_q8_0] = score_q8_0,
              [KVQ_CODEC_q4_0] = score_q4_0,
              [KVQ_CODEC_u1] = score_u1,
              [KVQ_CODEC_u2] = score_u2,
              [KVQ_CODEC_u4] = score_u4,
              [KVQ_CODEC_mixed] = score_mixed},
    .accum = {[KVQ_CODEC_f16] = accum_f16,
              [KVQ_CODEC_q8_0] = accum_q8_0,
              [KVQ_CODEC_q4_0] = accum_q4_0,
              [KVQ_CODEC_c8] = accum_c8,
              [KVQ_CODEC_t1] = accum_t1,
              [KVQ_CODEC_t2] = accum_t2},
    .score_rows = score_rows,
    .accum_rows = accum_rows,
    .add_waves = add_waves,
    .hadamard = hadamard,
    .multiply = multiply_basis,
    .softmax = softmax,
    .swiglu = swiglu,
    .peak_int8 = peak_int8,
    .peak_int16 = peak_int16,
};

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
typedef int kvq_isa_avx512_needs_x86; /* a translation unit may not be empty */
#endif
