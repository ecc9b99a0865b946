/* kv_format.h: the bytes of a sealed block: KVQ_BLOCK consecutive tokens of one KV head, one side
 * (keys or values). Shared by the reference and by every instruction set; knows no scheme and no
 * ring.
 *
 * `d` is the padded width of a head, a multiple of KVQ_D_UNIT; channels beyond the model's width
 * are zero. A stored format never changes silently: tests/vectors holds encoded blocks of every
 * codec.
 */
#ifndef KVQ_KV_FORMAT_H
#define KVQ_KV_FORMAT_H

#include "bytes.h"
#include "kv/kv_ids.h"

#define KVQ_BLOCK 64 /* tokens */
#define KVQ_RUNS 4
#define KVQ_D_UNIT 16 /* channels */
#define KVQ_D_MAX 512 /* widest head */

/* What a codec knows of the head whose rows it packs. */
typedef struct kvq_kv_shape {
    int d; /* padded width, a multiple of KVQ_D_UNIT */
    /* mixed: how many channels have 8, 4, 2 and 1 bits, in this order; those that follow have none.
     * They fill units of 16 bits, so the counts are multiples of 4, 4, 8 and 16 (a unit at the end
     * of the head may be part empty). */
    int run[KVQ_RUNS];
    /* u1, u2, u4, c8: how many channels in a row share a token's scale: d, or a multiple of 32 that
     * divides d. */
    int group;
} kvq_kv_shape;

/* One group, no runs. */
KVQ_BOTH kvq_kv_shape kvq_plain_shape(int d) {
    kvq_kv_shape sh = {d, {0}, d};
    return sh;
}

