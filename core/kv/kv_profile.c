/* kv_profile.c: opens a profile: metadata, one tensor per slot, and the inverse of every basis. */
#include <math.h>
#include <stdio.h>

#include "arch.h"
#include "kv/kv_profile.h"
#include "kv/kv_scheme.h"
#include "ops.h"

enum { VERSION = 1, TYPE_F32 = 0, TYPE_F16 = 1, TYPE_I16 = 25 }; /* types as ggml numbers them */

/* Far beyond what calibration finds, and far from where the products of the plans and of attention
 * overflow a float. */
static const float largest_half = 65504, largest_inverse = 1e6f, largest_weight = 1e15f;

/* ---- which model ------------------------------------------------------------------------- */

/* FNV-1a, 64 bits: tells models apart, proves nothing. */
static uint64_t hash(uint64_t h, const void *data, size_t bytes) {
    const uint8_t *const p = data;
    for (size_t i = 0; i < bytes; i++) h = (h ^ p[i]) * 1099511628211u;
    return h;
}

static uint64_t hash_u64(uint64_t h, uint64_t value) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)(value >> 8 * i);
    return hash(h, bytes, sizeof bytes);
}

uint64_t kvq_model_fingerprint(const kvq_model *model) {
    enum { SAMPLE = 1024 }; /* bytes of the key weights of each layer */
    uint64_t h = 14695981039346656037u;
    if (model->is_cut) return 0;
    for (uint64_t i = 0; i < kvq_gguf_tensor_count(model->file); i++) {
        kvq_gguf_tensor t;
        kvq_gguf_tensor_at(model->file, i, &t);
        h = hash(h, t.name, t.name_length);
        h = hash_u64(h, t.type);
        for (int axis = 0; axis < 4; axis++) h = hash_u64(h, t.shape[axis]);
    }
    for (uint32_t l = 0; l < model->config.n_layers; l++) {
        const kvq_tensor *const w = &model->layers[l].attn_k;
        const size_t bytes = (size_t)w->rows * w->row_bytes;
        h = hash(h, w->data, bytes < SAMPLE ? bytes : SAMPLE);
    }
    return h;
}

/* ---- slots ------------------------------------------------------------------------------- */

typedef struct reader {
    const kvq_gguf *file;
    const kvq_config *config;
    kvq_profile *p;
} reader;

/* "F16 [64, 64, 2]"; axes of 1 at the end are left out. */
typedef struct form {
    char text[112];
} form;

static form form_of(uint32_t type, const uint64_t *shape, int n_dims) {
    form f;
    const char *name = "an unknown type";
    uint32_t block, bytes;
    kvq_ggml_type_size(type, &name, &block, &bytes);
    while (n_dims > 1 && shape[n_dims - 1] == 1) n_dims--;
    int used = snprintf(f.text, sizeof f.text, "%s [", name);
    for (int axis = 0; axis < n_dims; axis++) {
        used += snprintf(f.text + used, sizeof f.text - (size_t)used, axis ? ", %llu" : "%llu",
                         (unsigned long long)shape[axis]);
    }
    snprintf(f.text + used, sizeof f.text - (size_t)used, "]");
    return f;
}

/* Finds a tensor of `n_dims` axes shape[], fastest first. */
static kvq_status find(const reader *r, const char *name, uint32_t type, int n_dims,
                       const uint64_t shape[3], kvq_gguf_tensor *out) {
    if (!kvq_gguf_find_tensor(r->file, name, out)) {
        return kvq_fail(KVQ_ERR_FORMAT, "tensor %s is missing", name);
    }
    bool same = out->type == type;
    for (int axis = 0; axis < 4; axis++) {
        same = same && out->shape[axis] == (axis < n_dims ? shape[axis] : 1);
    }
    if (same) return KVQ_OK;
    return kvq_fail(KVQ_ERR_FORMAT, "tensor %s is %s, expected %s", name,
                    form_of(out->type, out->shape, (int)out->n_dims).text,
                    form_of(type, shape, n_dims).text);
}

