/* forward.c: per layer: norm -> q, k, v -> RoPE -> attention -> output; norm -> gate, up -> down.
 */
#include "forward.h"

#include "ops.h"

/* ---- buffers ----------------------------------------------------------------------------- */

static size_t widest_input(const kvq_config *c) {
    size_t widest = c->d_model;
    if (widest < (size_t)c->n_heads * c->d_head) widest = (size_t)c->n_heads * c->d_head;
    if (widest < c->d_ff) widest = c->d_ff;
    return kvq_round_up(widest, 32);
}

void kvq_forward_lay_out(kvq_forward *f, kvq_arena *arena) {
    const kvq_config *const c = &f->model->config;
    const size_t n = (size_t)f->n_batch, wide = widest_input(c);
    const size_t q = (size_t)c->n_heads * c->d_head, kv = (size_t)c->n_kv_heads * c->d_head;
    f->x = kvq_arena_take(arena, n * c->d_model * 4);
    f->normed = kvq_arena_take(arena, n * c->d_model * 4);
    f->q = kvq_arena_take(arena, n * q * 4);
    f->k = kvq_arena_take(arena, n * kv * 4);
    f->v = kvq_arena_take(arena, n * kv * 4);
    f->heads = kvq_arena_take(arena, n * q * 4);
    f->gate = kvq_arena_take(arena, n * c->d_ff * 4);
    f->up = kvq_arena_take(arena, n * c->d_ff * 4);
    f->delta = kvq_arena_take(arena, n * c->d_model * 4);
    f->cos_sin = kvq_arena_take(arena, n * c->d_rope * 4);
    f->acts.q = kvq_arena_take(arena, n * wide * 2);
    f->acts.scale = kvq_arena_take(arena, n * wide / 32 * 4);
    f->acts.sums = kvq_arena_take(arena, n * wide / 32 * 4);
}

/* ---- products ---------------------------------------------------------------------------- */

enum { TOKENS_PER_TASK = 8, ROWS_PER_TASK = 32, MOST_TASKS = 256 };

static int tasks_for(size_t n, size_t per_task) { return (int)((n + per_task - 1) / per_task); }

/* y[t][w.rows] = w . acts[t] + bias; up to three matrices share the same input. */
typedef struct product {
    float *y;
    const kvq_tensor *w;
    const kvq_tensor *bias; /* NULL or absent: none */
    size_t y_stride;
} product;

typedef struct products {
    const kvq_forward *f;
    const product *list;
    int count;
    int tasks[3];       /* of each */
    size_t per_task[3]; /* rows */
} products;

/* The matrix of a task, and its first row there; NULL if there is no such task. The task after its
 * own is what a thread most likely takes next (not so at the end of its share). */
static const product *rows_of(const products *p, int task, size_t *first) {
    int i = 0;
    while (i < p->count && task >= p->tasks[i]) task -= p->tasks[i++];
    if (i == p->count) return NULL;
    *first = (size_t)task * p->per_task[i];
    return &p->list[i];
}

static void multiply_rows(void *context, int task, int worker) {
    const products *const p = context;
    size_t first = 0, next = 0;
    (void)worker;
    const product *const m = rows_of(p, task, &first), *const then = rows_of(p, task + 1, &next);
    const size_t left = m->w->rows - first, per_task = p->per_task[m - p->list];
    const size_t n = left < per_task ? left : per_task;
    kvq_run_matmul(p->f->isa, m->w->kind, m->y + first, m->y_stride,
                   m->w->data + first * m->w->row_bytes, n,
                   then ? then->w->data + next * then->w->row_bytes : NULL, &p->f->acts);
    if (!m->bias || !m->bias->data) return;
    const float *const bias = kvq_tensor_vector(m->bias) + first;
    for (size_t t = 0; t < p->f->acts.n_tok; t++) {
        float *const y = m->y + t * m->y_stride + first;
        for (size_t r = 0; r < n; r++) y[r] += bias[r];
    }
}

static void multiply(kvq_forward *f, const product *list, int count) {
    products p = {.f = f, .list = list, .count = count};
    int total = 0;
    for (int i = 0; i < count; i++) {
        const size_t rows = list[i].w->rows, share = (rows + MOST_TASKS - 1) / MOST_TASKS;
        p.per_task[i] = kvq_round_up(share > ROWS_PER_TASK ? share : ROWS_PER_TASK, 8);
        p.tasks[i] = tasks_for(rows, p.per_task[i]);
        total += p.tasks[i];
    }
    kvq_clock_end(&f->clock, KVQ_STAGE_OTHER);
    kvq_pool_run(f->pool, total, multiply_rows, &p);
    kvq_clock_end(&f->clock, KVQ_STAGE_WEIGHTS);
}

