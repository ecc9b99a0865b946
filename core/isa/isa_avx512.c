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
    .softmax = softmax,
    .swiglu = swiglu,
};

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
typedef int kvq_isa_avx512_needs_x86; /* a translation unit may not be empty */
#endif
