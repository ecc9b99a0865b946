/* unpack.cuh: eight channels of one token of a sealed block, for every codec of codecs.def.
 *
 * The plain way into a block, which kernels take where they have no faster one for a codec. Values
 * come as halves, without the mean of the block that some codecs of keys keep (kvq_codec_mean_at):
 * it is added to the scores, where it costs no precision. Formats: kv/kv_format.h.
 */
#ifndef KVQ_CUDA_UNPACK_CUH
#define KVQ_CUDA_UNPACK_CUH

#include "cuda/kernels/cache_args.h"
#include "cuda/kernels/levels.cuh"
#include "cuda/kernels/port.cuh"

typedef struct kvq_eight {
    float x[8];
} kvq_eight;

static __device__ __forceinline__ float kvq_half_at(const uint8_t *p) {
    return __half2float(*reinterpret_cast<const __half *>(p));
}

static __device__ __forceinline__ uint32_t kvq_pack_halves(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, sizeof bits);
    return bits;
}

/* Word i of four; i is known when the kernel is compiled. */
static __device__ __forceinline__ uint32_t word_of(uint4 words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

static __device__ __forceinline__ kvq_eight kvq_unpack_f16(const uint8_t *block, int d, int t,
                                                           int c) {
    const __half *const row = reinterpret_cast<const __half *>(block) + t * d + c;
    kvq_eight out;
#pragma unroll
    for (int i = 0; i < 8; i++) out.x[i] = __half2float(row[i]);
    return out;
}

static __device__ __forceinline__ kvq_eight kvq_unpack_q8_0(const uint8_t *block, int d, int t,
                                                            int c) {
    const uint8_t *const group = block + (t * d + c) / 32 * 34;
    const float scale = kvq_half_at(group);
    kvq_eight out;
#pragma unroll
    for (int i = 0; i < 8; i++) out.x[i] = scale * (float)(int8_t)group[2 + c % 32 + i];
    return out;
}

static __device__ __forceinline__ kvq_eight kvq_unpack_q4_0(const uint8_t *block, int d, int t,
                                                            int c) {
    const uint8_t *const group = block + (t * d + c) / 32 * 18;
    const float scale = kvq_half_at(group);
    const int shift = c % 32 / 16 * 4;
    kvq_eight out;
#pragma unroll
    for (int i = 0; i < 8; i++)
        out.x[i] = scale * (float)((group[2 + c % 16 + i] >> shift & 15) - 8);
    return out;
}

static __device__ __forceinline__ kvq_eight kvq_unpack_u(const uint8_t *block,
                                                         const kvq_kv_shape &sh, int bits, int t,
                                                         int c) {
    const int per_word = 32 / bits, words = kvq_u_words(&sh, bits);
    const uint8_t *const scales = block + kvq_u_means(&sh) + sh.d, *const codes = scales + sh.d;
    const uint32_t word = *reinterpret_cast<const uint32_t *>(
        codes + ((t / 8 * words + c / per_word) * 8 + t % 8) * 4);
    const float a = kvq_half_at(block + 2) * (float)block[KVQ_U_SCALES + c / sh.group * 64 + t];
    const float unit = a * kvq_half_at(block + 4), middle = 0.5f * (float)((1 << bits) - 1);
    kvq_eight out;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int shift = 8 * (i % 4) + bits * (c % per_word / 4 + i / 4);
        const int code = (int)(word >> shift) & ((1 << bits) - 1);
        out.x[i] = unit * (float)scales[c + i] * ((float)code - middle);
    }
    return out;
}

static __device__ __forceinline__ int kvq_c8_code(const uint8_t *pair, int t) {
    const uint8_t *const byte = pair + t % 8;
    if (t < 48) return byte[t / 16 * 64] >> t / 8 % 2 * 3 & 7;
    const int last = t / 8 - 6;
    return byte[last * 64] >> 6 | (byte[128] >> (6 + last) & 1) << 2;
}

static __device__ __forceinline__ kvq_eight kvq_unpack_c8(const uint8_t *block,
                                                          const kvq_kv_shape &sh, int t, int c) {
    const uint8_t *const words = block + kvq_c8_words(&sh);
    const float scale =
        kvq_half_at(block) * KVQ_LEVEL_UNIT * (float)block[KVQ_C8_SCALES + c / sh.group * 64 + t];
    kvq_eight out;
#pragma unroll
    for (int i = 0; i < 4; i++) { /* channels 0 and 2, 1 and 3, 4 and 6, 5 and 7 are pairs */
        const int pair = c / 2 + i, first = i / 2 * 4 + i % 2;
        const int code = kvq_c8_code(words + pair / 8 * 192 + pair % 8 * 8, t);
        out.x[first] = scale * (float)kvq_device_c8_x[code];
        out.x[first + 2] = scale * (float)kvq_device_c8_y[code];
    }
    return out;
}