static kvq_status take_number(float *out, float x, const char *name, float least, float most) {
    *out = x;
    if (x >= least && x <= most) return KVQ_OK; /* not so for NaN */
    return kvq_fail(KVQ_ERR_FORMAT, "tensor %s holds %g, expected %g to %g", name, (double)x,
                    (double)least, (double)most);
}

/* F32 [n][rows], into rows of `stride` floats. */
static kvq_status read_numbers(const reader *r, const char *name, float *out, int rows, int n,
                               int stride, float least, float most) {
    kvq_gguf_tensor t;
    const uint64_t shape[3] = {(uint64_t)n, (uint64_t)rows, 1};
    kvq_status status = find(r, name, TYPE_F32, 2, shape, &t);
    for (int i = 0; i < rows * n && status == KVQ_OK; i++) {
        float x;
        memcpy(&x, t.data + 4 * i, 4);
        status = take_number(&out[i / n * stride + i % n], x, name, least, most);
    }
    return status;
}

/* The inverse of a[n][n] by elimination with the largest pivot of each column; false where there is
 * none. a is destroyed. */
static bool invert(double *inverse, double *a, int n) {
    for (int i = 0; i < n * n; i++) inverse[i] = i / n == i % n;
    for (int c = 0; c < n; c++) {
        int pivot = c;
        for (int i = c + 1; i < n; i++) {
            if (fabs(a[i * n + c]) > fabs(a[pivot * n + c])) pivot = i;
        }
        const double top = a[pivot * n + c];
        if (!(fabs(top) > 1e-12)) return false;
        for (int j = 0; j < n; j++) {
            double x = a[c * n + j], y = inverse[c * n + j];
            a[c * n + j] = a[pivot * n + j] / top;
            inverse[c * n + j] = inverse[pivot * n + j] / top;
            if (pivot == c) continue;
            a[pivot * n + j] = x;
            inverse[pivot * n + j] = y;
        }
        for (int i = 0; i < n; i++) {
            const double factor = a[i * n + c];
            if (i == c || factor == 0) continue;
            for (int j = 0; j < n; j++) {
                a[i * n + j] -= factor * a[c * n + j];
                inverse[i * n + j] -= factor * inverse[c * n + j];
            }
        }
    }
    return true;
}

/* T of each head of a layer, and its inverse: as T^-1, or transposed as the dual. work: 2 * d_head
 * * d_head numbers. */
static kvq_status read_basis(const reader *r, const char *slot, int layer, float *store,
                             float *inverse_of, bool dual, double *work) {
    const kvq_profile *const p = r->p;
    const int n = p->d_head, d = p->d;
    const uint64_t shape[3] = {(uint64_t)n, (uint64_t)n, (uint64_t)p->n_heads};
    char name[64];
    kvq_gguf_tensor t;
    snprintf(name, sizeof name, "blk.%d.%s", layer, slot);
    kvq_status status = find(r, name, TYPE_F16, 3, shape, &t);
    double *const matrix = work, *const inverse = work + n * n;
    for (int head = 0; head < p->n_heads && status == KVQ_OK; head++) {
        const size_t at = kvq_profile_head(p, layer, head) * (size_t)d * (size_t)d;
        for (int i = 0; i < n * n && status == KVQ_OK; i++) {
            float x;
            status = take_number(&x, kvq_load_f16(t.data + 2 * (head * n * n + i)), name,
                                 -largest_half, largest_half);
            matrix[i] = (double)x;
            store[at + (size_t)(i % n * d + i / n)] = x;
        }
        if (status != KVQ_OK) break;
        if (!invert(inverse, matrix, n)) {
            return kvq_fail(KVQ_ERR_FORMAT, "tensor %s: the matrix of head %d has no inverse", name,
                            head);
        }
        for (int i = 0; i < n * n; i++) { /* inverse[row][column]; the dual is transposed */
            const float x = (float)inverse[i];
            const int column = dual ? i / n : i % n, row = dual ? i % n : i / n;
            if (!(fabsf(x) <= largest_inverse)) {
                return kvq_fail(KVQ_ERR_FORMAT,
                                "tensor %s: the inverse of head %d reaches %g, expected at most %g",
                                name, head, (double)x, (double)largest_inverse);
            }
            inverse_of[at + (size_t)(column * d + row)] = x;
        }
    }
    return status;
}

