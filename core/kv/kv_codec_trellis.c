/* kv_codec_trellis.c: t1 and t2, trellis-coded values.
 *
 * A code of 1 or 2 bits and the bits before it choose one of 16 levels, so neighbouring levels can
 * be told apart by the past: the mean square error on normal data is 0.313 and 0.096, against 0.363
 * and 0.118 of the best quantizers without memory (Marcellin and Fischer, IEEE Trans. Comm. 38(1),
 * 1990; a window of stream bits as the state: QTIP, arXiv 2406.11235). Decoding stays one shift and
 * one look-up per value; only the encoder searches.
 */
#include "kv/kv_codec_parts.h"

const int8_t kvq_t1_level[16] = {30,  -92, 68,  -20, -60, 22,  -27, 60,
                                 -58, 19,  -21, 90,  26,  -62, 56,  -25};
const int8_t kvq_t2_level[16] = {126, 9,    60,  -53, 45,  -47, 18,  -12,
                                 -13, -126, -83, 89,  -77, 65,  -24, 25};

enum { LANES = 32, LEVELS = 16, MOST_STATES = 8 };

/* Four lanes, in the vectors of gcc and clang: gcc 12 makes scalars of the plain loop. The
 * arithmetic is the same on every machine. */
typedef float four __attribute__((vector_size(16)));
typedef int32_t four_ints __attribute__((vector_size(16)));

static four load(const float *p) {
    four x;
    memcpy(&x, p, sizeof x);
    return x;
}
static void store(float *p, four x) { memcpy(p, &x, sizeof x); }
static four where(four_ints yes, four a, four b) {
    return (four)(((four_ints)a & yes) | ((four_ints)b & ~yes));
}

/* Lowers least[i] to the cost of a window that leads to the state, where it is lower, and notes
 * that it was this one: before + (z - level)^2 without the part z^2 that all windows share. */
static void try_window(float *least, float *which, const float *before, const float *z, float fixed,
                       float linear, float index, int n) {
    for (int i = 0; i < n; i += 4) {
        const four c = load(before + i) + (fixed + linear * load(z + i)), best = load(least + i);
        const four_ints lower = c < best;
        store(which + i, where(lower, index - (four){0}, load(which + i)));
        store(least + i, where(lower, c, best));
    }
}

/* The path of least error (Viterbi's algorithm) for n channels side by side: z in units of the
 * scale of its token, so that errors count relative to the size of their token: small values are
 * often those that attention looks at most. (Counting them by size tripled the divergence.) */
static void find_path(uint8_t code[KVQ_BLOCK][LANES], float z[KVQ_BLOCK][LANES],
                      const float level[LEVELS], int bits, int n) {
    const int states = LEVELS >> bits, branches = 1 << bits;
    float cost[2][MOST_STATES][LANES];
    static const float unreachable = 1e30f;
    float from[KVQ_BLOCK][MOST_STATES][LANES];
    for (int s = 0; s < states; s++) {
        for (int i = 0; i < n; i++) cost[0][s][i] = s ? unreachable : 0.0f;
    }
    for (int t = 0; t < KVQ_BLOCK; t++) {
        float (*const now)[LANES] = cost[t % 2], (*const next)[LANES] = cost[(t + 1) % 2];
        for (int s = 0; s < states; s++) {
            for (int i = 0; i < n; i++) next[s][i] = INFINITY;
            for (int i = 0; i < n; i++) from[t][s][i] = 0;
            for (int b = 0; b < branches; b++) { /* windows s * branches + b lead to state s */
                const int window = s * branches + b;
                try_window(next[s], from[t][s], now[window % states], z[t],
                           level[window] * level[window], -2.0f * level[window], (float)b, n);
            }
        }
    }
    for (int i = 0; i < n; i++) {
        int s = 0;
        for (int other = 1; other < states; other++) {
            s = cost[KVQ_BLOCK % 2][other][i] < cost[KVQ_BLOCK % 2][s][i] ? other : s;
        }
        for (int t = KVQ_BLOCK - 1; t >= 0; t--) {
            const int window = s * branches + (int)from[t][s][i];
            code[t][i] = (uint8_t)(window >> (4 - bits));
            s = window % states;
        }
    }
}

/* The next window of a stream of codes, given the window before. */
static int next_window(int window, int code, int bits) {
    return window >> bits | code << (4 - bits);
}

/* Where the code at position p of a channel's stream lies in its words, and whose it is
 * (kv_format.h): word, byte and bits of the position, in the order of the stream. */
