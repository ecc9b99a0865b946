/* kv_codec_trellis.c: t1 and t2, trellis-coded values.
 *
 * A code of 1 or 2 bits and the bits before it choose one of 16 levels, so neighbouring levels can
 * be told apart by the past: the mean square error on normal data is 0.313 and 0.096, against 0.363
 * and 0.118 of the best quantizers without memory (Marcellin and Fischer, IEEE Trans. Comm. 38(1),
 * 1990; a window of stream bits as the state: QTIP, arXiv 2406.11235). Decoding stays one shift and
 * one look-up per value; only the encoder searches.
 */
#include "kv/kv_codec_parts.h"

const int8_t kvq_t1_level[16] = {KVQ_T1_LEVELS}, kvq_t2_level[16] = {KVQ_T2_LEVELS};

enum { LEVELS = 16, MOST_STATES = 8, MOST_WORDS = 4 };

typedef float t_rows[KVQ_BLOCK][KVQ_D_MAX];

/* The paths of least error (Viterbi's algorithm) for four channels side by side, z[p][4] of them in
 * the order of the stream: their words, and the levels y[p][4] that they use. z is in units of the
 * scale of its token, so that errors count relative to the size of their token: small values are
 * often those that attention looks at most. (Counting them by size tripled the divergence.)
 *
 * A window is its old state in the low bits and the new code above them: windows s * branches + b
 * lead to state s. The cost of a window is (z - level)^2 without the part z^2 that all share. */
static inline __attribute__((always_inline)) void find_paths(uint32_t words[MOST_WORDS][4],
                                                             float *y, const float *z,
                                                             const float level[LEVELS], int bits) {
    const int states = LEVELS >> bits, branches = 1 << bits;
    const int codes = 32 / bits; /* of a word */
    kvq_four cost[MOST_STATES];
    int32_t from[KVQ_BLOCK][4]; /* the branches that led to each state, `bits` bits each */
    for (int s = 0; s < states; s++) cost[s] = (kvq_four){0} + (s ? 1e30f : 0.0f);
    for (int p = 0; p < KVQ_BLOCK; p++) {
        const kvq_four zp = kvq_load_four(z + 4 * p);
        kvq_four next[MOST_STATES];
        kvq_four_ints branch = {0};
        _Pragma("GCC unroll 8") for (int s = 0; s < states; s++) {
            kvq_four_ints best = {0};
            _Pragma("GCC unroll 4") for (int b = 0; b < branches; b++) {
                const int window = s * branches + b;
                const float l = level[window];
                const kvq_four c = cost[window % states] + (l * l + -2.0f * l * zp);
                if (b == 0) {
                    next[s] = c;
                } else {
                    const kvq_four_ints lower = c < next[s];
                    best = kvq_where_ints(lower, b - (kvq_four_ints){0}, best);
                    next[s] = kvq_where(lower, c, next[s]);
                }
            }
            branch |= best << (s * bits);
        }
        memcpy(from[p], &branch, sizeof branch);
        memcpy(cost, next, (size_t)states * sizeof *next);
    }
    for (int i = 0; i < 4; i++) {
        int state = 0;
        for (int s = 1; s < states; s++) state = cost[s][i] < cost[state][i] ? s : state;
        for (int w = KVQ_BLOCK / codes - 1; w >= 0; w--) {
            uint32_t word = 0;
            for (int p = (w + 1) * codes - 1; p >= w * codes; p--) {
                const int window =
                    state * branches + (from[p][i] >> (state * bits) & (branches - 1));
                word = word << bits | (uint32_t)(window >> (4 - bits));
                y[4 * p + i] = level[window];
                state = window % states;
            }
            words[w][i] = word;
        }
    }
}

/* The next window of a stream of codes, given the window before. */
static int next_window(int window, int code, int bits) {
    return window >> bits | code << (4 - bits);
}

static void make_levels(float out[LEVELS], const int8_t level[LEVELS]) {
    for (int i = 0; i < LEVELS; i++) out[i] = KVQ_LEVEL_UNIT * (float)level[i];
}

static inline __attribute__((always_inline)) void encode(uint8_t *block, const uint16_t *rows,
                                                         int d, const int8_t levels[LEVELS],
                                                         int bits) {
    float scale[KVQ_BLOCK], inverse[KVQ_BLOCK], level[LEVELS];
    float xy[KVQ_BLOCK] = {0}, yy[KVQ_BLOCK] = {0};
    t_rows x;
    memset(block, 0, KVQ_T_HEADER + 8 * (size_t)bits * (size_t)d);
    make_levels(level, levels);
    for (int t = 0; t < KVQ_BLOCK; t++) {
        float power = 0;
        kvq_halves_to_f32(x[t], rows + t * d, d);
        for (int c = 0; c < d; c++) power += x[t][c] * x[t][c];
        scale[t] = sqrtf(power / (float)d);
        inverse[t] = kvq_inverse_or_zero(scale[t]);
    }
    for (int c = 0; c < d; c += 4) {
        float z[KVQ_BLOCK * 4], y[KVQ_BLOCK * 4]; /* in the order of the stream */
        uint32_t words[MOST_WORDS][4];
        for (int p = 0; p < KVQ_BLOCK; p++) {
            const int t = kvq_t_token(p, bits);
            kvq_store_four(z + 4 * p, kvq_load_four(x[t] + c) * inverse[t]);
        }
        find_paths(words, y, z, level, bits);
        for (int p = 0; p < KVQ_BLOCK; p++) {
            const int t = kvq_t_token(p, bits);
            for (int i = 4 * p; i < 4 * p + 4; i++) {
                xy[t] += z[i] * y[i];
                yy[t] += y[i] * y[i];
            }
        }
        for (int w = 0; w < 2 * bits; w++) {
            memcpy(block + KVQ_T_HEADER + kvq_t_words_at(c, bits) + 64 * w, words[w],
                   sizeof words[w]);
        }
    }
    for (int t = 0; t < KVQ_BLOCK; t++) { /* the scale that fits the levels chosen, stretched */
        const float stretch = kvq_stretch((float)d, xy[t], yy[t], KVQ_STRETCH_VALUES);
        scale[t] = yy[t] > 0 ? fmaxf(scale[t] * (xy[t] / yy[t]) * stretch, 0.0f) : 0.0f;
    }
    kvq_store_scales(block, block + 4, scale, KVQ_BLOCK);
}

static void decode(float *x, const uint8_t *block, int d, const int8_t level[LEVELS], int bits) {
    const int codes = 32 / bits; /* of a word */
    const float unit = kvq_load_f16(block) * KVQ_LEVEL_UNIT;
    for (int c = 0; c < d; c++) {
        const uint8_t *const words = block + KVQ_T_HEADER + kvq_t_words_at(c, bits);
        int window = 0;
        for (int p = 0; p < KVQ_BLOCK; p++) {
            const int t = kvq_t_token(p, bits);
            const uint32_t word = kvq_load_u32(words + 64 * (p / codes));
            const int code = (int)(word >> p % codes * bits) & ((1 << bits) - 1);
            window = next_window(window, code, bits);
            x[t * d + c] = unit * (float)block[4 + t] * (float)level[window];
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
