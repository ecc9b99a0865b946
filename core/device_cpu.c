/* device_cpu.c: the steps of a layer on threads of the processor. */
#include "device_cpu.h"

#include "ops.h"

static kvq_cpu *cpu_of(kvq_device *device) { return (kvq_cpu *)(void *)device; }

/* ---- buffers ----------------------------------------------------------------------------- */

static size_t widest_input(const kvq_config *c) {
    size_t widest = c->d_model;
    if (widest < (size_t)c->n_heads * c->d_head) widest = (size_t)c->n_heads * c->d_head;
    if (widest < c->d_ff) widest = c->d_ff;
    return kvq_round_up(widest, 32);
}

void kvq_cpu_lay_out(kvq_cpu *cpu, kvq_arena *arena) {
    const kvq_config *const c = &cpu->device.model->config;
    const size_t n = (size_t)cpu->n_batch, wide = widest_input(c);
    for (int i = 0; i < KVQ_BUFFER_LOGITS; i++) {
        cpu->buffer[i] = kvq_arena_take(arena, n * kvq_buffer_width(c, (kvq_buffer)i) * 4);
    }
    cpu->delta = kvq_arena_take(arena, n * c->d_model * 4);
    cpu->cos_sin = kvq_arena_take(arena, n * c->d_rope * 4);
    cpu->acts.q = kvq_arena_take(arena, n * wide * 2);
    cpu->acts.scale = kvq_arena_take(arena, n * kvq_activation_runs(wide) * 4);
    cpu->acts.sums = kvq_arena_take(arena, n * wide / 32 * 4);
}

/* ---- products ---------------------------------------------------------------------------- */

enum { TOKENS_PER_TASK = 8, MOST_TASKS = 256 };

static int tasks_for(size_t n, size_t per_task) { return (int)((n + per_task - 1) / per_task); }

typedef struct products {
    kvq_cpu *cpu;
    const kvq_product *list;
    int count;
    int tasks[3];       /* of each */
    size_t per_task[3]; /* rows */
} products;

/* The matrix of a task, and its first row there; NULL if there is no such task. The task after its
 * own is what a thread most likely takes next (not so at the end of its share, nor once it takes
 * those of others, from their ends). */
static const kvq_product *rows_of(const products *p, int task, size_t *first) {
    int i = 0;
    while (i < p->count && task >= p->tasks[i]) task -= p->tasks[i++];
    if (i == p->count) return NULL;
    *first = (size_t)task * p->per_task[i];
    return &p->list[i];
}

/* Where a product goes: sums are made on the side first. */
static float *target_of(kvq_cpu *cpu, const kvq_product *m) {
    return m->add ? cpu->delta : cpu->buffer[m->y];
}

static void multiply_rows(void *context, int task, int worker) {
    const products *const p = context;
    size_t first = 0, next = 0;
    (void)worker;
    const kvq_product *const m = rows_of(p, task, &first), *const then =
                                                               rows_of(p, task + 1, &next);
    const size_t left = m->w->rows - first, per_task = p->per_task[m - p->list];
    const size_t n = left < per_task ? left : per_task;
    float *const y = target_of(p->cpu, m) + first;
    kvq_run_matmul(p->cpu->isa, m->w->kind, y, m->w->rows, m->w->data + first * m->w->row_bytes, n,
                   then ? then->w->data + next * then->w->row_bytes : NULL, &p->cpu->acts);
    if (!m->bias || !m->bias->data) return;
    const float *const bias = kvq_tensor_vector(m->bias) + first;
    for (size_t t = 0; t < p->cpu->acts.n_tok; t++) {
        for (size_t r = 0; r < n; r++) y[t * m->w->rows + r] += bias[r];
    }
}

/* ---- work done token by token ------------------------------------------------------------ */

/* One operation over the tokens of a pass, in tasks of TOKENS_PER_TASK. */
typedef struct by_token {
    kvq_cpu *cpu;
    int n;
    void (*run)(kvq_cpu *cpu, const void *what, int t);
    const void *what;
} by_token;

static void run_tokens(void *context, int task, int worker) {
    const by_token *const b = context;
    const int first = task * TOKENS_PER_TASK, end = first + TOKENS_PER_TASK;
    (void)worker;
    for (int t = first; t < (end < b->n ? end : b->n); t++) b->run(b->cpu, b->what, t);
}

static void for_tokens(kvq_cpu *cpu, int n, void (*run)(kvq_cpu *, const void *, int),
                       const void *what) {
    by_token b = {.cpu = cpu, .n = n, .run = run, .what = what};
    kvq_pool_run(cpu->pool, tasks_for((size_t)n, TOKENS_PER_TASK), run_tokens, &b);
}

/* Makes a buffer the input of the products that follow. */
static void set_input(kvq_cpu *cpu, kvq_buffer buffer, int n) {
    cpu->acts.x = cpu->buffer[buffer];
    cpu->acts.n_tok = (size_t)n;
    cpu->acts.n_cols = kvq_buffer_width(&cpu->device.model->config, buffer);
}

