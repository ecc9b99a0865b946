/* arch.c: metadata + the row of arch.def -> configuration; checks and binds every tensor. */
#include "arch.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- configuration ----------------------------------------------------------------------- */

static const struct {
    const char *name;
    kvq_rope_kind rope;
    bool qkv_bias;
} archs[] = {
#define KVQ_ARCH(NAME, ROPE, QKV_BIAS) {#NAME, ROPE, QKV_BIAS},
#include "arch.def"
#undef KVQ_ARCH
};
enum { N_ARCHS = sizeof archs / sizeof *archs };

/* Keys below "<architecture>." that are read here, or that change nothing. Any other is an error.
 */
static const char *const known_keys[] = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.causal",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scale_linear",
    "vocab_size",
    "expert_count",
    "expert_used_count",
    "tensor_data_layout",
};
enum { N_KNOWN_KEYS = sizeof known_keys / sizeof *known_keys };

static bool equals(const char *text, size_t length, const char *wanted) {
    return strlen(wanted) == length && memcmp(text, wanted, length) == 0;
}

static kvq_status find_architecture(const kvq_gguf *file, kvq_config *c) {
    const char *name = NULL;
    size_t length = 0;
    kvq_status status = kvq_gguf_get_string(file, "general.architecture", &name, &length);
    if (status != KVQ_OK) return status;
    if (!name) {
        return kvq_fail(KVQ_ERR_FORMAT, "metadata key general.architecture is missing");
    }
    char known[128] = "";
    for (int i = 0; i < N_ARCHS; i++) {
        if (equals(name, length, archs[i].name)) {
            c->architecture = archs[i].name;
            c->rope = archs[i].rope;
            c->qkv_bias = archs[i].qkv_bias;
            return KVQ_OK;
        }
        if (i) strncat(known, ", ", sizeof known - strlen(known) - 1);
        strncat(known, archs[i].name, sizeof known - strlen(known) - 1);
    }
    return kvq_fail(KVQ_ERR_UNSUPPORTED,
                    "architecture \"%s\" is not implemented; implemented are: %s",
                    kvq_show(name, length).text, known);
}

static kvq_status refuse_unknown_keys(const kvq_gguf *file, const kvq_config *c) {
    const size_t prefix = strlen(c->architecture);
    for (uint64_t i = 0; i < kvq_gguf_meta_count(file); i++) {
        kvq_meta meta;
        kvq_gguf_meta(file, i, &meta);
        if (meta.key_length <= prefix || memcmp(meta.key, c->architecture, prefix) != 0 ||
            meta.key[prefix] != '.') {
            continue;
        }
        bool known = false;
        for (int k = 0; k < N_KNOWN_KEYS && !known; k++) {
            known = equals(meta.key + prefix + 1, meta.key_length - prefix - 1, known_keys[k]);
        }
        if (!known) {
            return kvq_fail(
                KVQ_ERR_UNSUPPORTED,
                "metadata key %s is not implemented, and without it the text would be wrong",
                kvq_show(meta.key, meta.key_length).text);
        }
    }
    return KVQ_OK;
}

/* Keys of this architecture: "llama." + suffix. */
typedef struct keys {
    const kvq_gguf *file;
    const char *architecture;
    char name[128];
} keys;

static const char *key(keys *k, const char *suffix) {
    snprintf(k->name, sizeof k->name, "%s.%s", k->architecture, suffix);
    return k->name;
}

/* A count between 1 and `most`. */
static kvq_status read_count(keys *k, const char *suffix, uint32_t most, uint32_t *out) {
    kvq_status status = kvq_gguf_get_u32(k->file, key(k, suffix), out);
    if (status == KVQ_OK && (*out < 1 || *out > most)) {
        status = kvq_fail(KVQ_ERR_FORMAT, "metadata key %s is %u or missing, expected 1 to %u",
                          k->name, *out, most);
    }
    return status;
}

static kvq_status read_positive(keys *k, const char *suffix, float *out) {
    kvq_status status = kvq_gguf_get_f32(k->file, key(k, suffix), out);
    if (status == KVQ_OK && !(*out > 0 && *out <= 1e30f)) {
        status =
            kvq_fail(KVQ_ERR_FORMAT, "metadata key %s is %g or missing, expected a positive number",
                     k->name, (double)*out);
    }
    return status;
}

