/* kv_wave.h: the part of a head's keys that RoPE makes a sum of sinusoids.
 *
 * A constant mu of the keys before RoPE (in Qwen2 the key bias, elsewhere their mean) becomes R_t
 * mu at position t: an oscillation that no mean of a block removes where a pair turns fast, and
 * which would take up the levels of the codes. So it is subtracted from a key when its block is
 * sealed, and given back to the scores: with R_t mu = cos(a t) u + sin(a t) w for each pair of
 * channels,
 *
 *     q . R_t mu = sum over pairs of (q . u) cos(a t) + (q . w) sin(a t)
 *
 * which takes two products with each query, a turn of the pair per block, and two multiply-adds per
 * pair, token and query. Kept for the few pairs of a head where it matters most (pykvq/moments.py).
 * Knows no codec and no scheme. Called by kv_ring.c and kv_attend.c.
 */
#ifndef KVQ_KV_WAVE_H
#define KVQ_KV_WAVE_H

#include "kv/kv_format.h"

enum { KVQ_WAVE_FACTORS = 2 * KVQ_WAVES }; /* of a query, at most */

/* Of one KV head, in the coordinates of its keys' basis. */
typedef struct kvq_wave {
    int n;                /* pairs; 0: none */
    const uint16_t *pair; /* [n] which of the head's d_rope / 2 pairs */
    const float *u, *w;   /* [n][d] */
} kvq_wave;

/* cos and sin of the angles by which RoPE turns the pairs; the same for all layers. */
typedef struct kvq_turns {
    int n_pairs;
    float *within; /* [n_pairs][2][KVQ_BLOCK] at positions 0 .. 63 */
    float *first;  /* [max_blocks][n_pairs][2] at the first token of each block */
} kvq_turns;

/* x[KVQ_BLOCK][d] += sign * what the wave has at the tokens of a block. */
void kvq_wave_add(float *x, const kvq_wave *wave, const kvq_turns *turns, int block, float sign,
                  int d);

/* What a query has of each pair: wave->n factors of cosines and behind them as many of sines, in a
 * row of KVQ_WAVE_FACTORS. (Kernels of CUDA have them in turns.) */

/* on: the products of one query, in the keys' basis, with u and with w. */
void kvq_wave_project(float *on, const kvq_wave *wave, const float *query, int d);

/* turned: the factors of n queries for positions within a block, from those `on`. */
void kvq_wave_turn(float *turned, const float *on, int n, const kvq_wave *wave,
                   const kvq_turns *turns, int block);

/* cos (0) or sin (1) of a pair at positions 0 .. 63. */
static inline const float *kvq_wave_within(const kvq_turns *turns, int pair, int which) {
    return turns->within + ((size_t)pair * 2 + (size_t)which) * KVQ_BLOCK;
}

/* The same of what factor i of a query stands before. */
static inline const float *kvq_wave_of_factor(const kvq_turns *turns, const kvq_wave *wave, int i) {
    return kvq_wave_within(turns, wave->pair[i % wave->n], i / wave->n);
}

/* s[n][KVQ_BLOCK] += sum over j of factor[i][j] * wave[j][t], for n_waves waves and n rows of
 * KVQ_WAVE_FACTORS. */
typedef void kvq_add_waves_fn(float *s, const float *factor, int n, const float *const *wave,
                              int n_waves);
kvq_add_waves_fn kvq_add_waves_reference;

#endif