/* clang-format off */
/* f16: half rows[64][d]
 *
 * q8_0: per token d/32 of { half scale; int8 q[32] }, as ggml's block_q8_0
 *
 * q4_0: per token d/32 of { half scale; uint8 q[16] }, as ggml's block_q4_0: byte i holds channel i
 *     in its low and channel i + 16 in its high half; value = scale * (code - 8)
 *
 * u1, u2, u4: keys in b = 1, 2 or 4 bits.
 *     value[t][c] = mean[c] + a[g][t] * b[c] * (code[t][c] - (2^b - 1) / 2),  g = c / group
 *
 *     | half mu | half au | half bu | u16 0 | u8 A[d / group][64] | i8 M[d] | u8 B[d] | codes |
 *
 *     mean[c] = mu * M[c],  a[g][t] = au * A[g][t],  b[c] = bu * B[c]
 *     codes: [token / 8][channel / n][token % 8][byte k = 0..3], n = 32 / b channels, the last n
 *         padded with zeros if need be; bits b * j of byte k: channel 4j + k of the n
 *     One 32-byte load is 8 tokens by n channels; shifted by b * j and masked, each 32-bit lane
 *     holds channels 4j..4j+3 of one token, the shape that a 4-way integer dot product takes.
 *
 * c8: values. Channels i and i + 2 of each 4 (i = 0, 1) make a pair; a pair is one of 8 points of a
 *     plane (3 bits, so 1.5 bits per value) times the token's scale.
 *
 *     | half su | u16 0 | u8 S[d / group][64] | words: 12 * d bytes |
 *
 *     value[t][c] = su * S[c / group][t] * KVQ_LEVEL_UNIT * point[code[t][pair]], x for channel i,
 *         y for i + 2
 *     words: [channel / 16][word w = 0..2][pair 0..7] of 64 bits. Byte j of a word, from the top:
 *
 *         word 0 | tokens 48 + j: bits 1, 0 | token  8 + j: 3 bits | token      j: 3 bits |
 *         word 1 | tokens 56 + j: bits 1, 0 | token 24 + j: 3 bits | token 16 + j: 3 bits |
 *         word 2 | 56 + j: bit 2 | 48 + j: bit 2 | token 40 + j: 3 bits | token 32 + j: 3 bits |
 *
 *     So a shift puts the codes of 8 tokens in a row into the 8 bytes of a lane of 64 bits, where a
 *     byte shuffle looks up their levels and a 4-way integer dot product weighs them.
 *
 * mixed: keys in a calibrated basis, whose channels have about unit variance around the block's
 *     mean and come in the order of their importance: the first have 8 bits, then 4, 2, 1, the last
 *     none.
 *
 *     | half mu | half r8 | half r4 | half r2 | half r1 | u16 0 0 0 | i8 M[d] | u8 R[n] | units |
 *
 *     value[t][c] = mu * M[c] + r * R[c] * (code - (2^bits - 1) / 2), r that of the channel's
 *         width; R has a byte for each channel that has bits, and zeros up to a multiple of 16
 *     units: [token / 16][unit][token % 16] of 16 bits. A unit holds the codes of 4, 8 or 16
 *         channels of 4, 2 or 1 bits: channel 2j + k of it in byte k at bit bits * j. A channel of
 *         8 bits is one of 4 in a unit of the high halves and again in a unit of the low halves;
 *         all high ones come first.
 *     One 32-byte load is a unit of 16 tokens; shifted and masked, each 16-bit lane holds two
 *     channels of one token, which a multiply-add of byte pairs turns into one sum per token.
 *
 * t1, t2: values. Along the tokens of a channel, a code of b = 1 or 2 bits and the 4 - b bits
 *     before it choose one of 16 levels (a trellis code; the encoder searches all paths):
 *
 *     | half su | u16 0 | u8 S[64] | words: 8 * b * d bytes |
 *
 *     value[t][c] = su * S[t] * KVQ_LEVEL_UNIT * level[bits b(p + 1) - 4 .. b(p + 1) - 1 of the
 *         channel's stream], p the token's place in the stream
 *     The stream is preceded by zeros; it lies in words of 32 bits, the first bit lowest:
 *     words: [channel / 16][word][channel % 16]. A word holds 32 / b tokens in a row, in the order
 *         that puts 4 in a row into its 4 bytes: byte j has, from its low end, tokens j, j + 4,
 *         j + 8, ... of them.
 *     So a shift and a mask give the windows of 4 tokens in a row, as above.
 *
 * n2, n3, nf4: keys or values, each token by itself: one of 2^b levels times the token's scale.
 *
 *     | half scale[64] | codes[64]: rows of b * d / 8 bytes |
 *
 *     value[t][c] = scale[t] * level[code[t][c]]
 *     b bytes of a row hold 8 channels: channel i of them in bits b * i of a little-endian number
 */
/* clang-format on */
#define KVQ_U_SCALES 8               /* bytes before the scales of tokens */
#define KVQ_C8_SCALES 4              /* the same */
#define KVQ_MIXED_HEADER 16          /* bytes before the means */
#define KVQ_T_HEADER 68              /* bytes before the words */
#define KVQ_N_HEADER (2 * KVQ_BLOCK) /* bytes before the codes */

KVQ_BOTH size_t kvq_f16_bytes(const kvq_kv_shape *sh) {
    return (size_t)KVQ_BLOCK * (size_t)sh->d * 2;
}
KVQ_BOTH size_t kvq_q8_0_bytes(const kvq_kv_shape *sh) {
    return (size_t)KVQ_BLOCK * (size_t)sh->d / 32 * 34;
}
KVQ_BOTH size_t kvq_q4_0_bytes(const kvq_kv_shape *sh) {
    return (size_t)KVQ_BLOCK * (size_t)sh->d / 32 * 18;
}
KVQ_BOTH int kvq_groups(const kvq_kv_shape *sh) { return sh->d / sh->group; }

/* Where the means of u1, u2, u4 start, and the words of c8. */
KVQ_BOTH size_t kvq_u_means(const kvq_kv_shape *sh) {
    return KVQ_U_SCALES + KVQ_BLOCK * (size_t)kvq_groups(sh);
}
KVQ_BOTH size_t kvq_c8_words(const kvq_kv_shape *sh) {
    return KVQ_C8_SCALES + KVQ_BLOCK * (size_t)kvq_groups(sh);
}

