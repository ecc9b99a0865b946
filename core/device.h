/* device.h: what a pass runs on, as forward.c sees it: the steps of a layer, on buffers that each
 * device keeps where it likes.
 *
 * A step may return before it is done; `finish` waits, and says what failed. Buffers
 * that products read (NORMED, HEADS, GATE) are left ready for them by the step that writes them.
 * Implemented by device_cpu.c and cuda/cuda_device.c; called by forward.c.
 */
#ifndef KVQ_DEVICE_H
#define KVQ_DEVICE_H

#include "arch.h"
#include "kv/kv_ring.h"

typedef enum kvq_buffer {
    KVQ_BUFFER_X,      /* [n][d_model] the residual stream */
    KVQ_BUFFER_NORMED, /* [n][d_model] */
    KVQ_BUFFER_Q,      /* [n][n_heads][d_head] */
    KVQ_BUFFER_K,      /* [n][n_kv_heads][d_head] */
    KVQ_BUFFER_V,      /* the same */
    KVQ_BUFFER_HEADS,  /* [n][n_heads][d_head] what attention gives */
    KVQ_BUFFER_GATE,   /* [n][d_ff] */
    KVQ_BUFFER_UP,     /* the same */
    KVQ_BUFFER_LOGITS, /* [n][n_vocab] */
    KVQ_BUFFERS
} kvq_buffer;

/* Numbers of a buffer per token. */
static inline size_t kvq_buffer_width(const kvq_config *c, kvq_buffer buffer) {
    switch (buffer) {
    case KVQ_BUFFER_X:
    case KVQ_BUFFER_NORMED:
        return c->d_model;
    case KVQ_BUFFER_Q:
    case KVQ_BUFFER_HEADS:
        return (size_t)c->n_heads * c->d_head;
    case KVQ_BUFFER_K:
    case KVQ_BUFFER_V:
        return (size_t)c->n_kv_heads * c->d_head;
    case KVQ_BUFFER_GATE:
    case KVQ_BUFFER_UP:
        return c->d_ff;
    default:
        return c->n_vocab;
    }
}

/* y[t] = w . x[t] + bias, or y[t] += that. */
typedef struct kvq_product {
    kvq_buffer y;
    const kvq_tensor *w;
    const kvq_tensor *bias; /* NULL or absent: none */
    bool add;
} kvq_product;

/* The tokens that go through the layers together. */
typedef struct kvq_span {
    int n;                /* tokens */
    int held;             /* tokens in the cache before them: the position of the first */
    const float *cos_sin; /* [n][d_rope] of their positions, in memory of the host */
    float *logits;        /* where LOGITS go in the end, in memory of the host; NULL: not wanted */
    bool is_watched;      /* buffers will be read before the last step */
} kvq_span;

typedef struct kvq_device kvq_device;

typedef struct kvq_device_ops {
    /* Makes room for so many sealed blocks. Where it fails nothing has changed. A device on which
     * a step has failed before says that, whatever the number. */
    kvq_status (*reserve)(kvq_device *device, int n_blocks);
    /* A span comes, whose residual stream is x[n][d_model], in memory of the host. */
    void (*begin)(kvq_device *device, const kvq_span *span, const float *x);
    /* NORMED[t] = norm of X[first + t], for n tokens */
    void (*norm)(kvq_device *device, const kvq_tensor *weight, int first, int n);
    /* Up to three products of one input, of n tokens. */
    void (*multiply)(kvq_device *device, kvq_buffer x, const kvq_product *list, int count, int n);
    void (*rotate)(kvq_device *device); /* Q and K by RoPE */
    /* HEADS = attention of Q over a layer's cache and over K and V, which then join the cache; the
     * ring's numbers move on. */
    void (*attend)(kvq_device *device, int layer);
    void (*gate)(kvq_device *device); /* GATE = silu(GATE) * UP */
    /* Waits until what was asked for before is done, and copies the first n numbers of a buffer to
     * memory of the host. False: it could not, since a step has failed, which `finish` tells. */
    bool (*read)(kvq_device *device, kvq_buffer buffer, float *out, size_t n);
    /* Waits until all is done, logits included, if there were any. */
    kvq_status (*finish)(kvq_device *device);

    /* The cache of one of its layers. What kv_ring.h says of the functions of these names. */
    void (*truncate)(kvq_device *device, int layer, int n);
    void (*seal)(kvq_device *device, int layer, int n_sealed);
    void (*repeat)(kvq_device *device, int layer, int n);
    /* The bytes of a sealed block; what is written to them counts for the next pass. Valid until
     * the next call for this device. */
    uint8_t *(*block)(kvq_device *device, int layer, int head, int side, int block);
} kvq_device_ops;

struct kvq_device {
    const kvq_device_ops *ops;
    const kvq_model *model;
    kvq_ring *rings; /* [n_layers] of the model; a device touches those of its own layers */
};

#endif
