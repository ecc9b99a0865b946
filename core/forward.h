/* forward.h: tokens through the layers, on the CPU.
 *
 * Owns the buffers of one pass. Knows no architecture's name, no codec and no instruction set's
 * name: it asks the data (is there a bias? how are pairs rotated?). Called by session.c.
 */
#ifndef KVQ_FORWARD_H
#define KVQ_FORWARD_H

#include <stdatomic.h>

#include "arch.h"
#include "kv/kv_attend.h"

typedef struct kvq_forward {
    const kvq_model *model;
    const kvq_isa *isa;
    kvq_pool *pool;
    kvq_attention attention;
    kvq_clock clock;
    kvq_ring *rings; /* [n_layers] */
    int n_batch;
    float *x;      /* [n_batch][d_model] the residual stream */
    float *normed; /* [n_batch][d_model] */
    float *q, *k, *v,
        *heads;            /* [n_batch][n_heads or n_kv_heads][d_head]; heads: attention's output */
    float *gate, *up;      /* [n_batch][d_ff] */
    float *delta;          /* [n_batch][d_model] what a layer's half adds to x */
    float *cos_sin;        /* [n_batch][d_rope] */
    kvq_activations acts;  /* buffers for the widest input */
    kvq_observer observer; /* NULL: none */
    kvq_simulator simulator;
    void *observer_user, *simulator_user;
    float *simulated; /* [n_kv_heads][KVQ_BLOCK][d_head], while there is a simulator */
} kvq_forward;

/* Lays out the buffers of a pass; model and n_batch must be set. */
void kvq_forward_lay_out(kvq_forward *f, kvq_arena *arena);

/* Runs tokens[n], n <= n_batch, from position rings[0].n on; every token must be in the vocabulary.
 * Between layers it reads *cancelled and calls `progress`; if either says stop, it returns false
 * and leaves the rings as they are, some a pass ahead of others. */
typedef struct kvq_pass {
    const int32_t *tokens;
    int n;
    kvq_logits which;
    float *logits; /* [n_vocab], or [n][n_vocab] */
    const atomic_int *cancelled;
    kvq_progress progress; /* may be NULL */
    void *user;
    int n_done, n_total; /* for progress */
} kvq_pass;
bool kvq_forward_run(kvq_forward *f, const kvq_pass *pass);

/* Lets the simulator change what sealed blocks first .. end - 1 of a layer hold, as plain halves.
 */
void kvq_forward_simulate(const kvq_forward *f, int layer, int first, int end);

#endif
