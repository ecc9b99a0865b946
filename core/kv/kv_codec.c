/* kv_codec.c: the rows of codecs.def as a table.
 *
 * Encoding is plain C, compiled with -ffp-contract=off, so that every machine writes the same
 * bytes. Where codes are chosen number by number, scales are first rounded to what is stored and
 * the codes then chosen with those, without their stretch (kvq_stretch); a trellis is searched
 * first.
 */
#include <float.h>
#include <stdbool.h>

#include "kv/kv_codec_parts.h"

void kvq_store_scales(uint8_t *half, uint8_t *codes, float *scale, int n) {
    float largest = 0;
    for (int i = 0; i < n; i++) largest = fmaxf(largest, scale[i]);
    const uint16_t unit_half = kvq_unit_of(largest, 255.0f);
    const float unit = kvq_f16_to_f32(unit_half), inverse = kvq_inverse_or_zero(unit);
    memcpy(half, &unit_half, 2);
    for (int i = 0; i < n; i++) {
        codes[i] = (uint8_t)kvq_clamped(scale[i] * inverse + 0.5f, 0, 255);
        scale[i] = unit * (float)codes[i];
    }
}

void kvq_store_mean(uint8_t *half, uint8_t *codes, float *mean, int d) {
    float largest = 0;
    for (int c = 0; c < d; c++) largest = fmaxf(largest, fabsf(mean[c]));
    const uint16_t unit_half = kvq_unit_of(largest, 127.0f);
    const float unit = kvq_f16_to_f32(unit_half), inverse = kvq_inverse_or_zero(unit);
    memcpy(half, &unit_half, 2);
    for (int c = 0; c < d; c++) {
        const int code = kvq_clamped(floorf(mean[c] * inverse + 0.5f), -127, 127);
        codes[c] = (uint8_t)code;
        mean[c] = unit * (float)code;
    }
}

void kvq_query_round(int16_t *x16, float *unit, const float *x, int n, int d) {
    const int stride = kvq_x16_stride(d);
    for (int i = 0; i < n; i++, x += d, x16 += stride) {
        float largest = 1e-30f;
        bool finite = true;
        for (int c = 0; c < d; c++) {
            const float magnitude = fabsf(x[c]);
            largest = magnitude > largest ? magnitude : largest;
            finite &= magnitude <= FLT_MAX;
        }
        unit[i] = finite ? largest / 32767.0f : NAN;
        for (int c = 0; c < stride; c++) {
            /* the last 16 bits of the sum are the number, rounded */
            const float sum = (c < d ? x[c] * (32767.0f / largest) : 0.0f) + 12582912.0f;
            uint32_t bits;
            memcpy(&bits, &sum, sizeof bits);
            x16[c] = (int16_t)bits;
        }
    }
}

const kvq_codec kvq_codecs[KVQ_CODECS] = {
#define KVQ_CODEC(NAME, MULTIPLE, SUMMARY)                                                         \
    {#NAME, SUMMARY, MULTIPLE, kvq_##NAME##_bytes, kvq_encode_##NAME, kvq_decode_##NAME},
#include "kv/codecs.def"
#undef KVQ_CODEC
};