/* Words of 32 bits per token that the codes of u1, u2, u4 take. */
KVQ_BOTH int kvq_u_words(const kvq_kv_shape *sh, int bits) { return (sh->d * bits + 31) / 32; }
KVQ_BOTH size_t kvq_u_bytes(const kvq_kv_shape *sh, int bits) {
    return kvq_u_means(sh) + 2 * (size_t)sh->d + KVQ_BLOCK * 4 * (size_t)kvq_u_words(sh, bits);
}
KVQ_BOTH size_t kvq_u1_bytes(const kvq_kv_shape *sh) { return kvq_u_bytes(sh, 1); }
KVQ_BOTH size_t kvq_u2_bytes(const kvq_kv_shape *sh) { return kvq_u_bytes(sh, 2); }
KVQ_BOTH size_t kvq_u4_bytes(const kvq_kv_shape *sh) { return kvq_u_bytes(sh, 4); }
KVQ_BOTH size_t kvq_c8_bytes(const kvq_kv_shape *sh) {
    return kvq_c8_words(sh) + 12 * (size_t)sh->d;
}

/* Units of 16 bits per token of each run of mixed. */
KVQ_BOTH int kvq_mixed_units(const kvq_kv_shape *sh, int run) {
    static const int per_unit[KVQ_RUNS] = {4, 4, 8, 16}; /* channels */
    const int units = (sh->run[run] + per_unit[run] - 1) / per_unit[run];
    return run == 0 ? 2 * units : units; /* 8 bits: high and low halves */
}
KVQ_BOTH int kvq_mixed_coded(const kvq_kv_shape *sh) { /* channels that have bits */
    int n = 0;
    for (int run = 0; run < KVQ_RUNS; run++) n += sh->run[run];
    return n;
}
KVQ_BOTH size_t kvq_mixed_units_at(const kvq_kv_shape *sh) {
    return KVQ_MIXED_HEADER + (size_t)sh->d + kvq_round_up((size_t)kvq_mixed_coded(sh), 16);
}
KVQ_BOTH size_t kvq_mixed_bytes(const kvq_kv_shape *sh) {
    size_t units = 0;
    for (int run = 0; run < KVQ_RUNS; run++) units += (size_t)kvq_mixed_units(sh, run);
    return kvq_mixed_units_at(sh) + units * KVQ_BLOCK * 2;
}
KVQ_BOTH size_t kvq_t1_bytes(const kvq_kv_shape *sh) { return KVQ_T_HEADER + 8 * (size_t)sh->d; }
KVQ_BOTH size_t kvq_t2_bytes(const kvq_kv_shape *sh) { return KVQ_T_HEADER + 16 * (size_t)sh->d; }

/* c8: the first channel of a pair (the second one is two further), and where the first of its three
 * words lies among the words of a block (they are 64 bytes apart). */
KVQ_BOTH int kvq_c8_channel(int pair) { return pair / 2 * 4 + pair % 2; }
KVQ_BOTH size_t kvq_c8_pair_at(int pair) { return (size_t)pair / 8 * 192 + (size_t)pair % 8 * 8; }

/* t1, t2: where the first word of a channel lies among the words of a block (they are 64 bytes
 * apart), and the token at place p of a channel's stream. */
KVQ_BOTH size_t kvq_t_words_at(int c, int bits) {
    return ((size_t)(c / 16 * 2 * bits) * 16 + (size_t)(c % 16)) * 4;
}
KVQ_BOTH int kvq_t_token(int p, int bits) {
    const int fields = 8 / bits, codes = 4 * fields; /* of a byte, of a word */
    return p / codes * codes + 4 * (p % fields) + p % codes / fields;
}

KVQ_BOTH size_t kvq_n_bytes(const kvq_kv_shape *sh, int bits) {
    return KVQ_N_HEADER + KVQ_BLOCK / 8 * (size_t)bits * (size_t)sh->d;
}
KVQ_BOTH size_t kvq_n2_bytes(const kvq_kv_shape *sh) { return kvq_n_bytes(sh, 2); }
KVQ_BOTH size_t kvq_n3_bytes(const kvq_kv_shape *sh) { return kvq_n_bytes(sh, 3); }
KVQ_BOTH size_t kvq_nf4_bytes(const kvq_kv_shape *sh) { return kvq_n_bytes(sh, 4); }

