/* session.c: the public functions: check arguments, own lifetimes, forward to the parts. */
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>

#include "cpu.h"
#include "kv/kv_digest.h"
#include "ops.h"
#include "session_part.h"

#define KVQ_VERSION "0.1.0"

const char *kvq_version(void) { return KVQ_VERSION; }

/* ---- model ------------------------------------------------------------------------------- */

typedef kvq_status open_file(kvq_gguf **out, const char *path);

static kvq_status open_model(kvq_model **out, const char *path, open_file *open) {
    kvq_model *const model = kvq_alloc(sizeof *model);
    if (model) model->uploaded = kvq_alloc(sizeof *model->uploaded);
    if (!model || !model->uploaded) {
        kvq_model_close(model);
        return kvq_fail(KVQ_ERR_MEMORY, "There is no memory to open %.100s.", path);
    }
    kvq_status status = open(&model->file, path);
    if (status == KVQ_OK && (status = kvq_arch_bind(model)) != KVQ_OK) {
        kvq_fail_in(status, kvq_gguf_label(model->file));
    }
    if (status != KVQ_OK) {
        kvq_model_close(model);
        return status;
    }
    model->is_cut = kvq_gguf_is_cut(model->file);
    *out = model;
    return KVQ_OK;
}

kvq_status kvq_model_open(kvq_model **out, const char *path) {
    return open_model(out, path, kvq_gguf_open);
}

kvq_status kvq_model_open_header(kvq_model **out, const char *path) {
    return open_model(out, path, kvq_gguf_open_header);
}

static kvq_status require_weights(const kvq_model *model, const char *what) {
    if (!model->is_cut) return KVQ_OK;
    return kvq_fail(KVQ_ERR_ARGUMENT, "The file %s ends before its weights do, and %s needs them.",
                    kvq_gguf_label(model->file), what);
}

void kvq_model_close(kvq_model *model) {
    if (!model) return;
    kvq_free(model->layers);
    kvq_free(model->uploaded);
    kvq_gguf_close(model->file);
    kvq_free(model);
}

void kvq_model_describe(const kvq_model *model, kvq_model_info *out) {
    const kvq_config *const c = &model->config;
    *out = (kvq_model_info){.architecture = c->architecture,
                            .n_layers = (int32_t)c->n_layers,
                            .n_heads = (int32_t)c->n_heads,
                            .n_kv_heads = (int32_t)c->n_kv_heads,
                            .d_model = (int32_t)c->d_model,
                            .d_head = (int32_t)c->d_head,
                            .d_ff = (int32_t)c->d_ff,
                            .n_vocab = (int32_t)c->n_vocab,
                            .n_ctx_train = (int32_t)c->n_ctx_train,
                            .n_params = model->n_params,
                            .bytes_weights = model->bytes_weights,
                            .has_weights = !model->is_cut};
}

int32_t kvq_model_rope_count(const kvq_model *model) { return (int32_t)model->config.d_rope / 2; }

kvq_status kvq_model_rope(const kvq_model *model, int32_t index, kvq_rope_pair *out) {
    const kvq_config *const c = &model->config;
    const int count = kvq_model_rope_count(model), d = (int)c->d_rope;
    const bool neox = c->rope == KVQ_ROPE_NEOX;
    const float *const factors = kvq_tensor_vector(&model->rope_freqs);
    const kvq_status status = factors ? require_weights(model, "RoPE") : KVQ_OK;
    if (status != KVQ_OK) return status;
    if (index < 0 || index >= count) {
        return kvq_fail(KVQ_ERR_ARGUMENT, "RoPE pair %d does not exist; there are %d.", index,
                        count);
    }
    *out = (kvq_rope_pair){.first = kvq_rope_first(index, neox),
                           .second = kvq_rope_second(index, d, neox),
                           .frequency = kvq_rope_frequency(index, d, c->rope_base, factors) /
                                        (double)c->rope_scale};
    return KVQ_OK;
}

uint64_t kvq_model_meta_count(const kvq_model *model) { return kvq_gguf_meta_count(model->file); }

kvq_status kvq_model_meta(const kvq_model *model, uint64_t index, kvq_meta *out) {
    const uint64_t count = kvq_gguf_meta_count(model->file);
    if (index >= count) {
        return kvq_fail(KVQ_ERR_ARGUMENT, "Metadata entry %llu does not exist; there are %llu.",
                        (unsigned long long)index, (unsigned long long)count);
    }
    kvq_gguf_meta(model->file, index, out);
    return KVQ_OK;
}

