/* ops.h: the small operations between products: norm and RoPE. Plain C; each works on one token. */
#ifndef KVQ_OPS_H
#define KVQ_OPS_H

#include "base.h"

/* y[i] = x[i] * w[i] / sqrt(mean(x^2) + epsilon) */
void kvq_rms_norm(float *y, const float *x, const float *w, size_t n, float epsilon);

/* Cosines and sines of position / scale * base^(-2i / d_rope) / factor[i], interleaved [d_rope /
 * 2][2]; factors NULL: all 1 (Llama 3.1 ships them as a tensor). */
void kvq_rope_angles(float *cos_sin, int position, int d_rope, float base, float scale,
                     const float *factors);

/* Rotates the first d_rope channels of each of n_heads heads, in place: pairs (2i, 2i + 1), or with
 * `neox` (i, i + d_rope / 2). Source: RoFormer, arXiv 2104.09864, eq. 34. */
void kvq_rope_rotate(float *x, int n_heads, int d_head, const float *cos_sin, int d_rope,
                     bool neox);

#endif