static kvq_status read_order(const reader *r, int layer) {
    kvq_profile *const p = r->p;
    const int n = p->d_head;
    const uint64_t shape[3] = {(uint64_t)n, (uint64_t)p->n_heads, 1};
    char name[64];
    kvq_gguf_tensor t;
    snprintf(name, sizeof name, "blk.%d.k_order", layer);
    const kvq_status status = find(r, name, TYPE_I16, 2, shape, &t);
    if (status != KVQ_OK) return status;
    for (int head = 0; head < p->n_heads; head++) {
        uint16_t *const order = p->order + kvq_profile_head(p, layer, head) * (size_t)p->d;
        bool seen[KVQ_D_MAX] = {false};
        for (int c = 0; c < n; c++) {
            const uint16_t channel = kvq_load_u16(t.data + 2 * (head * n + c));
            if (channel >= n || seen[channel]) {
                return kvq_fail(KVQ_ERR_FORMAT, "tensor %s: head %d is not a permutation", name,
                                head);
            }
            seen[channel] = true;
            order[c] = channel;
        }
        for (int c = n; c < p->d; c++) order[c] = (uint16_t)c;
    }
    return KVQ_OK;
}

/* The keys' constant before RoPE, zero but for a few pairs, as u and w of each pair. */
static kvq_status read_waves(const reader *r, int layer, float *work) {
    kvq_profile *const p = r->p;
    const kvq_config *const c = r->config;
    const int n = p->d_head, pairs = (int)c->d_rope / 2;
    const bool neox = c->rope == KVQ_ROPE_NEOX;
    char name[64];
    snprintf(name, sizeof name, "blk.%d.k_wave", layer);
    const kvq_status status =
        read_numbers(r, name, work, p->n_heads, n, n, -largest_half, largest_half);
    if (status != KVQ_OK) return status;
    for (int head = 0; head < p->n_heads; head++) {
        const size_t h = kvq_profile_head(p, layer, head), d = (size_t)p->d;
        const float *const mu = work + head * n, *const columns = p->k_store + h * d * d;
        int found = 0;
        for (int channel = 2 * pairs; channel < n; channel++) {
            if (mu[channel] == 0) continue;
            return kvq_fail(KVQ_ERR_FORMAT,
                            "tensor %s: head %d has %g in channel %d, which RoPE does not rotate; "
                            "expected 0",
                            name, head, (double)mu[channel], channel);
        }
        for (int pair = 0; pair < pairs; pair++) {
            const int a = kvq_rope_first(pair, neox);
            const int b = kvq_rope_second(pair, 2 * pairs, neox);
            if (mu[a] == 0 && mu[b] == 0) continue;
            if (found == KVQ_WAVES) {
                return kvq_fail(KVQ_ERR_FORMAT,
                                "tensor %s: head %d has more than %d pairs that are not zero", name,
                                head, KVQ_WAVES);
            }
            float *const u = p->wave_u + (h * KVQ_WAVES + (size_t)found) * d;
            float *const w = p->wave_w + (h * KVQ_WAVES + (size_t)found) * d;
            for (size_t i = 0; i < d; i++) { /* T (mu_a, mu_b) and T (-mu_b, mu_a) */
                const float at = columns[(size_t)a * d + i], bt = columns[(size_t)b * d + i];
                u[i] = mu[a] * at + mu[b] * bt;
                w[i] = mu[a] * bt - mu[b] * at;
            }
            p->wave_pair[h * KVQ_WAVES + (size_t)found++] = (uint16_t)pair;
        }
        p->n_waves[h] = (uint8_t)found;
    }
    return KVQ_OK;
}