uint64_t kvq_model_tensor_count(const kvq_model *model) {
    return kvq_gguf_tensor_count(model->file);
}

kvq_status kvq_model_tensor(const kvq_model *model, uint64_t index, kvq_tensor_info *out) {
    const uint64_t count = kvq_gguf_tensor_count(model->file);
    if (index >= count) {
        return kvq_fail(KVQ_ERR_ARGUMENT, "Tensor %llu does not exist; there are %llu.",
                        (unsigned long long)index, (unsigned long long)count);
    }
    kvq_gguf_tensor t;
    uint32_t block, bytes;
    kvq_gguf_tensor_at(model->file, index, &t);
    *out = (kvq_tensor_info){
        .name = t.name, .name_length = t.name_length, .n_dims = t.n_dims, .bytes = t.bytes};
    memcpy(out->shape, t.shape, sizeof out->shape);
    kvq_ggml_type_size(t.type, &out->type, &block, &bytes);
    return KVQ_OK;
}

kvq_status kvq_model_tensor_values(const kvq_model *model, uint64_t index, float *values,
                                   uint64_t n) {
    kvq_tensor_info info;
    kvq_gguf_tensor t;
    kvq_status status = kvq_model_tensor(model, index, &info);
    if (status == KVQ_OK) status = require_weights(model, "reading a tensor");
    if (status != KVQ_OK) return status;
    kvq_gguf_tensor_at(model->file, index, &t);
    const kvq_shown name = kvq_show(t.name, t.name_length);
    const int kind = kvq_weight_find(t.type);
    if (kind < 0) {
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "Tensor %s is of the type %s, which is not implemented.", name.text,
                        info.type);
    }
    const kvq_weight_format *const format = &kvq_weight_formats[kind];
    const uint64_t count = t.bytes / format->bytes * format->block;
    if (count != n) {
        return kvq_fail(KVQ_ERR_ARGUMENT, "Tensor %s has %llu numbers, and room is for %llu.",
                        name.text, (unsigned long long)count, (unsigned long long)n);
    }
    format->dequantize(values, t.data, n);
    return KVQ_OK;
}

/* ---- session ----------------------------------------------------------------------------- */

/* A value between least and most, or `otherwise` where the caller left it open. */
static kvq_status choose(const char *name, int32_t value, int32_t open, int otherwise, int least,
                         int most, int *out) {
    *out = value == open ? otherwise : value;
    if (*out >= least && *out <= most) return KVQ_OK;
    return kvq_fail(KVQ_ERR_ARGUMENT, "%s is %d, expected %d to %d.", name, *out, least, most);
}

static int smaller(int a, int b) { return a < b ? a : b; }

enum { MOST_TOKENS = 1 << 28, MOST_THREADS = 1024 };

static void set_context(kvq_session *s, int n_ctx) {
    s->n_ctx = n_ctx;
    s->n_batch = s->forward.cpu.n_batch = smaller(s->most_batch, n_ctx);
}

static kvq_status read_options(kvq_session *s, const kvq_session_options *o) {
    int n_ctx;
    const kvq_config *const c = &s->model->config;
    kvq_status status;
    if ((status = kvq_scheme_find(&s->scheme, o->scheme)) != KVQ_OK) return status;
    if ((status = kvq_scheme_check(s->scheme, (int)c->d_head)) != KVQ_OK) return status;
    status =
        choose("n_ctx", o->n_ctx, 0, smaller((int)c->n_ctx_train, 4096), 1, MOST_TOKENS, &n_ctx);
    if (status != KVQ_OK) return status;
    status = choose("n_batch", o->n_batch, 0, 512, 1, 65535, &s->most_batch);
    if (status != KVQ_OK) return status;
    set_context(s, n_ctx);
    const int processors = smaller(kvq_cpu_count(), MOST_THREADS);
    status = choose("n_threads", o->n_threads, 0, processors, 1, MOST_THREADS, &s->n_threads);
    if (status != KVQ_OK) return status;
    s->n_threads = smaller(s->n_threads, processors);
    status = choose("sinks", o->sinks, -1, s->scheme->sinks, 0, 4096, &s->sinks);
    if (status != KVQ_OK) return status;
    status = choose("window", o->window, -1, s->scheme->window, 0, MOST_TOKENS, &s->window);
    if (status != KVQ_OK) return status;
    return choose("kv_topk", o->kv_topk, 0, 0, 0, MOST_TOKENS, &s->topk);
}

