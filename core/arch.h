/* arch.h: a model as data: the configuration read from metadata, and every tensor bound to a name.
 *
 * A new architecture is a row of arch.def; a new tensor a row of tensors.def. What the core does
 * not implement (an architecture, a tensor, a metadata value) is an error at open that names it,
 * since silence would give wrong text. Called by session.c; read by forward.c.
 */
#ifndef KVQ_ARCH_H
#define KVQ_ARCH_H

#include "gguf.h"
#include "weights.h"

typedef enum kvq_rope_kind {
    KVQ_ROPE_INTERLEAVED, /* pairs (2i, 2i + 1) */
    KVQ_ROPE_NEOX         /* pairs (i, i + d_rope / 2) */
} kvq_rope_kind;

typedef struct kvq_config {
    const char *architecture;
    kvq_rope_kind rope;
    bool qkv_bias; /* q, k and v must have biases */
    uint32_t n_layers, n_heads, n_kv_heads, d_model, d_head, d_ff, n_vocab, n_ctx_train;
    uint32_t d_rope; /* first channels of a head that are rotated */
    float rope_base;
    float rope_scale; /* positions are divided by it (linear scaling) */
    float norm_epsilon;
} kvq_config;

typedef struct kvq_tensor { /* data NULL: absent */
    const uint8_t *data;
    kvq_weight_kind kind;
    uint32_t rows, cols;
    size_t row_bytes;
} kvq_tensor;

/* The numbers of a tensor with 1 row, which are F32 and aligned. */
static inline const float *kvq_tensor_vector(const kvq_tensor *tensor) {
    return (const float *)(const void *)tensor->data;
}

typedef struct kvq_layer {
#define KVQ_LAYER_TENSOR(MEMBER, NAME, COLS, ROWS, NEED) kvq_tensor MEMBER;
#include "tensors.def"
#undef KVQ_LAYER_TENSOR
} kvq_layer;

struct kvq_model {
    kvq_gguf *file;
    bool is_cut; /* the file may lack weights: nothing may read them */
    kvq_config config;
    uint64_t n_params, bytes_weights;
#define KVQ_MODEL_TENSOR(MEMBER, NAME, COLS, ROWS, NEED) kvq_tensor MEMBER;
#include "tensors.def"
#undef KVQ_MODEL_TENSOR
    kvq_layer *layers;                  /* [n_layers] */
    struct kvq_cuda_weights **uploaded; /* head of a list (cuda/cuda_weights.h) */
};

/* Fills everything but `file`, which must be set; allocates `layers`. */
kvq_status kvq_arch_bind(kvq_model *model);

#endif