static kvq_status read_layer(const reader *r, int layer, double *work, float *waves) {
    kvq_profile *const p = r->p;
    const size_t at = kvq_profile_head(p, layer, 0) * (size_t)p->d;
    const struct {
        const char *slot;
        float *out;
        float least, most;
    } rows[] = {{"k_mean", p->k_mean, -largest_half, largest_half},
                {"v_mean", p->v_mean, -largest_half, largest_half},
                {"k_importance", p->importance, 0, largest_weight}};
    kvq_status status = read_basis(r, "k_basis", layer, p->k_store, p->k_query, true, work);
    if (status == KVQ_OK)
        status = read_basis(r, "v_basis", layer, p->v_store, p->v_restore, false, work);
    if (status == KVQ_OK) status = read_waves(r, layer, waves);
    if (status == KVQ_OK) status = read_order(r, layer);
    for (size_t i = 0; i < sizeof rows / sizeof *rows && status == KVQ_OK; i++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%d.%s", layer, rows[i].slot);
        status = read_numbers(r, name, rows[i].out + at, p->n_heads, p->d_head, p->d, rows[i].least,
                              rows[i].most);
    }
    return status;
}

/* ---- opening ----------------------------------------------------------------------------- */

static kvq_status read_count(const reader *r, const char *key, uint32_t *out) {
    kvq_meta meta;
    if (!kvq_gguf_find(r->file, key, &meta)) {
        return kvq_fail(KVQ_ERR_FORMAT, "metadata key %s is missing", key);
    }
    return kvq_gguf_get_u32(r->file, key, out);
}

static kvq_status read_header(const reader *r, const kvq_model *model) {
    kvq_profile *const p = r->p;
    uint32_t version = 0, layers = 0, heads = 0, width = 0;
    const char *name = NULL;
    size_t length = 0;
    kvq_status status = kvq_gguf_get_string(r->file, "general.architecture", &name, &length);
    if (status != KVQ_OK) return status;
    if (!name || length != 11 || memcmp(name, "kvq-profile", 11) != 0) {
        return kvq_fail(KVQ_ERR_FORMAT, "the file is no KV profile: its architecture is \"%s\"",
                        name ? kvq_show(name, length).text : "");
    }
    if ((status = read_count(r, "kvq.profile.version", &version)) != KVQ_OK) return status;
    if (version != VERSION) { /* what follows may mean something else there */
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "the profile has version %u, and only %d is implemented", version, VERSION);
    }
    if ((status = read_count(r, "kvq.profile.layers", &layers)) != KVQ_OK ||
        (status = read_count(r, "kvq.profile.kv_heads", &heads)) != KVQ_OK ||
        (status = read_count(r, "kvq.profile.d_head", &width)) != KVQ_OK) {
        return status;
    }
    const kvq_config *const c = r->config;
    if (layers != c->n_layers || heads != c->n_kv_heads || width != c->d_head ||
        width > KVQ_D_MAX) {
        return kvq_fail(KVQ_ERR_FORMAT,
                        "the profile is for %u layers of %u KV heads %u wide, but the model has %u "
                        "of %u, %u wide",
                        layers, heads, width, c->n_layers, c->n_kv_heads, c->d_head);
    }
    kvq_meta meta;
    if (!kvq_gguf_find(r->file, "kvq.profile.fingerprint", &meta) || meta.is_array ||
        meta.type != KVQ_META_U64) {
        return kvq_fail(KVQ_ERR_FORMAT, "metadata key kvq.profile.fingerprint is missing");
    }
    if (!model->is_cut && kvq_load_u64(meta.data) != kvq_model_fingerprint(model)) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "the profile was calibrated for another model (fingerprint %016llx, "
                        "expected %016llx)",
                        (unsigned long long)kvq_load_u64(meta.data),
                        (unsigned long long)kvq_model_fingerprint(model));
    }
    p->n_layers = (int)layers;
    p->n_heads = (int)heads;
    p->d_head = (int)width;
    p->d = kvq_padded_width((int)width);
    return KVQ_OK;
}

