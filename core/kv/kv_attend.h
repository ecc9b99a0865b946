/* kv_attend.h: causal attention of a pass's new tokens over one layer's ring, and over themselves.
 *
 * The cache is never expanded: scores are taken on the codes of sealed blocks, values are summed
 * from them. Softmax is online, a few blocks at a time. Owns the scratch it works in; knows no
 * layer and no model. Called by device_cpu.c.
 */
#ifndef KVQ_KV_ATTEND_H
#define KVQ_KV_ATTEND_H

#include <stdatomic.h>

#include "clock.h"
#include "isa/isa.h"
#include "kv/kv_ring.h"
#include "pool.h"

typedef struct kvq_attention {
    const kvq_isa *isa;
    kvq_pool *pool;
    kvq_clock *clock; /* counts the time of attention and of the append that follows; may be NULL */
    int n_heads, n_kv_heads, group; /* group: query heads per KV head */
    int d_head, d;                  /* width in the model, and padded */
    int n_batch;
    int top_blocks;     /* sealed blocks that a token decoded alone reads, per KV head; 0: all */
    int tile;           /* tokens whose queries are worked on together */
    int segment_blocks; /* sealed blocks per unit of parallel work */
    int max_segments;

    float *q;      /* [n_kv_heads][n_batch][group][d], in the basis, times log2(e) / sqrt(d_head) */
    int16_t *q16;  /* the same in 16 bits (kvq_query), in units of q_unit */
    float *q_unit; /* [n_kv_heads][n_batch][group] */
    float *sink_score;         /* [n_kv_heads][n_batch][group] the largest of a query with a sink */
    uint16_t *rows[KVQ_SIDES]; /* [n_kv_heads][n_batch][d] keys and values of the new tokens */
    float *partial;            /* [n_kv_heads][max_segments][tile * group][d + 2], padded */
    atomic_int *parts_left;    /* [n_kv_heads] segments of a single tile that are still to be
                                  attended */
    float *estimate;           /* [n_kv_heads][2][max_blocks] with top_blocks */
    int *chosen;               /* [n_kv_heads][max_blocks] the same */
    float *worker;             /* [n_threads] scratch of each */
} kvq_attention;

/* Sets the shape and lays out the scratch memory; isa, pool, clock and, before the call, top_blocks
 * are the caller's to set. */
void kvq_attention_lay_out(kvq_attention *a, kvq_arena *arena, const kvq_ring *ring, int n_heads,
                           int d_head, int n_batch, int n_threads);

/* out[t][n_heads][d_head] = attention of n <= n_batch new tokens, whose queries
 * q[t][n_heads][d_head], keys and values k, v[t][n_kv_heads][d_head] are given (after RoPE); then
 * appends them to the ring. */
void kvq_attend(kvq_attention *a, kvq_ring *ring, float *out, const float *q, const float *k,
                const float *v, int n);

#endif