/* The level of a trellis code: the four bits of the channel's stream that end with it. */
static __device__ __forceinline__ kvq_eight kvq_unpack_t(const uint8_t *block, int bits,
                                                         const int8_t *level, int t, int c) {
    const int fields = 8 / bits, codes = 4 * fields; /* of a byte, of a word */
    const int word = t / codes, within = t % codes;
    const int end = (within % 4 * fields + within / 4 + 1) * bits; /* bits of the word, up to it */
    const float scale = kvq_half_at(block) * KVQ_LEVEL_UNIT * (float)block[4 + t];
    const uint32_t *const words =
        reinterpret_cast<const uint32_t *>(block + KVQ_T_HEADER) + c / 16 * 2 * bits * 16 + c % 16;
    kvq_eight out;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t high = words[word * 16 + i], low = word ? words[word * 16 - 16 + i] : 0;
        const uint64_t stream = (uint64_t)high << 32 | low;
        out.x[i] = scale * (float)level[stream >> (28 + end) & 15];
    }
    return out;
}

static __device__ __forceinline__ kvq_eight kvq_unpack_levels(const uint8_t *block, int d, int bits,
                                                              const float *level, int t, int c) {
    const uint8_t *const codes = block + KVQ_N_HEADER + (t * (d / 8) + c / 8) * bits;
    const float scale = kvq_half_at(block + 2 * t);
    uint32_t number = 0;
    kvq_eight out;
    for (int i = 0; i < bits; i++) number |= (uint32_t)codes[i] << 8 * i;
#pragma unroll
    for (int i = 0; i < 8; i++) out.x[i] = scale * level[number >> bits * i & ((1 << bits) - 1)];
    return out;
}

/* A code of `bits` at place `index` of a run whose units begin with `unit`. */
static __device__ __forceinline__ int kvq_mixed_code(const uint8_t *units, int n_units, int unit,
                                                     int index, int bits, int t) {
    const int per_unit = 16 / bits, i = index % per_unit;
    const int at = ((t / 16 * n_units + unit + index / per_unit) * 16 + t % 16) * 2 + i % 2;
    return units[at] >> i / 2 * bits & ((1 << bits) - 1);
}

static __device__ __forceinline__ kvq_eight kvq_unpack_mixed(const uint8_t *block,
                                                             const kvq_kv_shape &sh, int t, int c) {
    const uint8_t *const scales = block + KVQ_MIXED_HEADER + sh.d;
    const uint8_t *const units = block + kvq_mixed_units_at(&sh);
    int n_units = 0;
    kvq_eight out;
#pragma unroll
    for (int run = 0; run < KVQ_RUNS; run++) n_units += kvq_mixed_units(&sh, run);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int first = 0, unit = 0;
        out.x[i] = 0;
#pragma unroll
        for (int run = 0; run < KVQ_RUNS; run++) {
            const int bits = 8 >> run, n = sh.run[run], index = c + i - first;
            if (index >= 0 && index < n) {
                const float scale = kvq_half_at(block + 2 + 2 * run) * (float)scales[c + i];
                const int code =
                    bits == 8 ? kvq_mixed_code(units, n_units, unit, index, 4, t) << 4 |
                                    kvq_mixed_code(units, n_units, unit + (n + 3) / 4, index, 4, t)
                              : kvq_mixed_code(units, n_units, unit, index, bits, t);
                out.x[i] = scale * ((float)code - 0.5f * (float)((1 << bits) - 1));
            }
            first += n;
            unit += kvq_mixed_units(&sh, run);
        }
    }
    return out;
}

/* Channels c .. c + 7 of token t of a block, c a multiple of 8. */
static __device__ __forceinline__ kvq_eight kvq_unpack(const kvq_cuda_track &track,
                                                       const uint8_t *block, int t, int c) {
    const kvq_kv_shape &sh = track.shape;
    switch (track.codec) {
    case KVQ_CODEC_f16:
        return kvq_unpack_f16(block, sh.d, t, c);
    case KVQ_CODEC_q8_0:
        return kvq_unpack_q8_0(block, sh.d, t, c);
    case KVQ_CODEC_q4_0:
        return kvq_unpack_q4_0(block, sh.d, t, c);
    case KVQ_CODEC_u1:
        return kvq_unpack_u(block, sh, 1, t, c);
    case KVQ_CODEC_u2:
        return kvq_unpack_u(block, sh, 2, t, c);
    case KVQ_CODEC_u4:
        return kvq_unpack_u(block, sh, 4, t, c);
    case KVQ_CODEC_c8:
        return kvq_unpack_c8(block, sh, t, c);
    case KVQ_CODEC_mixed:
        return kvq_unpack_mixed(block, sh, t, c);
    case KVQ_CODEC_t1:
        return kvq_unpack_t(block, 1, kvq_device_t1_level, t, c);
    case KVQ_CODEC_t2:
        return kvq_unpack_t(block, 2, kvq_device_t2_level, t, c);
    case KVQ_CODEC_n2:
        return kvq_unpack_levels(block, sh.d, 2, kvq_device_n2_level, t, c);
    case KVQ_CODEC_n3:
        return kvq_unpack_levels(block, sh.d, 3, kvq_device_n3_level, t, c);
    default:
        return kvq_unpack_levels(block, sh.d, 4, kvq_device_nf4_level, t, c);
    }
}

#endif