static bool is_keys(const kvq_session *s, size_t track) {
    return track / s->model->config.n_kv_heads % KVQ_SIDES == KVQ_KEYS;
}

static kvq_status check_topk(const kvq_session *s, size_t n_tracks) {
    for (size_t i = 0; i < n_tracks; i++) {
        const kvq_track *const track = &s->tracks[i];
        if (is_keys(s, i) && !kvq_codec_mean_at(track->codec, &track->shape)) {
            return kvq_fail(KVQ_ERR_UNSUPPORTED,
                            "kv_topk needs blocks of keys that keep their mean, which those of the "
                            "KV scheme %s (%s) do not; skvq, svdq, asymkv and auto have it.",
                            s->scheme->name, kvq_codecs[track->codec].name);
        }
    }
    return KVQ_OK;
}

static kvq_status make_plan(kvq_session *s, const kvq_session_options *o) {
    const kvq_config *const c = &s->model->config;
    const size_t n_tracks = (size_t)c->n_layers * KVQ_SIDES * c->n_kv_heads;
    bool *const key_bias = kvq_alloc(c->n_layers * sizeof *key_bias);
    s->tracks = kvq_alloc(n_tracks * sizeof *s->tracks);
    kvq_status status = KVQ_OK;
    if (!key_bias || !s->tracks) {
        status = kvq_fail(KVQ_ERR_MEMORY, "There is no memory for a session.");
    } else {
        for (uint32_t l = 0; l < c->n_layers; l++) {
            key_bias[l] = s->model->layers[l].attn_k_bias.data != NULL;
        }
        const kvq_plan_request request = {.scheme = s->scheme,
                                          .profile = o->profile,
                                          .n_layers = (int)c->n_layers,
                                          .n_heads = (int)c->n_kv_heads,
                                          .d_head = (int)c->d_head,
                                          .key_bias = key_bias,
                                          .bits = o->kv_bits,
                                          .l_k = o->l_k,
                                          .l_v = o->l_v};
        status = kvq_plan_make(s->tracks, &request);
        for (int side = 0; side < KVQ_SIDES && status == KVQ_OK; side++) {
            s->bits[side] = kvq_plan_bits(s->tracks, &request, side);
        }
        for (size_t i = 0; i < n_tracks && status == KVQ_OK; i++) {
            if (s->tracks[i].wave.n) s->turns.n_pairs = (int)c->d_rope / 2;
        }
        if (status == KVQ_OK && s->topk) status = check_topk(s, n_tracks);
        if (status == KVQ_OK) {
            s->uses_profile = kvq_plan_uses_profile(s->tracks, &request);
            s->table_bytes = s->uses_profile ? request.profile->bytes : 0;
        }
    }
    kvq_free(key_bias);
    return status;
}

static const kvq_track *tracks_of(const kvq_session *s, uint32_t layer) {
    return s->tracks + (size_t)layer * KVQ_SIDES * s->model->config.n_kv_heads;
}

/* Lays out the caches of all layers, then the scratch. */
static void lay_out_kv(kvq_session *s, kvq_arena *arena) {
    const kvq_config *const c = &s->model->config;
    kvq_arena elsewhere = {0}; /* a GPU has its layers' bytes; their numbers are needed here */
    s->bytes = (kvq_ring_bytes){0};
    for (uint32_t l = 0; l < c->n_layers; l++) {
        kvq_arena *const memory = (int)l < s->forward.n_layers_cpu ? arena : &elsewhere;
        kvq_ring_lay_out(&s->forward.rings[l], memory, &s->bytes, tracks_of(s, l),
                         s->turns.n_pairs ? &s->turns : NULL, (int)c->n_kv_heads, (int)c->d_head,
                         s->sinks, s->window, s->n_ctx);
    }
}

