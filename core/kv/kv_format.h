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

#include "base.h"

#define KVQ_BLOCK 64  /* tokens */
#define KVQ_D_UNIT 16 /* channels */
#define KVQ_D_MAX 512 /* widest head */

/* clang-format off */
/* f16: half rows[64][d]
 *
 * q8_0: per token d/32 of { half scale; int8 q[32] }, as ggml's block_q8_0
 *
 * q4_0: per token d/32 of { half scale; uint8 q[16] }, as ggml's block_q4_0: byte i holds channel i
 *     in its low and channel i + 16 in its high half; value = scale * (code - 8)
 *
 * u2: keys. value[t][c] = mean[c] + a[t] * b[c] * (code[t][c] - 1.5), code in 0..3
 *
 *     | half mu | half au | half bu | u16 0 | u8 A[64] | i8 M[d] | u8 B[d] | codes: 16 * d bytes |
 *
 *     mean[c] = mu * M[c],  a[t] = au * A[t],  b[c] = bu * B[c]
 *     codes: [token / 8][channel / 16][token % 8][byte k = 0..3], bits 2j of byte k: channel 4j + k
 *     One 32-byte load is 8 tokens by 16 channels; shifted by 2j and masked, each 32-bit lane holds
 *     channels 4j..4j+3 of one token, the shape that a 4-way integer dot product takes.
 *
 * c8: values. Channels i and i + 8 of each 16 make a pair; a pair is one of 8 points of a plane
 *     (3 bits, so 1.5 bits per value) times the token's scale.
 *
 *     | half su | u16 0 | u8 S[64] | words: 12 * d bytes |
 *
 *     value[t][c] = su * S[t] * point[code[t][pair]], x for channel i and y for channel i + 8
 *     words: [channel / 16][token / 32][word w = 0..2][pair i = 0..7] of 32 bits. A word holds, for
 *     its pair, the codes of ten tokens (t = 10w .. 10w + 9) in bits 3(t - 10w); the two bits left
 *     over in each of the three words hold tokens 30 and 31:
 *         token 30 = w0[31:30] | w1[30] << 2
 *         token 31 = w1[31] | w2[31:30] << 1
 *     So 32 codes take exactly 96 bits; decoding is a shift and a table look-up per 8 pairs.
 */
/* clang-format on */
#define KVQ_U2_HEADER 72 /* bytes before the means */
#define KVQ_C8_HEADER 68 /* bytes before the words */

static inline size_t kvq_f16_bytes(int d) { return (size_t)KVQ_BLOCK * (size_t)d * 2; }
static inline size_t kvq_q8_0_bytes(int d) { return (size_t)KVQ_BLOCK * (size_t)d / 32 * 34; }
static inline size_t kvq_q4_0_bytes(int d) { return (size_t)KVQ_BLOCK * (size_t)d / 32 * 18; }
static inline size_t kvq_u2_bytes(int d) { return KVQ_U2_HEADER + 18 * (size_t)d; }
static inline size_t kvq_c8_bytes(int d) { return KVQ_C8_HEADER + 12 * (size_t)d; }

/* Points of c8: the 8-point quantizer of least mean square error for a two-dimensional normal
 * distribution of unit variance (Lloyd's algorithm on a grid of 801 x 801; error 0.2012 per value).
 */
extern const float kvq_c8_x[8], kvq_c8_y[8];

#endif
