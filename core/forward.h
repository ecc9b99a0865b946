/* forward.h: tokens through the layers, each on its device.
 *
 * Knows no architecture's name, no codec and no device's name: it asks the data (is there a bias?).
 * Called by session.c.
 */
#ifndef KVQ_FORWARD_H
#define KVQ_FORWARD_H

#include <stdatomic.h>

#include "device_cpu.h"

typedef struct kvq_forward {
    const kvq_model *model;
    kvq_ring *rings; /* [n_layers] */
    kvq_cpu cpu;     /* embeds tokens, and has the first layers */
    kvq_device *gpu; /* has the others; NULL: none */
    int n_layers_cpu;
    bool head_on_gpu;
    kvq_observer observer; /* NULL: none */
    void *observer_user;
} kvq_forward;

/* Runs tokens[n], n <= n_batch, from position `held` on; every token must be in the vocabulary.
 * Between layers it reads *cancelled and calls `progress`; if either says stop, the pass returns
 * KVQ_CANCELLED and leaves the rings as they are, some a pass ahead of others. */
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
kvq_status kvq_forward_run(kvq_forward *f, const kvq_pass *pass);

/* Makes room for so many sealed blocks on all devices. */
kvq_status kvq_forward_reserve(kvq_forward *f, int n_blocks);

/* The device that has a layer. */
static inline kvq_device *kvq_device_of(kvq_forward *f, int layer) {
    return layer < f->n_layers_cpu ? &f->cpu.device : f->gpu;
}

#endif