static void lay_out_scratch(kvq_session *s, kvq_arena *arena) {
    const kvq_config *const c = &s->model->config;
    const size_t pairs = (size_t)s->turns.n_pairs, blocks = (size_t)s->forward.rings[0].max_blocks;
    s->turns.within = kvq_arena_take(arena, pairs * 2 * KVQ_BLOCK * sizeof(float));
    s->turns.first = kvq_arena_take(arena, blocks * pairs * 2 * sizeof(float));
    kvq_cpu *const cpu = &s->forward.cpu;
    kvq_cpu_lay_out(cpu, arena);
    cpu->attention.top_blocks = (s->topk + KVQ_BLOCK - 1) / KVQ_BLOCK;
    kvq_attention_lay_out(&cpu->attention, arena, &s->forward.rings[0], (int)c->n_heads,
                          (int)c->d_head, s->n_batch, s->n_threads);
}

kvq_status kvq_session_measure(kvq_session *s) {
    kvq_arena kv = {0}, scratch = {0};
    lay_out_kv(s, &kv);
    lay_out_scratch(s, &scratch);
    s->kv_bytes = kv.used;
    s->scratch_bytes = scratch.used;
    s->gpu_bytes = (kvq_cuda_bytes){0};
    if (!s->placement.n_layers_gpu) return KVQ_OK;
    const kvq_cuda_options options = kvq_session_cuda_options(s);
    return kvq_cuda_measure(&s->gpu_bytes, &options, s->gpu_processors);
}

static uint64_t bytes_total(const kvq_session *s) {
    return kvq_session_host_bytes(s) + kvq_session_gpu_bytes(s);
}

typedef uint64_t bytes_of(const kvq_session *s);

/* The longest context for which `bytes` fit, 0 if none does: every part grows with the context, or
 * stays. Leaves the session measured for another context. */
static int longest_context(kvq_session *s, bytes_of *bytes, uint64_t memory) {
    int fits = 0, too_long = MOST_TOKENS + 1;
    while (too_long - fits > 1) {
        const int n_ctx = fits + (too_long - fits) / 2;
        set_context(s, n_ctx);
        const bool measured = kvq_session_measure(s) == KVQ_OK;
        *(measured && bytes(s) <= memory ? &fits : &too_long) = n_ctx;
    }
    return fits;
}

/* Memory is claimed lazily by the system, which may grant more than there is and later kill the
 * process: so what does not fit is refused here. Weights count too: the system can drop mapped
 * pages, but every token reads them all, from the disk then. */
static kvq_status check_memory(kvq_session *s) {
    const uint64_t available = kvq_memory_available(), needed = kvq_session_host_bytes(s);
    if (needed <= available) return KVQ_OK;
    const double scratch = (double)s->scratch_bytes, kv = (double)(s->kv_bytes + s->table_bytes);
    const double weights = (double)needed - scratch - kv;
    const int n_ctx = s->n_ctx, longest = longest_context(s, kvq_session_host_bytes, available);
    char advice[80] = "no smaller n_ctx would fit";
    if (longest) snprintf(advice, sizeof advice, "choose a smaller n_ctx, at most %d", longest);
    return kvq_fail(
        KVQ_ERR_MEMORY,
        "A context of %d tokens under %s needs %.2f GB (weights %.2f, KV cache %.2f, scratch "
        "%.2f), but only %.2f GB of memory are available; %s.",
        n_ctx, s->scheme->name, (double)needed / 1e9, weights / 1e9, kv / 1e9, scratch / 1e9,
        (double)available / 1e9, advice);
}

/* Where RoPE has turned each pair within a block, and at the first token of every block. */
static void fill_turns(kvq_session *s) {
    const kvq_config *const c = &s->model->config;
    const float *const factors = kvq_tensor_vector(&s->model->rope_freqs);
    const int pairs = s->turns.n_pairs;
    float turned[KVQ_D_MAX];
    for (int t = 0; t < KVQ_BLOCK && pairs; t++) {
        kvq_rope_angles(turned, t, 2 * pairs, c->rope_base, c->rope_scale, factors);
        for (int i = 0; i < 2 * pairs; i++) s->turns.within[i * KVQ_BLOCK + t] = turned[i];
    }
    for (int b = 0; b < s->forward.rings[0].max_blocks && pairs; b++) {
        kvq_rope_angles(s->turns.first + (size_t)b * (size_t)pairs * 2, s->sinks + b * KVQ_BLOCK,
                        2 * pairs, c->rope_base, c->rope_scale, factors);
    }
}

