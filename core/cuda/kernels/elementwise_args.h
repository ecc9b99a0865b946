/* elementwise_args.h: what the operations between the products take; C11 for the host, C++14 for
 * the device. Pointers are addresses on the device; n is the number of tokens of the pass.
 */
#ifndef KVQ_CUDA_ELEMENTWISE_ARGS_H
#define KVQ_CUDA_ELEMENTWISE_ARGS_H

#include <stdint.h>

enum { KVQ_ELEMENTWISE_THREADS = 256 };

/* y[t][i] = x[t][i] * w[i] / sqrt(mean(x[t]^2) + epsilon). Blocks: n. */
typedef struct kvq_cuda_norm_args {
    const float *x, *w; /* [n][d_model], [d_model] */
    float *y;           /* [n][d_model] */
    float epsilon;
    int32_t n, d_model;
} kvq_cuda_norm_args;

/* Rotates pairs of channels of q and k in place, as kvq_rope_rotate of ops.h. Blocks:
 * (ceil((n_heads + n_kv_heads) * d_rope / 2 / KVQ_ELEMENTWISE_THREADS), n). */
typedef struct kvq_cuda_rotate_args {
    float *q, *k;         /* [n][n_heads][d_head], [n][n_kv_heads][d_head] */
    const float *cos_sin; /* [n][d_rope / 2][2] */
    int32_t n, n_heads, n_kv_heads, d_head, d_rope, neox;
} kvq_cuda_rotate_args;

/* gate = silu(gate) * up. Blocks: (ceil(d_ff / KVQ_ELEMENTWISE_THREADS), n). */
typedef struct kvq_cuda_gate_args {
    float *gate;     /* [n][d_ff] */
    const float *up; /* [n][d_ff] */
    int32_t n, d_ff;
} kvq_cuda_gate_args;

#endif
