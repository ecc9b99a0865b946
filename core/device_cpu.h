/* device_cpu.h: the CPU as a device: products, attention and the operations between them, shared
 * out to the threads of a pool.
 *
 * Owns the buffers of a pass. Knows no instruction set's name. Called by forward.c through
 * device.h; made by session.c.
 */
#ifndef KVQ_DEVICE_CPU_H
#define KVQ_DEVICE_CPU_H

#include "device.h"
#include "kv/kv_attend.h"

typedef struct kvq_cpu {
    kvq_device device; /* the first member */
    const kvq_isa *isa;
    kvq_pool *pool;
    kvq_attention attention;
    kvq_clock clock;
    int n_batch;
    kvq_span span;              /* of the pass */
    int embedded_at;            /* position of its first token */
    float *buffer[KVQ_BUFFERS]; /* those of n_batch tokens; LOGITS: the span's */
    float *delta;               /* [n_batch][d_model] a product that is added to another buffer */
    float *cos_sin;             /* [n_batch][d_rope] */
    kvq_activations acts;       /* buffers for the widest input */
    kvq_simulator simulator;    /* NULL: none */
    void *simulator_user;
    float *simulated; /* [n_kv_heads][KVQ_BLOCK][d_head], while there is a simulator */
} kvq_cpu;

/* Lays out the buffers of a pass; device.model and n_batch must be set. */
void kvq_cpu_lay_out(kvq_cpu *cpu, kvq_arena *arena);

/* Makes the device usable, once its parts are set. */
void kvq_cpu_init(kvq_cpu *cpu);

/* X[t] = the embedding of tokens[t], and the angles of RoPE of positions held + t. */
void kvq_cpu_embed(kvq_cpu *cpu, const int32_t *tokens, int n, int held);

/* Lets the simulator change what sealed blocks first .. end - 1 of a layer hold, as plain halves.
 */
void kvq_cpu_simulate(const kvq_cpu *cpu, int layer, int first, int end);

#endif