static kvq_status allocate(kvq_session *s) {
    s->kv = kvq_alloc(s->kv_bytes);
    s->scratch = kvq_alloc(s->scratch_bytes);
    if (!s->kv || !s->scratch) {
        return kvq_fail(KVQ_ERR_MEMORY, "The system refused %.2f GB for a context of %d tokens.",
                        (double)(s->kv_bytes + s->scratch_bytes) / 1e9, s->n_ctx);
    }
    kvq_arena kv = {.base = s->kv}, scratch = {.base = s->scratch};
    lay_out_kv(s, &kv);
    lay_out_scratch(s, &scratch);
    fill_turns(s);
    return KVQ_OK;
}

/* A session that is measured, but has no memory and no threads. */
static kvq_status new_session(kvq_session **out, const kvq_model *model,
                              const kvq_session_options *options, bool is_plan) {
    kvq_session *const s = kvq_alloc(sizeof *s);
    if (!s) return kvq_fail(KVQ_ERR_MEMORY, "There is no memory for a session.");
    s->model = s->forward.model = s->forward.cpu.device.model = model;
    s->forward.n_layers_cpu = (int)model->config.n_layers;
    s->placement.gpu = -1;
    kvq_status status = read_options(s, options);
    if (status == KVQ_OK) status = kvq_isa_choose(&s->forward.cpu.isa);
    if (status == KVQ_OK) status = make_plan(s, options);
    if (status == KVQ_OK) {
        s->forward.rings = kvq_alloc(model->config.n_layers * sizeof *s->forward.rings);
        s->forward.cpu.device.rings = s->forward.rings;
        if (!s->forward.rings)
            status = kvq_fail(KVQ_ERR_MEMORY, "There is no memory for a session.");
    }
    if (status == KVQ_OK) status = kvq_session_place(s, options, is_plan);
    if (status != KVQ_OK) {
        kvq_session_close(s);
        return status;
    }
    *out = s;
    return KVQ_OK;
}

kvq_status kvq_session_open(kvq_session **out, const kvq_model *model,
                            const kvq_session_options *options) {
    kvq_session *s;
    kvq_status status = require_weights(model, "a session");
    if (status == KVQ_OK) status = new_session(&s, model, options, false);
    if (status != KVQ_OK) return status;
    if (!options->no_memory_check) status = check_memory(s);
    if (status == KVQ_OK) status = allocate(s);
    if (status == KVQ_OK) status = kvq_pool_open(&s->pool, s->n_threads, options->pin_threads);
    if (status != KVQ_OK) {
        kvq_session_close(s);
        return status;
    }
    kvq_cpu *const cpu = &s->forward.cpu;
    cpu->pool = cpu->attention.pool = s->pool;
    cpu->attention.isa = cpu->isa;
    cpu->attention.clock = &cpu->clock;
    kvq_cpu_init(cpu);
    if (s->placement.n_layers_gpu) {
        kvq_cuda_options gpu = kvq_session_cuda_options(s);
        gpu.upload = options->upload;
        gpu.user = options->upload_user;
        status = kvq_cuda_open(&s->forward.gpu, &gpu);
        if (status != KVQ_OK) {
            kvq_session_close(s);
            return status;
        }
    }
    *out = s;
    return KVQ_OK;
}

void kvq_session_close(kvq_session *session) {
    if (!session) return;
    kvq_cuda_close(session->forward.gpu);
    kvq_cuda_gpu_close(session->gpu);
    kvq_pool_close(session->pool);
    kvq_free(session->forward.rings);
    kvq_free(session->tracks);
    kvq_free(session->forward.cpu.simulated);
    kvq_free(session->scratch);
    kvq_free(session->kv);
    kvq_free(session);
}

kvq_status kvq_session_plan(const kvq_model *model, const kvq_session_options *options,
                            kvq_session_stats *out) {
    kvq_session *s;
    const kvq_status status = new_session(&s, model, options, true);
    if (status != KVQ_OK) return status;
    kvq_session_describe(s, out);
    kvq_session_close(s);
    return KVQ_OK;
}

kvq_status kvq_session_longest(const kvq_model *model, const kvq_session_options *options,
                               uint64_t memory, int32_t *n_ctx) {
    kvq_session *s;
    kvq_session_options any_context = *options;
    any_context.n_ctx = 0;
    const kvq_status status = new_session(&s, model, &any_context, true);
    if (status != KVQ_OK) return status;
    *n_ctx =
        longest_context(s, s->placement.n_layers_gpu ? kvq_session_gpu_bytes : bytes_total, memory);
    kvq_session_close(s);
    return KVQ_OK;
}

static int held(const kvq_session *s) { return s->forward.rings[0].n; }