static void multiply_one(kvq_forward *f, float *y, const kvq_tensor *w, const kvq_tensor *bias) {
    multiply(f, &(product){.y = y, .w = w, .bias = bias, .y_stride = w->rows}, 1);
}

/* ---- work done token by token ------------------------------------------------------------ */

/* One call of an operation over the tokens of a pass, in tasks of TOKENS_PER_TASK. */
typedef struct by_token {
    kvq_forward *f;
    int n;
    void (*run)(kvq_forward *f, const void *what, int t);
    const void *what;
} by_token;

static void run_tokens(void *context, int task, int worker) {
    const by_token *const b = context;
    const int first = task * TOKENS_PER_TASK, end = first + TOKENS_PER_TASK;
    (void)worker;
    for (int t = first; t < (end < b->n ? end : b->n); t++) b->run(b->f, b->what, t);
}

static void for_tokens(kvq_forward *f, int n, void (*run)(kvq_forward *, const void *, int),
                       const void *what) {
    by_token b = {.f = f, .n = n, .run = run, .what = what};
    kvq_pool_run(f->pool, tasks_for((size_t)n, TOKENS_PER_TASK), run_tokens, &b);
}

/* Makes x[t][cols] the input of the products that follow. */
static void set_input(kvq_forward *f, const float *x, int n, size_t cols) {
    f->acts.x = x;
    f->acts.n_tok = (size_t)n;
    f->acts.n_cols = cols;
}

/* Quantized weights come in rows of whole blocks, so a width that is no multiple of 32 meets none.
 */
static void quantize_token(kvq_forward *f, int t) {
    if (f->isa->quantize && f->acts.n_cols % 32 == 0) f->isa->quantize(&f->acts, (size_t)t, 1);
}

static void embed_token(kvq_forward *f, const void *what, int t) {
    const kvq_pass *const pass = what;
    const kvq_config *const c = &f->model->config;
    const kvq_tensor *const w = &f->model->token_embd;
    kvq_weight_formats[w->kind].dequantize(
        f->x + (size_t)t * c->d_model, w->data + (size_t)pass->tokens[t] * w->row_bytes, w->cols);
    const float *const factors = kvq_tensor_vector(&f->model->rope_freqs);
    kvq_rope_angles(f->cos_sin + (size_t)t * c->d_rope, f->rings[0].n + t, (int)c->d_rope,
                    c->rope_base, c->rope_scale, factors);
}

static void norm_token(kvq_forward *f, const void *what, int t) {
    const kvq_config *const c = &f->model->config;
    const size_t at = (size_t)t * c->d_model;
    kvq_rms_norm(f->normed + at, f->x + at, kvq_tensor_vector(what), c->d_model, c->norm_epsilon);
    quantize_token(f, t);
}

static void rotate_token(kvq_forward *f, const void *what, int t) {
    const kvq_config *const c = &f->model->config;
    const float *const angles = f->cos_sin + (size_t)t * c->d_rope;
    const size_t q = (size_t)c->n_heads * c->d_head, kv = (size_t)c->n_kv_heads * c->d_head;
    const bool neox = c->rope == KVQ_ROPE_NEOX;
    (void)what;
    kvq_rope_rotate(f->q + (size_t)t * q, (int)c->n_heads, (int)c->d_head, angles, (int)c->d_rope,
                    neox);
    kvq_rope_rotate(f->k + (size_t)t * kv, (int)c->n_kv_heads, (int)c->d_head, angles,
                    (int)c->d_rope, neox);
}

static void quantize_heads(kvq_forward *f, const void *what, int t) {
    (void)what;
    quantize_token(f, t);
}

static void gate_token(kvq_forward *f, const void *what, int t) {
    const size_t at = (size_t)t * f->model->config.d_ff;
    (void)what;
    f->isa->swiglu(f->gate + at, f->up + at, f->model->config.d_ff);
    quantize_token(f, t);
}

static void add_delta(kvq_forward *f, const void *what, int t) {
    const size_t d = f->model->config.d_model;
    float *const x = f->x + (size_t)t * d;
    const float *const delta = f->delta + (size_t)t * d;
    (void)what;
    for (size_t i = 0; i < d; i++) x[i] += delta[i];
}

/* ---- research ---------------------------------------------------------------------------- */