/* Where a block of keys keeps its mean, int8 [d] in units of the half at byte 0; 0 where the codec
 * has none. */
KVQ_BOTH size_t kvq_codec_mean_at(kvq_codec_id id, const kvq_kv_shape *sh) {
    switch (id) {
    case KVQ_CODEC_u1:
    case KVQ_CODEC_u2:
    case KVQ_CODEC_u4:
        return kvq_u_means(sh);
    case KVQ_CODEC_mixed:
        return KVQ_MIXED_HEADER;
    default:
        return 0;
    }
}

/* Where the codes of a block begin, which kernels read in wide loads: behind its scales. */
KVQ_BOTH size_t kvq_codec_codes_at(kvq_codec_id id, const kvq_kv_shape *sh) {
    switch (id) {
    case KVQ_CODEC_u1:
    case KVQ_CODEC_u2:
    case KVQ_CODEC_u4:
        return kvq_u_means(sh) + 2 * (size_t)sh->d;
    case KVQ_CODEC_c8:
        return kvq_c8_words(sh);
    case KVQ_CODEC_mixed:
        return kvq_mixed_units_at(sh);
    case KVQ_CODEC_t1:
    case KVQ_CODEC_t2:
        return KVQ_T_HEADER;
    case KVQ_CODEC_n2:
    case KVQ_CODEC_n3:
    case KVQ_CODEC_nf4:
        return KVQ_N_HEADER;
    default:
        return 0;
    }
}

/* Tables of levels are lists here, since host and device each keep arrays of their own. */

/* Levels of n2 and n3: quantizers of least mean square error for a unit normal variable (Lloyd,
 * Max). nf4: NormalFloat4 of QLoRA (arXiv 2305.14314), for values over the largest of a row. The
 * table of n2 is repeated to 8 entries: any bit above a code's own may come along. */
#define KVQ_N2_LEVELS -1.5104f, -0.4528f, 0.4528f, 1.5104f, -1.5104f, -0.4528f, 0.4528f, 1.5104f
#define KVQ_N3_LEVELS -2.1520f, -1.3439f, -0.7560f, -0.2451f, 0.2451f, 0.7560f, 1.3439f, 2.1520f
#define KVQ_NF4_LEVELS                                                                             \
    -1.0f, -0.69619280f, -0.52507305f, -0.39491749f, -0.28444138f, -0.18477343f, -0.09105004f,     \
        0.0f, 0.07958030f, 0.16093020f, 0.24611230f, 0.33791524f, 0.44070983f, 0.56261700f,        \
        0.72295684f, 1.0f

/* Levels of t1, t2 and points of c8 are small integers, which instruction sets multiply fastest, in
 * this unit; rounding to them adds 2.4e-5 of the power of normal data to the error. */
#define KVQ_LEVEL_UNIT (1.0f / 59)

/* Levels of t1 and t2 for a normal variable of unit variance, by four bits of the stream, the last
 * one highest. Found by alternating the search for paths with means (Lloyd's algorithm over the
 * trellis; bench/train_trellis.c). */
#define KVQ_T1_LEVELS 30, -92, 68, -20, -60, 22, -27, 60, -58, 19, -21, 90, 26, -62, 56, -25
#define KVQ_T2_LEVELS 126, 9, 60, -53, 45, -47, 18, -12, -13, -126, -83, 89, -77, 65, -24, 25

/* Points of c8: the 8-point quantizer of least mean square error for a two-dimensional normal
 * distribution of unit variance (Lloyd's algorithm on a grid of 801 x 801; error 0.2012 per value).
 * Points 4..7 are 0..3 negated. */
#define KVQ_C8_X 21, 28, 54, 95, -21, -28, -54, -95
#define KVQ_C8_Y -19, -92, 60, -19, 19, 92, -60, 19

#endif