/* What went wrong on the GPU, in a pass or since: it is of no use after that. */
static kvq_status check_gpu(kvq_session *s) { return kvq_forward_reserve(&s->forward, 0); }

static void truncate_all(kvq_session *s, int n) {
    for (uint32_t l = 0; l < s->model->config.n_layers; l++) {
        kvq_device *const device = kvq_device_of(&s->forward, (int)l);
        device->ops->truncate(device, (int)l, n);
    }
}

/* After a pass that stopped between layers: the first ones hold its tokens and have perhaps sealed
 * a block that the others still have as rows. All go back to n tokens, and to the same sealed
 * blocks. */
static void undo_pass(kvq_session *s, int n) {
    truncate_all(s, n);
    for (uint32_t l = 1; l < s->model->config.n_layers; l++) {
        kvq_device *const device = kvq_device_of(&s->forward, (int)l);
        device->ops->seal(device, (int)l, s->forward.rings[0].n_sealed);
    }
}

void kvq_session_observe(kvq_session *session, kvq_observer observer, void *user) {
    session->forward.observer = observer;
    session->forward.observer_user = user;
}

kvq_status kvq_session_simulate(kvq_session *session, kvq_simulator simulator, void *user) {
    const kvq_config *const c = &session->model->config;
    kvq_cpu *const cpu = &session->forward.cpu;
    if (strcmp(session->scheme->name, "f16") != 0) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "Quantizers are simulated in a cache of the scheme f16, but this session's "
                        "is %s.",
                        session->scheme->name);
    }
    if (session->placement.n_layers_gpu) {
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "Quantizers are simulated on the CPU; this session has %d layers on CUDA "
                        "device %d.",
                        session->placement.n_layers_gpu, session->placement.gpu);
    }
    if (simulator && !cpu->simulated) {
        cpu->simulated = kvq_alloc((size_t)c->n_kv_heads * KVQ_BLOCK * c->d_head * sizeof(float));
        if (!cpu->simulated)
            return kvq_fail(KVQ_ERR_MEMORY, "There is no memory for a simulation.");
    }
    cpu->simulator = simulator;
    cpu->simulator_user = user;
    return KVQ_OK;
}

static double seconds_now(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static kvq_status check_tokens(const kvq_session *s, const int32_t *tokens, int32_t n) {
    const int n_vocab = (int)s->model->config.n_vocab;
    if (n < 1)
        return kvq_fail(KVQ_ERR_ARGUMENT, "There are %d tokens to evaluate, expected at least 1.",
                        n);
    if (n > s->n_ctx - held(s)) {
        return kvq_fail(
            KVQ_ERR_CONTEXT,
            "The context is full: it holds %d of %d tokens, and %d more were to be evaluated.",
            held(s), s->n_ctx, n);
    }
    for (int32_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || tokens[i] >= n_vocab) {
            return kvq_fail(KVQ_ERR_ARGUMENT, "Token %d of %d is %d, expected 0 to %d.", i, n,
                            tokens[i], n_vocab - 1);
        }
    }
    return KVQ_OK;
}

kvq_status kvq_session_eval(kvq_session *session, const int32_t *tokens, int32_t n,
                            kvq_logits which, float *logits, kvq_progress progress, void *user) {
    kvq_status status = check_tokens(session, tokens, n);
    if (status != KVQ_OK) return status;
    if (which != KVQ_LOGITS_NONE && !logits) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "Logits were asked for, but there is no place to put them.");
    }
    const double start = seconds_now();
    kvq_pass pass = {.which = which,
                     .cancelled = &session->cancelled,
                     .progress = progress,
                     .user = user,
                     .n_total = n};
    for (int32_t done = 0; done < n && status == KVQ_OK; done += pass.n) {
        const int before = held(session);
        pass.tokens = tokens + done;
        pass.n = smaller(session->n_batch, n - done);
        pass.n_done = done;
        if (which == KVQ_LOGITS_LAST) {
            pass.which = done + pass.n == n ? KVQ_LOGITS_LAST : KVQ_LOGITS_NONE;
            pass.logits = logits;
        } else if (which == KVQ_LOGITS_ALL) {
            pass.logits = logits + (size_t)done * session->model->config.n_vocab;
        }
        status = kvq_forward_run(&session->forward, &pass);
        if (status == KVQ_OK) {
            session->n_evaluated += (uint64_t)pass.n;
        } else if (status == KVQ_CANCELLED) {
            undo_pass(session, before);
            status = check_gpu(session);
            if (status != KVQ_OK) break;
            status = kvq_fail(KVQ_CANCELLED, "The evaluation was cancelled after %d of %d tokens.",
                              done, n);
        }
    }
    atomic_store(&session->cancelled, 0);
    session->seconds_evaluated += seconds_now() - start;
    return status;
}

