/* forward.c: per layer: norm -> q, k, v -> RoPE -> attention -> output; norm -> gate, up -> down.
 */
#include "forward.h"

/* Passes on what a GPU has in q, k and v; on the CPU they are at hand. Of a pass that has failed
 * nothing is shown. */
static void observe(kvq_forward *f, kvq_device *device, int layer, const kvq_span *span) {
    const kvq_config *const c = &f->model->config;
    float *const *const to = f->cpu.buffer;
    const size_t n = (size_t)span->n, kv = n * c->n_kv_heads * c->d_head;
    const bool well =
        device->ops->read(device, KVQ_BUFFER_Q, to[KVQ_BUFFER_Q], n * c->n_heads * c->d_head) &&
        device->ops->read(device, KVQ_BUFFER_K, to[KVQ_BUFFER_K], kv) &&
        device->ops->read(device, KVQ_BUFFER_V, to[KVQ_BUFFER_V], kv);
    if (!well) return;
    f->observer(f->observer_user, layer, span->held, span->n, to[KVQ_BUFFER_Q], to[KVQ_BUFFER_K],
                to[KVQ_BUFFER_V]);
}

static void run_layer(kvq_forward *f, kvq_device *device, int layer, const kvq_span *span) {
    const kvq_device_ops *const run = device->ops;
    const kvq_layer *const l = &f->model->layers[layer];
    const int n = span->n;

    run->norm(device, &l->attn_norm, 0, n);
    const kvq_product qkv[3] = {
        {KVQ_BUFFER_Q, &l->attn_q, &l->attn_q_bias, false},
        {KVQ_BUFFER_K, &l->attn_k, &l->attn_k_bias, false},
        {KVQ_BUFFER_V, &l->attn_v, &l->attn_v_bias, false},
    };
    run->multiply(device, KVQ_BUFFER_NORMED, qkv, 3, n);
    run->rotate(device);
    if (f->observer) observe(f, device, layer, span);
    run->attend(device, layer);
    const kvq_product output = {KVQ_BUFFER_X, &l->attn_output, &l->attn_output_bias, true};
    run->multiply(device, KVQ_BUFFER_HEADS, &output, 1, n);

    run->norm(device, &l->ffn_norm, 0, n);
    const kvq_product gate_up[2] = {
        {KVQ_BUFFER_GATE, &l->ffn_gate, NULL, false},
        {KVQ_BUFFER_UP, &l->ffn_up, NULL, false},
    };
    run->multiply(device, KVQ_BUFFER_NORMED, gate_up, 2, n);
    run->gate(device);
    const kvq_product down = {KVQ_BUFFER_X, &l->ffn_down, NULL, true};
    run->multiply(device, KVQ_BUFFER_GATE, &down, 1, n);
}

static void run_head(kvq_forward *f, kvq_device *device, int n, kvq_logits which) {
    const int first = which == KVQ_LOGITS_LAST ? n - 1 : 0;
    const kvq_product output = {KVQ_BUFFER_LOGITS, &f->model->output, NULL, false};
    device->ops->norm(device, &f->model->output_norm, first, n - first);
    device->ops->multiply(device, KVQ_BUFFER_NORMED, &output, 1, n - first);
}

kvq_status kvq_forward_reserve(kvq_forward *f, int n_blocks) {
    return f->gpu ? f->gpu->ops->reserve(f->gpu, n_blocks) : KVQ_OK;
}

static bool is_stopped(const kvq_pass *pass) {
    return (pass->progress && pass->progress(pass->user, pass->n_done, pass->n_total)) ||
           atomic_load_explicit(pass->cancelled, memory_order_relaxed);
}

kvq_status kvq_forward_run(kvq_forward *f, const kvq_pass *pass) {
    const int n_layers = (int)f->model->config.n_layers;
    kvq_device *const cpu = &f->cpu.device, *device = cpu;
    float *const x = f->cpu.buffer[KVQ_BUFFER_X];
    const kvq_span span = {.n = pass->n,
                           .held = f->rings[0].n,
                           .cos_sin = f->cpu.cos_sin,
                           .logits = pass->which == KVQ_LOGITS_NONE ? NULL : pass->logits,
                           .is_watched = f->observer != NULL};
    const kvq_status room = kvq_forward_reserve(f, kvq_ring_sealed_after(&f->rings[0], span.n));
    if (room != KVQ_OK) return room;
    kvq_cpu_embed(&f->cpu, pass->tokens, span.n, span.held);
    cpu->ops->begin(cpu, &span, x);
    for (int l = 0; l < n_layers; l++) {
        if (kvq_device_of(f, l) != device) {
            device = f->gpu;
            device->ops->begin(device, &span, x);
        }
        if (is_stopped(pass)) {
            const kvq_status status = device->ops->finish(device);
            return status == KVQ_OK ? KVQ_CANCELLED : status;
        }
        run_layer(f, device, l, &span);
    }
    if (pass->which == KVQ_LOGITS_NONE) return device->ops->finish(device);
    if (device != cpu && !f->head_on_gpu) {
        device->ops->read(device, KVQ_BUFFER_X, x, (size_t)span.n * f->model->config.d_model);
        const kvq_status status = device->ops->finish(device);
        if (status != KVQ_OK) return status;
        device = cpu;
    }
    run_head(f, device, span.n, pass->which);
    return device->ops->finish(device);
}