static kvq_status read_rope(keys *k, kvq_config *c) {
    kvq_status status;
    c->rope_base = 10000.0f;
    c->rope_scale = 1.0f;
    c->d_rope = c->d_head;
    if ((status = read_positive(k, "rope.freq_base", &c->rope_base)) != KVQ_OK) return status;
    if ((status = read_count(k, "rope.dimension_count", c->d_head, &c->d_rope)) != KVQ_OK)
        return status;
    if (c->d_rope % 2) {
        return kvq_fail(KVQ_ERR_FORMAT, "metadata key %s is %u, expected an even number",
                        key(k, "rope.dimension_count"), c->d_rope);
    }
    const char *type = "linear"; /* what files that give only a factor mean */
    size_t length = 6;
    status = kvq_gguf_get_string(k->file, key(k, "rope.scaling.type"), &type, &length);
    if (status != KVQ_OK || equals(type, length, "none")) return status;
    if (!equals(type, length, "linear")) {
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "metadata key %s is \"%s\"; implemented are none and linear", k->name,
                        kvq_show(type, length).text);
    }
    status = read_positive(k, "rope.scale_linear", &c->rope_scale); /* files of 2023 */
    return status == KVQ_OK ? read_positive(k, "rope.scaling.factor", &c->rope_scale) : status;
}

/* Values that would change the computation in a way that is not implemented. */
static kvq_status refuse_variants(keys *k, const kvq_config *c) {
    kvq_status status;
    uint32_t experts = 0, sliding = 0;
    bool causal = true;
    if ((status = kvq_gguf_get_u32(k->file, key(k, "expert_count"), &experts)) != KVQ_OK)
        return status;
    if (experts) {
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "metadata key %s is %u: mixtures of experts are not implemented", k->name,
                        experts);
    }
    if ((status = kvq_gguf_get_u32(k->file, key(k, "attention.sliding_window"), &sliding)) !=
        KVQ_OK) {
        return status;
    }
    if (sliding && sliding < c->n_ctx_train) {
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "metadata key %s is %u: sliding-window attention is not implemented",
                        k->name, sliding);
    }
    if ((status = kvq_gguf_get_bool(k->file, key(k, "attention.causal"), &causal)) != KVQ_OK)
        return status;
    if (!causal) {
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "metadata key %s is false: only causal models are implemented", k->name);
    }
    return KVQ_OK;
}

static kvq_status read_config(const kvq_gguf *file, kvq_config *c) {
    enum { MOST = 1 << 20 };
    kvq_status status;
    keys k = {.file = file};
    if ((status = find_architecture(file, c)) != KVQ_OK) return status;
    if ((status = refuse_unknown_keys(file, c)) != KVQ_OK) return status;
    k.architecture = c->architecture;
    if ((status = read_count(&k, "block_count", 4096, &c->n_layers)) != KVQ_OK) return status;
    if ((status = read_count(&k, "context_length", 1 << 30, &c->n_ctx_train)) != KVQ_OK)
        return status;
    if ((status = read_count(&k, "embedding_length", MOST, &c->d_model)) != KVQ_OK) return status;
    if ((status = read_count(&k, "feed_forward_length", MOST, &c->d_ff)) != KVQ_OK) return status;
    if ((status = read_count(&k, "attention.head_count", 4096, &c->n_heads)) != KVQ_OK)
        return status;
    c->n_kv_heads = c->n_heads;
    status = read_count(&k, "attention.head_count_kv", c->n_heads, &c->n_kv_heads);
    if (status != KVQ_OK) return status;
    if (c->n_heads % c->n_kv_heads) {
        return kvq_fail(KVQ_ERR_FORMAT, "metadata: %u heads cannot share %u KV heads evenly",
                        c->n_heads, c->n_kv_heads);
    }
    c->d_head = c->d_model / c->n_heads;
    if ((status = read_count(&k, "attention.key_length", 65536, &c->d_head)) != KVQ_OK)
        return status;
    uint32_t d_value = c->d_head;
    if ((status = read_count(&k, "attention.value_length", 65536, &d_value)) != KVQ_OK)
        return status;
    if (d_value != c->d_head || c->d_head % 2) {
        return kvq_fail(
            KVQ_ERR_UNSUPPORTED,
            "metadata: heads are %u wide for keys and %u for values; implemented are equal, "
            "even widths",
            c->d_head, d_value);
    }
    status = read_positive(&k, "attention.layer_norm_rms_epsilon", &c->norm_epsilon);
    if (status != KVQ_OK) return status;
    if ((status = read_rope(&k, c)) != KVQ_OK) return status;
    return refuse_variants(&k, c);
}

