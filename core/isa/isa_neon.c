/* isa_neon.c: the kernels for 64-bit ARM processors with NEON and its dot products (FEAT_DotProd).
 */
#if defined(__aarch64__) || defined(_M_ARM64)

#if defined(__clang__)
/* Before its version 16 clang declares only what the command line allows, not what the file does.
 */
#if !defined(__ARM_FEATURE_DOTPROD)
#define __ARM_FEATURE_DOTPROD 1
#endif
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
/* Before registers are given out gcc would move loads up, into more of them than there are. */
#pragma GCC optimize("no-schedule-insns")
#endif

#include <math.h>

#include "cpu.h"
#include "isa/isa.h"

#include "isa/vec_neon.h"

#include "isa/elementwise_kernels.inl"
#include "isa/kv_kernels.inl"
#include "isa/kv_kernels_basis.inl"
#include "isa/kv_kernels_calibrated.inl"
#include "isa/kv_kernels_levels.inl"
#include "isa/peak_kernels.inl"
#include "isa/weight_codes_i8.inl"
#include "isa/weight_kernels.inl"

const kvq_isa kvq_isa_neon = {
    .name = "neon",
    .supported = kvq_cpu_has_dotprod,
    .quantize = quantize,
    .matmul =
        {
#define KVQ_WEIGHT(NAME, ID, BLOCK, BYTES) [KVQ_WEIGHT_##NAME] = matmul_##NAME,
#include "weights.def"
#undef KVQ_WEIGHT
        },
    /* The products that schemes have a use for: u1, u2, u4 and mixed pack keys only, c8, t1 and
     * t2 values only. */
    .score = {[KVQ_CODEC_f16] = score_f16,
              [KVQ_CODEC_q8_0] = score_q8_0,
              [KVQ_CODEC_q4_0] = score_q4_0,
              [KVQ_CODEC_u1] = score_u1,
              [KVQ_CODEC_u2] = score_u2,
              [KVQ_CODEC_u4] = score_u4,
              [KVQ_CODEC_mixed] = score_mixed,
              [KVQ_CODEC_n2] = score_n2,
              [KVQ_CODEC_n3] = score_n3,
              [KVQ_CODEC_nf4] = score_nf4},
    .accum = {[KVQ_CODEC_f16] = accum_f16,
              [KVQ_CODEC_q8_0] = accum_q8_0,
              [KVQ_CODEC_q4_0] = accum_q4_0,
              [KVQ_CODEC_c8] = accum_c8,
              [KVQ_CODEC_t1] = accum_t1,
              [KVQ_CODEC_t2] = accum_t2,
              [KVQ_CODEC_n2] = accum_n2,
              [KVQ_CODEC_n3] = accum_n3,
              [KVQ_CODEC_nf4] = accum_nf4},
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
typedef int kvq_isa_neon_needs_arm64; /* a translation unit may not be empty */
#endif