/* Quantized weights come in rows of whole blocks, so a width that is no multiple of 32 meets none.
 */
static void quantize_token(kvq_cpu *cpu, int t) {
    if (cpu->isa->quantize && cpu->acts.n_cols % 32 == 0) {
        cpu->isa->quantize(&cpu->acts, (size_t)t, 1);
    }
}

/* ---- steps of a layer -------------------------------------------------------------------- */

static void embed_token(kvq_cpu *cpu, const void *what, int t) {
    const int32_t *const tokens = what;
    const kvq_config *const c = &cpu->device.model->config;
    const kvq_tensor *const w = &cpu->device.model->token_embd;
    kvq_weight_formats[w->kind].dequantize(cpu->buffer[KVQ_BUFFER_X] + (size_t)t * c->d_model,
                                           w->data + (size_t)tokens[t] * w->row_bytes, w->cols);
    const float *const factors = kvq_tensor_vector(&cpu->device.model->rope_freqs);
    kvq_rope_angles(cpu->cos_sin + (size_t)t * c->d_rope, cpu->embedded_at + t, (int)c->d_rope,
                    c->rope_base, c->rope_scale, factors);
}

void kvq_cpu_embed(kvq_cpu *cpu, const int32_t *tokens, int n, int held) {
    kvq_clock_begin(&cpu->clock);
    cpu->embedded_at = held;
    for_tokens(cpu, n, embed_token, tokens);
}

static kvq_status reserve(kvq_device *device, int n_blocks) {
    (void)device;
    (void)n_blocks; /* all memory is there since the session was opened */
    return KVQ_OK;
}

static void begin(kvq_device *device, const kvq_span *span, const float *x) {
    kvq_cpu *const cpu = cpu_of(device);
    (void)x; /* it is this device that embeds: it has them */
    cpu->span = *span;
    cpu->buffer[KVQ_BUFFER_LOGITS] = span->logits;
}

/* A norm's weight, and the first token it takes. */
typedef struct norm_call {
    const kvq_tensor *weight;
    int first;
} norm_call;

static void norm_token(kvq_cpu *cpu, const void *what, int t) {
    const kvq_config *const c = &cpu->device.model->config;
    const norm_call *const call = what;
    const size_t from = (size_t)(call->first + t) * c->d_model, to = (size_t)t * c->d_model;
    kvq_rms_norm(cpu->buffer[KVQ_BUFFER_NORMED] + to, cpu->buffer[KVQ_BUFFER_X] + from,
                 kvq_tensor_vector(call->weight), c->d_model, c->norm_epsilon);
    quantize_token(cpu, t);
}

static void norm(kvq_device *device, const kvq_tensor *weight, int first, int n) {
    kvq_cpu *const cpu = cpu_of(device);
    const norm_call call = {weight, first};
    set_input(cpu, KVQ_BUFFER_NORMED, n);
    for_tokens(cpu, n, norm_token, &call);
}

static void add_delta(kvq_cpu *cpu, const void *what, int t) {
    const kvq_product *const m = what;
    const size_t d = m->w->rows;
    float *const x = cpu->buffer[m->y] + (size_t)t * d;
    const float *const delta = cpu->delta + (size_t)t * d;
    for (size_t i = 0; i < d; i++) x[i] += delta[i];
}

static void multiply(kvq_device *device, kvq_buffer x, const kvq_product *list, int count, int n) {
    kvq_cpu *const cpu = cpu_of(device);
    products p = {.cpu = cpu, .list = list, .count = count};
    int total = 0;
    (void)x; /* the step before made it the input */
    for (int i = 0; i < count; i++) {
        const size_t rows = list[i].w->rows, share = (rows + MOST_TASKS - 1) / MOST_TASKS;
        p.per_task[i] = kvq_round_up(share, KVQ_PANEL_ROWS);
        p.tasks[i] = tasks_for(rows, p.per_task[i]);
        total += p.tasks[i];
    }
    kvq_clock_end(&cpu->clock, KVQ_STAGE_OTHER);
    kvq_pool_run(cpu->pool, total, multiply_rows, &p);
    kvq_clock_end(&cpu->clock, KVQ_STAGE_WEIGHTS);
    for (int i = 0; i < count; i++) {
        if (list[i].add) for_tokens(cpu, n, add_delta, &list[i]);
    }
}

static void rotate_token(kvq_cpu *cpu, const void *what, int t) {
    const kvq_config *const c = &cpu->device.model->config;
    const float *const angles = cpu->span.cos_sin + (size_t)t * c->d_rope;
    const size_t q = (size_t)c->n_heads * c->d_head, kv = (size_t)c->n_kv_heads * c->d_head;
    const bool neox = c->rope == KVQ_ROPE_NEOX;
    (void)what;
    kvq_rope_rotate(cpu->buffer[KVQ_BUFFER_Q] + (size_t)t * q, (int)c->n_heads, (int)c->d_head,
                    angles, (int)c->d_rope, neox);
    kvq_rope_rotate(cpu->buffer[KVQ_BUFFER_K] + (size_t)t * kv, (int)c->n_kv_heads, (int)c->d_head,
                    angles, (int)c->d_rope, neox);
}