/* ---- tensors ----------------------------------------------------------------------------- */

typedef enum need { REQUIRED, OPTIONAL, QKV_BIAS } need;

/* A row of tensors.def for one configuration. */
typedef struct slot {
    const char *name;
    size_t offset; /* of the member in kvq_model or kvq_layer */
    uint32_t cols, rows;
    need need;
} slot;

enum {
    N_MODEL_SLOTS = 0
#define KVQ_MODEL_TENSOR(MEMBER, NAME, COLS, ROWS, NEED) +1
#include "tensors.def"
#undef KVQ_MODEL_TENSOR
    ,
    N_LAYER_SLOTS = 0
#define KVQ_LAYER_TENSOR(MEMBER, NAME, COLS, ROWS, NEED) +1
#include "tensors.def"
#undef KVQ_LAYER_TENSOR
};

enum { MIN_LAYER_TENSORS = 9 }; /* the REQUIRED rows of a layer */
_Static_assert(sizeof(kvq_layer) <= MIN_LAYER_TENSORS * 51, "see kvq_arch_bind");

static void make_slots(const kvq_config *c, slot *of_model, slot *of_layer) {
#define KVQ_MODEL_TENSOR(MEMBER, NAME, COLS, ROWS, NEED)                                           \
    *of_model++ = (slot){NAME, offsetof(kvq_model, MEMBER), COLS, ROWS, NEED};
#define KVQ_LAYER_TENSOR(MEMBER, NAME, COLS, ROWS, NEED)                                           \
    *of_layer++ = (slot){NAME, offsetof(kvq_layer, MEMBER), COLS, ROWS, NEED};
#include "tensors.def"
#undef KVQ_MODEL_TENSOR
#undef KVQ_LAYER_TENSOR
}

static kvq_tensor *member(void *owner, const slot *s) {
    return (kvq_tensor *)(void *)((uint8_t *)owner + s->offset);
}

/* "blk.12.attn_q.weight" -> layer 12, "attn_q.weight"; false if it has no such form. */
static bool split_layer_name(const kvq_gguf_tensor *t, uint32_t *layer, const char **rest,
                             size_t *length) {
    size_t i = 4;
    if (t->name_length < 7 || memcmp(t->name, "blk.", 4) != 0) return false;
    for (*layer = 0; i < t->name_length && t->name[i] >= '0' && t->name[i] <= '9' && i < 10; i++) {
        *layer = *layer * 10 + (uint32_t)(t->name[i] - '0');
    }
    if (i == 4 || i >= t->name_length || t->name[i] != '.' || (t->name[4] == '0' && i > 5))
        return false;
    *rest = t->name + i + 1;
    *length = t->name_length - i - 1;
    return true;
}

static kvq_status bind_tensor(kvq_tensor *out, const slot *s, const kvq_gguf_tensor *t) {
    const kvq_shown name = kvq_show(t->name, t->name_length);
    const char *type = "unknown";
    uint32_t block, bytes;
    kvq_ggml_type_size(t->type, &type, &block, &bytes);
    if (t->n_dims > 2 || t->shape[0] != s->cols || t->shape[1] != s->rows) {
        return kvq_fail(KVQ_ERR_FORMAT, "tensor %s: shape %llux%llu, expected %ux%u", name.text,
                        (unsigned long long)t->shape[0], (unsigned long long)t->shape[1], s->cols,
                        s->rows);
    }
    const int kind = kvq_weight_find(t->type);
    if (kind < 0 || (s->rows == 1 && kind != KVQ_WEIGHT_F32)) {
        return kvq_fail(KVQ_ERR_UNSUPPORTED, "tensor %s: type %s is not implemented%s", name.text,
                        type, s->rows == 1 ? " for vectors, expected F32" : "");
    }
    const kvq_weight_format *const format = &kvq_weight_formats[kind];
    *out = (kvq_tensor){.data = t->data,
                        .kind = (kvq_weight_kind)kind,
                        .rows = s->rows,
                        .cols = s->cols,
                        .row_bytes = (size_t)s->cols / format->block * format->bytes};
    return KVQ_OK;
}