static void lay_out(kvq_profile *p, kvq_arena *arena) {
    const size_t layers = (size_t)p->n_layers, heads = layers * (size_t)p->n_heads,
                 d = (size_t)p->d;
    float **const matrices[] = {&p->k_store, &p->k_query, &p->v_store, &p->v_restore};
    for (int i = 0; i < 4; i++) {
        *matrices[i] = kvq_arena_take(arena, heads * d * d * sizeof(float));
    }
    p->k_mean = kvq_arena_take(arena, heads * d * sizeof(float));
    p->v_mean = kvq_arena_take(arena, heads * d * sizeof(float));
    p->wave_u = kvq_arena_take(arena, heads * KVQ_WAVES * d * sizeof(float));
    p->wave_w = kvq_arena_take(arena, heads * KVQ_WAVES * d * sizeof(float));
    p->wave_pair = kvq_arena_take(arena, heads * KVQ_WAVES * sizeof(uint16_t));
    p->n_waves = kvq_arena_take(arena, heads);
    p->importance = kvq_arena_take(arena, heads * d * sizeof(float));
    p->k_sensitivity = kvq_arena_take(arena, layers * sizeof(float));
    p->v_sensitivity = kvq_arena_take(arena, heads * sizeof(float));
    p->order = kvq_arena_take(arena, heads * d * sizeof(uint16_t));
}

static kvq_status read_all(const reader *r) {
    kvq_profile *const p = r->p;
    const int n = p->n_layers;
    double *const work = kvq_alloc(2 * (size_t)p->d_head * (size_t)p->d_head * sizeof *work);
    float *const waves = kvq_alloc((size_t)p->n_heads * (size_t)p->d_head * sizeof *waves);
    kvq_arena arena = {0};
    lay_out(p, &arena);
    p->bytes = arena.used;
    p->memory = kvq_alloc(p->bytes);
    kvq_status status = work && waves && p->memory
                            ? KVQ_OK
                            : kvq_fail(KVQ_ERR_MEMORY, "there is no memory for a profile");
    if (status == KVQ_OK) {
        arena = (kvq_arena){.base = p->memory};
        lay_out(p, &arena);
    }
    for (int layer = 0; layer < n && status == KVQ_OK; layer++)
        status = read_layer(r, layer, work, waves);
    kvq_free(work);
    kvq_free(waves);
    if (status != KVQ_OK) return status;
    status = read_numbers(r, "kvq.k_sensitivity", p->k_sensitivity, 1, n, n, 0, largest_weight);
    if (status != KVQ_OK) return status;
    return read_numbers(r, "kvq.v_sensitivity", p->v_sensitivity, n, p->n_heads, p->n_heads, 0,
                        largest_weight);
}

kvq_status kvq_profile_read(kvq_profile **out, const kvq_model *model, const kvq_gguf *file) {
    const char *const label = kvq_gguf_label(file);
    kvq_profile *const p = kvq_alloc(sizeof *p);
    if (!p) return kvq_fail(KVQ_ERR_MEMORY, "There is no memory to open %.100s.", label);
    const reader r = {.file = file, .config = &model->config, .p = p};
    snprintf(p->label, sizeof p->label, "%.63s", label);
    kvq_status status = read_header(&r, model);
    if (status == KVQ_OK) status = read_all(&r);
    if (status != KVQ_OK) {
        kvq_fail_in(status, label);
        kvq_profile_close(p);
        return status;
    }
    *out = p;
    return KVQ_OK;
}

kvq_status kvq_profile_open(kvq_profile **out, const kvq_model *model, const char *path) {
    kvq_gguf *file;
    kvq_status status = kvq_gguf_open(&file, path);
    if (status != KVQ_OK) return status;
    status = kvq_profile_read(out, model, file);
    kvq_gguf_close(file);
    return status;
}

void kvq_profile_close(kvq_profile *profile) {
    if (!profile) return;
    kvq_free(profile->memory);
    kvq_free(profile);
}
