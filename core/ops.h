/* ops.h: the small operations between products: norm and RoPE. Plain C; each works on one token. */
#ifndef KVQ_OPS_H
#define KVQ_OPS_H

#include "base.h"

/* y[i] = x[i] * w[i] / sqrt(mean(x^2) + epsilon) */
void kvq_rms_norm(float *y, const float *x, const float *w, size_t n, float epsilon);

/* The channels that RoPE turns as pair i: 2i and 2i + 1, or with `neox` i and i + d_rope / 2. */
static inline int kvq_rope_first(int i, bool neox) { return neox ? i : 2 * i; }
static inline int kvq_rope_second(int i, int d_rope, bool neox) {
    return neox ? i + d_rope / 2 : 2 * i + 1;
}

/* The angle of pair i per scaled position: base^(-2i / d_rope) / factors[i]; factors NULL: all 1
 * (Llama 3.1 ships them as a tensor). */
double kvq_rope_frequency(int i, int d_rope, float base, const float *factors);

/* Cosines and sines of position / scale * kvq_rope_frequency, interleaved [d_rope / 2][2]. */
void kvq_rope_angles(float *cos_sin, int position, int d_rope, float base, float scale,
                     const float *factors);

/* Rotates the pairs of each of n_heads heads, in place. Source: RoFormer, arXiv 2104.09864,
 * eq. 34. */
void kvq_rope_rotate(float *x, int n_heads, int d_head, const float *cos_sin, int d_rope,
                     bool neox);

#endif