static void rotate(kvq_device *device) {
    kvq_cpu *const cpu = cpu_of(device);
    for_tokens(cpu, cpu->span.n, rotate_token, NULL);
}

static void quantize_heads(kvq_cpu *cpu, const void *what, int t) {
    (void)what;
    quantize_token(cpu, t);
}

static void attend(kvq_device *device, int layer) {
    kvq_cpu *const cpu = cpu_of(device);
    kvq_ring *const ring = &device->rings[layer];
    const int sealed_before = ring->n_sealed, n = cpu->span.n;
    kvq_clock_end(&cpu->clock, KVQ_STAGE_OTHER);
    kvq_attend(&cpu->attention, ring, cpu->buffer[KVQ_BUFFER_HEADS], cpu->buffer[KVQ_BUFFER_Q],
               cpu->buffer[KVQ_BUFFER_K], cpu->buffer[KVQ_BUFFER_V], n);
    if (cpu->simulator) kvq_cpu_simulate(cpu, layer, sealed_before, ring->n_sealed);
    set_input(cpu, KVQ_BUFFER_HEADS, n);
    for_tokens(cpu, n, quantize_heads, NULL);
}

static void gate_token(kvq_cpu *cpu, const void *what, int t) {
    const size_t d_ff = cpu->device.model->config.d_ff, at = (size_t)t * d_ff;
    (void)what;
    cpu->isa->swiglu(cpu->buffer[KVQ_BUFFER_GATE] + at, cpu->buffer[KVQ_BUFFER_UP] + at, d_ff);
    quantize_token(cpu, t);
}

static void gate(kvq_device *device) {
    kvq_cpu *const cpu = cpu_of(device);
    set_input(cpu, KVQ_BUFFER_GATE, cpu->span.n);
    for_tokens(cpu, cpu->span.n, gate_token, NULL);
}

static bool read(kvq_device *device, kvq_buffer buffer, float *out, size_t n) {
    const float *const from = cpu_of(device)->buffer[buffer];
    if (out != from) memcpy(out, from, n * sizeof *out);
    return true;
}

static kvq_status finish(kvq_device *device) {
    kvq_clock_end(&cpu_of(device)->clock, KVQ_STAGE_OTHER);
    return KVQ_OK;
}

/* ---- the cache --------------------------------------------------------------------------- */

static void truncate_layer(kvq_device *device, int layer, int n) {
    kvq_ring_truncate(&device->rings[layer], n);
}

static void seal_layer(kvq_device *device, int layer, int n_sealed) {
    const kvq_cpu *const cpu = cpu_of(device);
    kvq_ring *const ring = &device->rings[layer];
    const int before = ring->n_sealed;
    kvq_ring_seal(ring, n_sealed);
    if (cpu->simulator) kvq_cpu_simulate(cpu, layer, before, ring->n_sealed);
}

static void repeat_layer(kvq_device *device, int layer, int n) {
    kvq_ring_repeat(&device->rings[layer], n);
}

static uint8_t *block_of(kvq_device *device, int layer, int head, int side, int block) {
    return kvq_ring_block(&device->rings[layer], head, side, block);
}

void kvq_cpu_init(kvq_cpu *cpu) {
    static const kvq_device_ops ops = {
        .reserve = reserve,
        .begin = begin,
        .norm = norm,
        .multiply = multiply,
        .rotate = rotate,
        .attend = attend,
        .gate = gate,
        .read = read,
        .finish = finish,
        .truncate = truncate_layer,
        .seal = seal_layer,
        .repeat = repeat_layer,
        .block = block_of,
    };
    cpu->device.ops = &ops;
}

/* ---- research ---------------------------------------------------------------------------- */

void kvq_cpu_simulate(const kvq_cpu *cpu, int layer, int first, int end) {
    const kvq_ring *const ring = &cpu->device.rings[layer];
    const int d_head = (int)cpu->device.model->config.d_head, d = ring->d;
    for (int block = first; block < end; block++) {
        for (int side = 0; side < KVQ_SIDES; side++) {
            float *x = cpu->simulated;
            for (int i = 0; i < ring->n_heads * KVQ_BLOCK; i++, x += d_head) {
                const uint8_t *const rows =
                    kvq_ring_block(ring, i / KVQ_BLOCK, side, block) + i % KVQ_BLOCK * d * 2;
                for (int c = 0; c < d_head; c++) x[c] = kvq_load_f16(rows + 2 * c);
            }
            cpu->simulator(cpu->simulator_user, layer, side, ring->sinks + block * KVQ_BLOCK,
                           cpu->simulated);
            x = cpu->simulated;
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