int32_t kvq_session_until_seal(const kvq_session *session) {
    return kvq_ring_until_seal(&session->forward.rings[0]);
}

kvq_status kvq_session_truncate(kvq_session *session, int32_t n) {
    if (n < 0 || n > held(session)) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "The session holds %d tokens and cannot be truncated to %d.", held(session),
                        n);
    }
    truncate_all(session, n);
    return check_gpu(session);
}

kvq_status kvq_session_fill(kvq_session *session, int32_t n) {
    const kvq_ring *const ring = &session->forward.rings[0];
    const int more = n - held(session), blocks = more / KVQ_BLOCK;
    if (n > session->n_ctx || ring->n_sealed + blocks > ring->max_blocks) {
        return kvq_fail(KVQ_ERR_CONTEXT,
                        "A context of %d tokens cannot be filled with %d of them; the session "
                        "holds %d, of which %d are sealed.",
                        session->n_ctx, n, held(session), ring->n_sealed * KVQ_BLOCK);
    }
    if (more < 0 || more % KVQ_BLOCK != 0) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "The session holds %d tokens and can be filled by whole blocks of %d, but "
                        "not to %d tokens.",
                        held(session), KVQ_BLOCK, n);
    }
    if (more && !ring->n_sealed) {
        return kvq_fail(KVQ_ERR_ARGUMENT,
                        "The session holds %d tokens, none of them in a sealed block that could be "
                        "repeated; %d more seal the first one.",
                        held(session), kvq_ring_until_seal(ring));
    }
    const kvq_status room = kvq_forward_reserve(&session->forward, ring->n_sealed + blocks);
    if (room != KVQ_OK) return room;
    for (uint32_t l = 0; l < session->model->config.n_layers; l++) {
        kvq_device *const device = kvq_device_of(&session->forward, (int)l);
        device->ops->repeat(device, (int)l, blocks);
    }
    return check_gpu(session);
}

void kvq_session_time(kvq_session *session, int32_t on) {
    session->forward.cpu.clock = (kvq_clock){.runs = on != 0};
}

void kvq_session_cancel(kvq_session *session) { atomic_store(&session->cancelled, 1); }

/* Bytes of one side of all layers that a token evaluated alone reads. */
static uint64_t bytes_step(const kvq_session *s, int side) {
    const kvq_config *const c = &s->model->config;
    const kvq_ring *const ring = &s->forward.rings[0];
    const int top = s->forward.cpu.attention.top_blocks;
    const bool selected = top && top < ring->n_sealed;
    const uint64_t blocks = (uint64_t)(selected ? top : ring->n_sealed);
    const uint64_t rows = (uint64_t)(ring->n - ring->n_sealed * KVQ_BLOCK);
    uint64_t bytes = rows * c->n_layers * c->n_kv_heads * (uint64_t)ring->d * 2;
    for (size_t i = 0; i < (size_t)c->n_layers * KVQ_SIDES * c->n_kv_heads; i++) {
        if (is_keys(s, i) != (side == KVQ_KEYS)) continue;
        bytes += blocks * s->tracks[i].block_bytes;
        if (selected && side == KVQ_KEYS) { /* the means of the others, with their unit */
            bytes += ((uint64_t)ring->n_sealed - blocks) * (uint64_t)(ring->d + 2);
        }
    }
    return bytes;
}