void kvq_forward_simulate(const kvq_forward *f, int layer, int first, int end) {
    const kvq_ring *const ring = &f->rings[layer];
    const int d_head = (int)f->model->config.d_head, d = ring->d;
    for (int block = first; block < end; block++) {
        for (int side = 0; side < KVQ_SIDES; side++) {
            float *x = f->simulated;
            for (int i = 0; i < ring->n_heads * KVQ_BLOCK; i++, x += d_head) {
                const uint8_t *const rows =
                    kvq_ring_block(ring, i / KVQ_BLOCK, side, block) + i % KVQ_BLOCK * d * 2;
                for (int c = 0; c < d_head; c++) x[c] = kvq_load_f16(rows + 2 * c);
            }
            f->simulator(f->simulator_user, layer, side, ring->sinks + block * KVQ_BLOCK,
                         f->simulated);
            x = f->simulated;
            for (int i = 0; i < ring->n_heads * KVQ_BLOCK; i++, x += d_head) {
                uint8_t *const rows =
                    kvq_ring_block(ring, i / KVQ_BLOCK, side, block) + i % KVQ_BLOCK * d * 2;
                for (int c = 0; c < d_head; c++) {
                    const uint16_t half = kvq_f32_to_f16(x[c]);
                    memcpy(rows + 2 * c, &half, 2);
                }
            }
        }
    }
}

/* ---- the pass ---------------------------------------------------------------------------- */

static void run_layer(kvq_forward *f, int layer, int n) {
    const kvq_config *const c = &f->model->config;
    const kvq_layer *const l = &f->model->layers[layer];
    kvq_ring *const ring = &f->rings[layer];
    const int sealed_before = ring->n_sealed;

    set_input(f, f->normed, n, c->d_model);
    for_tokens(f, n, norm_token, &l->attn_norm);
    const product qkv[3] = {
        {f->q, &l->attn_q, &l->attn_q_bias, l->attn_q.rows},
        {f->k, &l->attn_k, &l->attn_k_bias, l->attn_k.rows},
        {f->v, &l->attn_v, &l->attn_v_bias, l->attn_v.rows},
    };
    multiply(f, qkv, 3);
    for_tokens(f, n, rotate_token, NULL);
    if (f->observer) f->observer(f->observer_user, layer, ring->n, n, f->q, f->k, f->v);
    kvq_clock_end(&f->clock, KVQ_STAGE_OTHER);
    kvq_attend(&f->attention, ring, f->heads, f->q, f->k, f->v, n);
    if (f->simulator) kvq_forward_simulate(f, layer, sealed_before, ring->n_sealed);
    set_input(f, f->heads, n, (size_t)c->n_heads * c->d_head);
    for_tokens(f, n, quantize_heads, NULL);
    multiply_one(f, f->delta, &l->attn_output, &l->attn_output_bias);
    for_tokens(f, n, add_delta, NULL);

    set_input(f, f->normed, n, c->d_model);
    for_tokens(f, n, norm_token, &l->ffn_norm);
    const product gate_up[2] = {
        {f->gate, &l->ffn_gate, NULL, l->ffn_gate.rows},
        {f->up, &l->ffn_up, NULL, l->ffn_up.rows},
    };
    multiply(f, gate_up, 2);
    set_input(f, f->gate, n, c->d_ff);
    for_tokens(f, n, gate_token, NULL);
    multiply_one(f, f->delta, &l->ffn_down, NULL);
    for_tokens(f, n, add_delta, NULL);
}

bool kvq_forward_run(kvq_forward *f, const kvq_pass *pass) {
    const kvq_model *const model = f->model;
    const kvq_config *const c = &model->config;
    int n = pass->n;
    kvq_clock_begin(&f->clock);
    for_tokens(f, n, embed_token, pass);
    for (uint32_t l = 0; l < c->n_layers; l++) {
        if (pass->progress && pass->progress(pass->user, pass->n_done, pass->n_total)) return false;
        if (atomic_load_explicit(pass->cancelled, memory_order_relaxed)) return false;
        run_layer(f, (int)l, n);
    }
    kvq_clock_end(&f->clock, KVQ_STAGE_OTHER);
    if (pass->which == KVQ_LOGITS_NONE) return true;
    if (pass->which == KVQ_LOGITS_LAST) {
        memmove(f->x, f->x + (size_t)(n - 1) * c->d_model, c->d_model * sizeof *f->x);
        n = 1;
    }
    set_input(f, f->normed, n, c->d_model);
    for_tokens(f, n, norm_token, &model->output_norm);
    multiply_one(f, pass->logits, &model->output, NULL);
    return true;
}