typedef struct place {
    int token, word, byte, shift;
} place;

static place place_of(int p, int bits) {
    const int fields = 8 / bits, codes = 4 * fields; /* of a byte, of a word */
    const int word = p / codes, byte = p % codes / fields, field = p % fields;
    return (place){word * codes + 4 * field + byte, word, byte, field * bits};
}

static size_t byte_at(place at, int c, int bits) {
    return ((size_t)(c / 16 * 2 * bits + at.word) * 16 + (size_t)(c % 16)) * 4 + (size_t)at.byte;
}

static void make_levels(float out[LEVELS], const int8_t level[LEVELS]) {
    for (int i = 0; i < LEVELS; i++) out[i] = KVQ_LEVEL_UNIT * (float)level[i];
}

static void encode(uint8_t *block, const uint16_t *rows, int d, const int8_t levels[LEVELS],
                   int bits) {
    const int lanes = d % LANES ? KVQ_D_UNIT : LANES; /* channels side by side */
    float scale[KVQ_BLOCK], inverse[KVQ_BLOCK], level[LEVELS];
    float xy[KVQ_BLOCK] = {0}, yy[KVQ_BLOCK] = {0};
    uint8_t *const words = block + KVQ_T_HEADER;
    memset(block, 0, KVQ_T_HEADER + 8 * (size_t)bits * (size_t)d);
    make_levels(level, levels);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        float power = 0;
        for (int c = 0; c < d; c++) {
            const float x = kvq_f16_to_f32(rows[t * d + c]);
            power += x * x;
        }
        scale[t] = sqrtf(power / (float)d);
        inverse[t] = kvq_inverse_or_zero(scale[t]);
    }
    for (int first = 0; first < d; first += lanes) {
        float z[KVQ_BLOCK][LANES]; /* in the order of the stream, as code */
        uint8_t code[KVQ_BLOCK][LANES];
        int window[LANES] = {0};
        for (int p = 0; p < KVQ_BLOCK; p++) {
            const int t = place_of(p, bits).token;
            for (int i = 0; i < lanes; i++) {
                z[p][i] = kvq_f16_to_f32(rows[t * d + first + i]) * inverse[t];
            }
        }
        find_path(code, z, level, bits, lanes);
        for (int p = 0; p < KVQ_BLOCK; p++) {
            const place at = place_of(p, bits);
            for (int i = 0; i < lanes; i++) {
                window[i] = next_window(window[i], code[p][i], bits);
                const float y = level[window[i]];
                xy[at.token] += z[p][i] * y;
                yy[at.token] += y * y;
                words[byte_at(at, first + i, bits)] |= (uint8_t)(code[p][i] << at.shift);
            }
        }
    }
    for (int t = 0; t < KVQ_BLOCK; t++) { /* the scale that fits the levels chosen, stretched */
        const float stretch = kvq_stretch((float)d, xy[t], yy[t], KVQ_STRETCH_VALUES);
        scale[t] = yy[t] > 0 ? fmaxf(scale[t] * (xy[t] / yy[t]) * stretch, 0.0f) : 0.0f;
    }
    kvq_store_scales(block, block + 4, scale, KVQ_BLOCK);
}

static void decode(float *x, const uint8_t *block, int d, const int8_t level[LEVELS], int bits) {
    const float unit = kvq_load_f16(block) * KVQ_LEVEL_UNIT;
    const uint8_t *const words = block + KVQ_T_HEADER;
    for (int c = 0; c < d; c++) {
        int window = 0;
        for (int p = 0; p < KVQ_BLOCK; p++) {
            const place at = place_of(p, bits);
            const int code = words[byte_at(at, c, bits)] >> at.shift & ((1 << bits) - 1);
            window = next_window(window, code, bits);
            x[at.token * d + c] = unit * (float)block[4 + at.token] * (float)level[window];
        }
    }
}

#define TRELLIS_CODEC(NAME, BITS)                                                                  \
    void kvq_encode_##NAME(uint8_t *block, const uint16_t *rows, const kvq_kv_shape *sh) {         \
        encode(block, rows, sh->d, kvq_##NAME##_level, BITS);                                      \
    }                                                                                              \
    void kvq_decode_##NAME(float *x, const uint8_t *block, const kvq_kv_shape *sh) {               \
        decode(x, block, sh->d, kvq_##NAME##_level, BITS);                                         \
    }
TRELLIS_CODEC(t1, 1)
TRELLIS_CODEC(t2, 2)