void kvq_session_describe(const kvq_session *session, kvq_session_stats *out) {
    const kvq_session *const s = session;
    const kvq_config *const c = &s->model->config;
    const kvq_ring *const ring = &s->forward.rings[0];
    const double per_token =
        2.0 * c->n_layers * c->n_kv_heads * c->d_head; /* elements, both sides */
    const double sealed_now = (double)ring->n_sealed * KVQ_BLOCK * per_token *
                              (s->bits[KVQ_KEYS] + s->bits[KVQ_VALUES]) / 16;
    const uint64_t sealed = s->bytes.sealed[KVQ_KEYS] + s->bytes.sealed[KVQ_VALUES];
    const uint64_t total = s->bytes.sinks + sealed + s->bytes.recent;
    const double now = (double)(s->bytes.sinks + s->bytes.recent) + sealed_now;
    *out = (kvq_session_stats){
        .isa = s->forward.cpu.isa->name,
        .scheme = s->scheme->name,
        .n_ctx = s->n_ctx,
        .n_batch = s->n_batch,
        .n_threads = s->n_threads,
        .sinks = s->sinks,
        .window = s->window,
        .n_tokens = held(s),
        .n_tokens_sealed = ring->n_sealed * KVQ_BLOCK,
        .bytes_kv = total,
        .bytes_sinks = s->bytes.sinks,
        .bytes_sealed = sealed,
        .bytes_sealed_k = s->bytes.sealed[KVQ_KEYS],
        .bytes_sealed_v = s->bytes.sealed[KVQ_VALUES],
        .bytes_recent = s->bytes.recent,
        .bytes_scratch = s->scratch_bytes + s->gpu_bytes.scratch,
        .bytes_tables = s->table_bytes,
        .bytes_weights = s->model->bytes_weights,
        .bytes_total = bytes_total(s),
        .gpu = s->placement.gpu,
        .n_gpu_layers = s->placement.n_layers_gpu,
        .gpu_head = s->placement.head_on_gpu,
        .bytes_gpu = kvq_session_gpu_bytes(s),
        .bytes_gpu_now = s->forward.gpu ? kvq_cuda_bytes_now(s->forward.gpu) : 0,
        .bytes_gpu_weights = s->gpu_bytes.weights,
        .bytes_gpu_rows = s->gpu_bytes.rows,
        .bytes_gpu_sealed = s->gpu_bytes.sealed,
        .bytes_gpu_tables = s->gpu_bytes.tables,
        .bytes_gpu_scratch = s->gpu_bytes.scratch,
        .bytes_gpu_chunk = s->gpu_bytes.chunk,
        .bytes_host_weights = kvq_session_host_weights(s),
        .bits_sealed_k = s->bits[KVQ_KEYS],
        .bits_sealed_v = s->bits[KVQ_VALUES],
        .bits_full = 8.0 * (double)(total + s->table_bytes) / (per_token * s->n_ctx),
        .bits_used = held(s) ? 8.0 * (now + (double)s->table_bytes) / (per_token * held(s)) : 0.0,
        .uses_profile = s->uses_profile,
        .kv_topk = s->topk,
        .bytes_step_k = bytes_step(s, KVQ_KEYS),
        .bytes_step_v = bytes_step(s, KVQ_VALUES),
        .n_evaluated = s->n_evaluated,
        .seconds_evaluated = s->seconds_evaluated,
        .ns_weights = s->forward.cpu.clock.ns[KVQ_STAGE_WEIGHTS],
        .ns_attention = s->forward.cpu.clock.ns[KVQ_STAGE_ATTENTION],
        .ns_append = s->forward.cpu.clock.ns[KVQ_STAGE_APPEND],
        .ns_other = s->forward.cpu.clock.ns[KVQ_STAGE_OTHER]};
}

kvq_status kvq_session_block(kvq_session *session, int32_t layer, int32_t kv_head, int32_t side,
                             int32_t block, uint8_t **data, uint64_t *bytes) {
    const kvq_config *const c = &session->model->config;
    if (layer < 0 || layer >= (int32_t)c->n_layers || kv_head < 0 ||
        kv_head >= (int32_t)c->n_kv_heads || side < 0 || side >= KVQ_SIDES || block < 0 ||
        block >= session->forward.rings[layer].n_sealed) {
        return kvq_fail(KVQ_ERR_ARGUMENT, "Layer %d, KV head %d, side %d has no sealed block %d.",
                        layer, kv_head, side, block);
    }
    const kvq_ring *const ring = &session->forward.rings[layer];
    kvq_device *const device = kvq_device_of(&session->forward, layer);
    *data = device->ops->block(device, layer, kv_head, side, block);
    *bytes = ring->track[side][kv_head].block_bytes;
    return check_gpu(session);
}

uint64_t kvq_session_digest(const kvq_session *session) {
    const kvq_config *const c = &session->model->config;
    return kvq_digest(session->tracks, (size_t)c->n_layers * KVQ_SIDES * c->n_kv_heads,
                      kvq_padded_width((int)c->d_head));
}