static const slot *find_slot(const slot *slots, int n, const char *name, size_t length) {
    for (int i = 0; i < n; i++) {
        if (equals(name, length, slots[i].name)) return &slots[i];
    }
    return NULL;
}

static kvq_status check_present(void *owner, const slot *slots, int n, bool qkv_bias,
                                const char *prefix) {
    for (int i = 0; i < n; i++) {
        const bool required = slots[i].need == REQUIRED || (slots[i].need == QKV_BIAS && qkv_bias);
        if (required && !member(owner, &slots[i])->data) {
            return kvq_fail(KVQ_ERR_FORMAT, "tensor %s%s is missing", prefix, slots[i].name);
        }
    }
    return KVQ_OK;
}

kvq_status kvq_arch_bind(kvq_model *model) {
    kvq_config *const c = &model->config;
    kvq_status status = read_config(model->file, c);
    if (status != KVQ_OK) return status;

    kvq_gguf_tensor t;
    const uint64_t n_tensors = kvq_gguf_tensor_count(model->file);
    /* A layer's entries in the file (51 bytes or more each) outweigh its kvq_layer, so what is
     * allocated stays below the size of the file. */
    if (c->n_layers > n_tensors / MIN_LAYER_TENSORS) {
        return kvq_fail(KVQ_ERR_FORMAT, "metadata: %u layers, but the file has only %llu tensors",
                        c->n_layers, (unsigned long long)n_tensors);
    }
    if (!kvq_gguf_find_tensor(model->file, "token_embd.weight", &t)) {
        return kvq_fail(KVQ_ERR_FORMAT, "tensor token_embd.weight is missing");
    }
    if (t.shape[1] > INT32_MAX) {
        return kvq_fail(KVQ_ERR_FORMAT, "tensor token_embd.weight: %llu rows are too many",
                        (unsigned long long)t.shape[1]);
    }
    c->n_vocab = (uint32_t)t.shape[1]; /* the tensor decides; vocab_size may be absent */

    slot of_model[N_MODEL_SLOTS], of_layer[N_LAYER_SLOTS];
    make_slots(c, of_model, of_layer);
    model->layers = kvq_alloc(c->n_layers * sizeof *model->layers);
    if (!model->layers)
        return kvq_fail(KVQ_ERR_MEMORY, "there is no memory for %u layers", c->n_layers);

    for (uint64_t i = 0; i < n_tensors; i++) {
        uint32_t layer;
        const char *rest;
        size_t length;
        void *owner = model;
        kvq_gguf_tensor_at(model->file, i, &t);
        const slot *s = find_slot(of_model, N_MODEL_SLOTS, t.name, t.name_length);
        if (!s && split_layer_name(&t, &layer, &rest, &length) && layer < c->n_layers) {
            s = find_slot(of_layer, N_LAYER_SLOTS, rest, length);
            owner = &model->layers[layer];
        }
        if (!s) {
            return kvq_fail(KVQ_ERR_UNSUPPORTED, "tensor %s is not known to the architecture %s",
                            kvq_show(t.name, t.name_length).text, c->architecture);
        }
        if ((status = bind_tensor(member(owner, s), s, &t)) != KVQ_OK) return status;
        model->n_params += (uint64_t)s->rows * s->cols;
        model->bytes_weights += t.bytes;
    }
    status = check_present(model, of_model, N_MODEL_SLOTS, c->qkv_bias, "");
    for (uint32_t l = 0; l < c->n_layers && status == KVQ_OK; l++) {
        char prefix[24];
        snprintf(prefix, sizeof prefix, "blk.%u.", l);
        status = check_present(&model->layers[l], of_layer, N_LAYER_SLOTS, c->qkv_bias, prefix);
    }
    if (!model->output.data) model->output = model->token_embd;
    return status;
}
