/* kv_codec_parts.h: what the files of codecs (kv_codec_*.c) share: the functions that each row of
 * codecs.def needs, and how scales are stored.
 */
#ifndef KVQ_KV_CODEC_PARTS_H
#define KVQ_KV_CODEC_PARTS_H

#include <math.h>

#include "kv/kv_codec.h"
#include "kv/kv_codec_math.h"

#define KVQ_CODEC(NAME, MULTIPLE, SUMMARY)                                                         \
    void kvq_encode_##NAME(uint8_t *block, const uint16_t *rows, const kvq_kv_shape *sh);          \
    void kvq_decode_##NAME(float *x, const uint8_t *block, const kvq_kv_shape *sh);
#include "kv/codecs.def"
#undef KVQ_CODEC

/* Stores n scales >= 0 in 8 bits each below one half for the block; gives them back as stored. The
 * half is the largest scale / 255 rounded up a little, so that no code exceeds 255. Eight bits cost
 * nothing against exact scales (measured: docs/schemes/skvq.md). */
void kvq_store_scales(uint8_t *half, uint8_t *codes, float *scale, int n);

/* The same for the mean of a block, with signs: mean[d] becomes what is stored. */
void kvq_store_mean(uint8_t *half, uint8_t *codes, float *mean, int d);

/* Four lanes, in the vectors of gcc and clang: compilers make scalars of many a plain loop that
 * chooses. The arithmetic is the same on every machine. */
typedef float kvq_four __attribute__((vector_size(16)));
typedef int32_t kvq_four_ints __attribute__((vector_size(16)));

static inline kvq_four kvq_load_four(const float *p) {
    kvq_four x;
    memcpy(&x, p, sizeof x);
    return x;
}
static inline void kvq_store_four(float *p, kvq_four x) { memcpy(p, &x, sizeof x); }
static inline kvq_four_ints kvq_where_ints(kvq_four_ints yes, kvq_four_ints a, kvq_four_ints b) {
    return (a & yes) | (b & ~yes);
}
static inline kvq_four kvq_where(kvq_four_ints yes, kvq_four a, kvq_four b) {
    return (kvq_four)kvq_where_ints(yes, (kvq_four_ints)a, (kvq_four_ints)b);
}

/* n halves, a multiple of 4: kvq_f16_to_f32 without branches. */
static inline void kvq_halves_to_f32(float *out, const uint16_t *halves, int n) {
    for (int i = 0; i < n; i += 4) {
        const kvq_four_ints h = {halves[i], halves[i + 1], halves[i + 2], halves[i + 3]};
        const kvq_four_ints magnitude = h & 0x7fff, moved = magnitude << 13;
        const kvq_four_ints infinite = (magnitude > 0x7bff) & (112 << 23);
        const kvq_four normal = (kvq_four)(moved + (112 << 23) + infinite);
        /* a subnormal one as the mantissa of 2^-14 + x */
        const kvq_four tiny = (kvq_four)(moved + (113 << 23)) - 0x1p-14f;
        const kvq_four x = kvq_where(magnitude < 0x400, tiny, normal);
        kvq_store_four(out + i, (kvq_four)((kvq_four_ints)x | (h & 0x8000) << 16));
    }
}

#endif
