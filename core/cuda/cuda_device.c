/* cuda_device.c: the steps of a layer as launches of kernels; see cuda_device.h.
 *
 * A token alone is a graph: its launches are the same each time, since what changes with the
 * position lies in memory of the device. The second one is recorded, the next ones replay it.
 */
#include "cuda/cuda_device.h"

#include <stdarg.h>
#include <stdio.h>

#include "cuda/cuda_layout.h"
#include "cuda/cuda_state.h"
#include "cuda/kernels/elementwise_args.h"
#include "cuda/kernels/matmul_args.h"
#include "cuda/kernels/prepare_args.h"

enum {
    /* Blocks of threads that splits make for each multiprocessor, which may be more than are
     * resident at once: of attend_W; and of decode_KIND_W, which hides little latency in a warp. */
    ATTEND_BLOCKS = 2,
    DECODE_BLOCKS = 4,
    LOGITS_BYTES = 64 << 20, /* room for logits: of one token at least */
    CHUNK_BYTES = 32 << 20,  /* of sealed blocks, about */
    PAGE_BYTES = 2 << 20,    /* what drivers give memory in, where more than that is asked for */
};

/* ---- failures, launches ------------------------------------------------------------------- */

bool kvq_cuda_did(kvq_cuda *cuda, CUresult result, const char *what, ...) {
    if (result == CUDA_SUCCESS) return cuda->status == KVQ_OK;
    if (cuda->status != KVQ_OK) return false;
    char call[200];
    va_list list;
    va_start(list, what);
    vsnprintf(call, sizeof call, what, list);
    va_end(list);
    cuda->status = kvq_cuda_check(cuda->api, result, "%s", call);
    snprintf(cuda->error, sizeof cuda->error, "%s", kvq_error());
    return false;
}

void kvq_cuda_put(kvq_cuda *cuda, CUdeviceptr to, const void *from, size_t bytes,
                  const char *what) {
    if (cuda->status != KVQ_OK) return;
    kvq_cuda_did(cuda, kvq_cuda_copy_up(cuda->api, to, from, bytes, cuda->stream),
                 "cuMemcpyHtoDAsync and cuStreamSynchronize of %s", what);
}

void kvq_cuda_launch(kvq_cuda *cuda, kvq_cuda_kernel_id kernel, unsigned grid_x, unsigned grid_y,
                     unsigned grid_z, unsigned threads, size_t shared, const void *args) {
    void *parameters[] = {(void *)(uintptr_t)args};
    if (cuda->status != KVQ_OK || cuda->mode == KVQ_CUDA_REPLAYS) return;
    kvq_cuda_did(cuda,
                 cuda->api->cuLaunchKernel(cuda->gpu->kernels.functions[kernel], grid_x, grid_y,
                                           grid_z, threads, 1, 1, (unsigned)shared, cuda->stream,
                                           parameters, NULL),
                 "cuLaunchKernel of %s", kvq_cuda_kernel_name(kernel));
}

bool kvq_cuda_enter(kvq_cuda *cuda) {
    const CUresult result = cuda->api->cuCtxPushCurrent(cuda->gpu->context);
    cuda->is_current = result == CUDA_SUCCESS;
    kvq_cuda_did(cuda, result, "cuCtxPushCurrent");
    if (cuda->lent) {
        kvq_cuda_put(cuda, cuda->lent_from, cuda->lent, cuda->lent_bytes, "a sealed block");
        cuda->lent = NULL;
    }
    return cuda->status == KVQ_OK;
}

void kvq_cuda_leave(kvq_cuda *cuda) {
    CUcontext left;
    if (cuda->is_current) cuda->api->cuCtxPopCurrent(&left);
    cuda->is_current = false;
}

static const kvq_config *config_of(const kvq_cuda *cuda) { return &cuda->device.model->config; }

static const kvq_tensor *on_device(const kvq_cuda *cuda, const kvq_tensor *tensor) {
    return kvq_cuda_weights_find(cuda->weights, cuda->device.model, tensor);
}

static unsigned over(size_t n, size_t per_block) {
    return (unsigned)((n + per_block - 1) / per_block);
}

/* ---- layout ------------------------------------------------------------------------------- */

static int smaller(int a, int b) { return a < b ? a : b; }
static int larger(int a, int b) { return a > b ? a : b; }

/* Rows and matrices of tracks that go to the device: the same function counts and places them. */
typedef struct tables {
    kvq_arena *arena;
    kvq_cuda *cuda;
} tables;

static const void *place_table(tables *t, const void *from, size_t bytes) {
    void *const to = kvq_arena_take(t->arena, bytes);
    if (to) kvq_cuda_put(t->cuda, kvq_cuda_address(to), from, bytes, "a basis");
    return to;
}

static void place_tables(tables *t, kvq_cuda_track *track) {
    const size_t d = (size_t)track->shape.d, matrix = d * d * sizeof(float);
    const size_t waves = (size_t)track->n_waves;
    if (track->order) track->order = place_table(t, track->order, d * sizeof *track->order);
    if (track->store) track->store = place_table(t, track->store, matrix);
    if (track->query) track->query = place_table(t, track->query, matrix);
    if (track->restore) track->restore = place_table(t, track->restore, matrix);
    if (track->mean) track->mean = place_table(t, track->mean, d * sizeof *track->mean);
    if (!waves) return;
    track->pair = place_table(t, track->pair, waves * sizeof *track->pair);
    track->wave_u = place_table(t, track->wave_u, waves * d * sizeof *track->wave_u);
    track->wave_w = place_table(t, track->wave_w, waves * d * sizeof *track->wave_w);
}

/* Splits of the context for tiles of queries, so that there is work for all multiprocessors. */
static int splits_for(const kvq_cuda *cuda, size_t tiles, int per_processor) {
    const size_t wanted = (size_t)(per_processor * cuda->n_processors);
    return smaller((int)((wanted + tiles - 1) / tiles), KVQ_CUDA_MOST_SPLITS);
}

/* Of decode_KIND_W: no more than give each warp a sealed block once the context is full, and one
 * for all other rows. */
static int decode_splits(const kvq_cuda *cuda, const kvq_ring *ring) {
    const kvq_config *const c = config_of(cuda);
    const size_t tiles = c->n_kv_heads * over(c->n_heads / c->n_kv_heads, 8);
    const int useful = (int)over((size_t)ring->max_blocks, KVQ_CUDA_DECODE_WARPS);
    const int splits = splits_for(cuda, tiles, DECODE_BLOCKS);
    return larger(smaller(smaller(splits, useful), KVQ_CUDA_MOST_SPLITS - 1), 1) + 1;
}

/* Of the kernel of attention for a width. */
typedef struct attend_shape {
    kvq_cuda_kernel_id kernel;
    int width; /* of the widest heads that it takes */
    int rows, slices, threads;
    uint32_t shared;
} attend_shape;

static attend_shape shape_of_attend(int d) {
    const int W = d <= 64 ? 64 : d <= 128 ? 128 : 256, slice = KVQ_CUDA_ATTEND_SLICE(W);
    return (attend_shape){.kernel = W == 64    ? KVQ_KERNEL_attend_64
                                    : W == 128 ? KVQ_KERNEL_attend_128
                                               : KVQ_KERNEL_attend_256,
                          .width = W,
                          .rows = 16 * KVQ_CUDA_ATTEND_WARPS(W),
                          .slices = (d + slice - 1) / slice,
                          .threads = 32 * KVQ_CUDA_ATTEND_WARPS(W),
                          .shared = kvq_cuda_attend_shared(W, d)};
}

/* Lays out the device's one allocation, twice as kvq_arena is used. The second time tables are
 * filled. tracks: those of the device's layers. */
static void lay_out(kvq_cuda *cuda, kvq_arena *arena, kvq_cuda_bytes *bytes,
                    const kvq_track *tracks, const kvq_turns *turns, kvq_cuda_track *placed) {
    const kvq_config *const c = config_of(cuda);
    const kvq_ring *const ring = &cuda->device.rings[cuda->first_layer];
    const size_t n = (size_t)cuda->n_batch, layers = c->n_layers - (size_t)cuda->first_layer;
    const size_t d = (size_t)ring->d, kv_heads = c->n_kv_heads, row = d * sizeof(uint16_t);
    const size_t n_tracks = layers * KVQ_SIDES * kv_heads;
    size_t before = arena->used;

    cuda->step = kvq_arena_take(arena, sizeof *cuda->step);
    cuda->seal_step = kvq_arena_take(arena, sizeof *cuda->seal_step);
    cuda->cos_sin = kvq_arena_take(arena, n * c->d_rope * sizeof(float));
    for (int i = 0; i < KVQ_BUFFERS; i++) {
        const size_t rows = i == KVQ_BUFFER_LOGITS ? (size_t)cuda->n_logits : n;
        cuda->buffer[i] =
            kvq_arena_take(arena, rows * kvq_buffer_width(c, (kvq_buffer)i) * sizeof(float));
    }
    size_t widest = 0;
    for (int i = 0; i < KVQ_BUFFER_LOGITS; i++) {
        const size_t width = kvq_buffer_width(c, (kvq_buffer)i);
        if (width > widest) widest = width;
    }
    cuda->halves =
        kvq_arena_take(arena, n * (size_t)kvq_cuda_halves_in_row((int)widest) * sizeof(uint16_t));
    cuda->unscale = kvq_arena_take(arena, n * sizeof(float));
    cuda->queries = kvq_arena_take(arena, n * c->n_heads * d * sizeof(float));
    cuda->partial =
        kvq_arena_take(arena, (size_t)cuda->partial_rows * kv_heads * (d + 2) * sizeof(float));
    uint16_t *new_rows[KVQ_SIDES];
    for (int side = 0; side < KVQ_SIDES; side++) {
        new_rows[side] = kvq_arena_take(arena, n * kv_heads * row);
    }
    bytes->scratch = arena->used - before;

    before = arena->used;
    cuda->tracks = kvq_arena_take(arena, n_tracks * sizeof *cuda->tracks);
    cuda->chunks = kvq_arena_take(arena, (size_t)cuda->max_chunks * sizeof *cuda->chunks);
    kvq_cuda_place_tracks(placed, tracks, n_tracks);
    tables t = {.arena = arena, .cuda = cuda};
    for (size_t i = 0; i < n_tracks; i++) place_tables(&t, &placed[i]);
    const float *within = NULL, *first = NULL;
    if (turns) {
        const size_t pairs = (size_t)turns->n_pairs * 2 * sizeof(float);
        within = place_table(&t, turns->within, pairs * KVQ_BLOCK);
        first = place_table(&t, turns->first, pairs * (size_t)ring->max_blocks);
    }
    if (arena->base) {
        kvq_cuda_put(cuda, kvq_cuda_address(cuda->tracks), placed, n_tracks * sizeof *placed,
                     "tracks");
    }
    bytes->tables = arena->used - before;

    before = arena->used;
    for (size_t l = 0; l < layers; l++) {
        kvq_cuda_cache cache = {.step = cuda->step,
                                .tracks =
                                    cuda->tracks ? cuda->tracks + l * KVQ_SIDES * kv_heads : NULL,
                                .chunks = cuda->chunks,
                                .new_rows = {new_rows[0], new_rows[1]},
                                .turns_within = within,
                                .turns_first = first,
                                .n_pairs = turns ? turns->n_pairs : 0,
                                .chunk_blocks = cuda->chunk_blocks,
                                .n_heads = (int)kv_heads,
                                .group = (int)(c->n_heads / c->n_kv_heads),
                                .d_head = (int)c->d_head,
                                .d = (int)d,
                                .n_sinks = ring->sinks,
                                .recent_rows = ring->recent_rows,
                                .n_batch = cuda->n_batch};
        for (int side = 0; side < KVQ_SIDES; side++) {
            cache.sinks[side] = kvq_arena_take(arena, kv_heads * (size_t)ring->sinks * row);
            cache.recent[side] = kvq_arena_take(arena, kv_heads * (size_t)ring->recent_rows * row);
        }
        if (cuda->caches) cuda->caches[l] = cache;
    }
    bytes->rows = arena->used - before;
}

static uint64_t in_pages(uint64_t bytes) {
    return bytes > PAGE_BYTES ? kvq_round_up(bytes, PAGE_BYTES) : bytes;
}

/* How many blocks a chunk has: of those that make about CHUNK_BYTES, what leaves the smallest part
 * of its pages unused. */
static int blocks_in_chunk(uint64_t block_bytes) {
    const uint64_t most = block_bytes < CHUNK_BYTES ? CHUNK_BYTES / block_bytes : 1;
    uint64_t best = most;
    for (uint64_t n = most; n > most / 2; n--) {
        if (in_pages(n * block_bytes) * best < in_pages(best * block_bytes) * n) best = n;
    }
    return (int)best;
}

/* Numbers that the layout depends on. */
static void set_shape(kvq_cuda *cuda, const kvq_cuda_options *o, kvq_cuda_bytes *bytes,
                      uint64_t block_of_all) {
    const kvq_config *const c = config_of(cuda);
    const kvq_ring *const ring = &o->rings[o->first_layer];
    const int group = (int)(c->n_heads / c->n_kv_heads);
    const size_t logits = LOGITS_BYTES / (c->n_vocab * sizeof(float));
    cuda->n_logits = o->head ? larger(smaller((int)logits, o->n_batch), 1) : 0;
    cuda->partial_rows = larger(o->n_batch, decode_splits(cuda, ring)) * group;
    cuda->chunk_blocks = larger(smaller(blocks_in_chunk(block_of_all), ring->max_blocks), 1);
    cuda->max_chunks = (ring->max_blocks + cuda->chunk_blocks - 1) / cuda->chunk_blocks;
    cuda->chunk_bytes = in_pages((uint64_t)cuda->chunk_blocks * block_of_all);
    bytes->chunk = cuda->chunk_bytes;
    bytes->sealed = cuda->chunk_bytes * (uint64_t)cuda->max_chunks;
    bytes->weights = kvq_cuda_weights_bytes(o->model, o->first_layer, o->head);
}

static kvq_status measure(kvq_cuda *cuda, kvq_cuda_bytes *bytes, const kvq_cuda_options *o,
                          int n_processors) {
    const kvq_config *const c = &o->model->config;
    const size_t per_layer = KVQ_SIDES * (size_t)c->n_kv_heads;
    const size_t n_tracks = (c->n_layers - (size_t)o->first_layer) * per_layer;
    const int d = o->rings[o->first_layer].d;
    if (d > KVQ_CUDA_D_MAX) {
        return kvq_fail(KVQ_ERR_UNSUPPORTED,
                        "The heads of the model are %u wide; kernels for CUDA take up to %d.",
                        c->d_head, KVQ_CUDA_D_MAX);
    }
    kvq_cuda_track *const placed = kvq_alloc(n_tracks * sizeof *placed);
    if (!placed) return kvq_fail(KVQ_ERR_MEMORY, "There is no memory for a session.");
    const kvq_track *const tracks = o->tracks + (size_t)o->first_layer * per_layer;
    kvq_arena arena = {0};
    cuda->device.model = o->model;
    cuda->device.rings = o->rings;
    cuda->first_layer = o->first_layer;
    cuda->has_head = o->head;
    cuda->n_batch = o->n_batch;
    cuda->n_processors = n_processors;
    *bytes = (kvq_cuda_bytes){0};
    set_shape(cuda, o, bytes, kvq_cuda_place_tracks(placed, tracks, n_tracks));
    lay_out(cuda, &arena, bytes, tracks, o->turns, placed);
    cuda->fixed_bytes = arena.used;
    kvq_free(placed);
    return KVQ_OK;
}

kvq_status kvq_cuda_measure(kvq_cuda_bytes *out, const kvq_cuda_options *options,
                            int n_processors) {
    kvq_cuda cuda = {0};
    return measure(&cuda, out, options, n_processors);
}

/* ---- a pass ------------------------------------------------------------------------------- */

/* Copies a part of the staging memory, at *at, to the device. */
static void stage(kvq_cuda *cuda, size_t *at, void *to, const void *from, size_t bytes) {
    memcpy(cuda->staging + *at, from, bytes);
    kvq_cuda_did(cuda,
                 cuda->api->cuMemcpyHtoDAsync(kvq_cuda_address(to), cuda->staging + *at, bytes,
                                              cuda->stream),
                 "cuMemcpyHtoDAsync of %zu bytes", bytes);
    *at += kvq_round_up(bytes, KVQ_ALIGN);
}

static kvq_cuda_graph *graph_of(kvq_cuda *cuda) {
    return &cuda->graphs[cuda->span.logits != NULL && cuda->has_head];
}

static void begin(kvq_device *device, const kvq_span *span, const float *x) {
    kvq_cuda *const cuda = kvq_cuda_of(device);
    const kvq_config *const c = config_of(cuda);
    const kvq_ring *const ring = &device->rings[cuda->first_layer];
    const kvq_cuda_step step = {.n = span->n,
                                .held = ring->n,
                                .sealed = ring->n_sealed,
                                .seals = kvq_ring_sealed_after(ring, span->n) - ring->n_sealed};
    const size_t n = (size_t)span->n;
    size_t at = 0;
    cuda->span = *span;
    cuda->mode = KVQ_CUDA_RUNS;
    cuda->logits_rows = 0;
    if (!kvq_cuda_enter(cuda)) return;
    stage(cuda, &at, cuda->step, &step, sizeof step);
    stage(cuda, &at, cuda->cos_sin, span->cos_sin, n * c->d_rope * sizeof(float));
    stage(cuda, &at, cuda->buffer[KVQ_BUFFER_X], x, n * c->d_model * sizeof(float));
    if (cuda->status != KVQ_OK) return;
    const kvq_cuda_graph *const graph = graph_of(cuda);
    if (span->n > 1 || span->is_watched || !graph->has_run) return;
    if (graph->recorded) {
        cuda->mode = KVQ_CUDA_REPLAYS;
        kvq_cuda_did(cuda, cuda->api->cuGraphLaunch(graph->recorded, cuda->stream),
                     "cuGraphLaunch");
    } else if (kvq_cuda_did(
                   cuda,
                   cuda->api->cuStreamBeginCapture(cuda->stream, CU_STREAM_CAPTURE_MODE_RELAXED),
                   "cuStreamBeginCapture")) {
        cuda->mode = KVQ_CUDA_RECORDS;
    }
}

static void norm(kvq_device *device, const kvq_tensor *weight, int first, int n) {
    kvq_cuda *const cuda = kvq_cuda_of(device);
    const kvq_config *const c = config_of(cuda);
    const kvq_cuda_norm_args args = {
        .x = cuda->buffer[KVQ_BUFFER_X] + (size_t)first * c->d_model,
        .w = kvq_tensor_vector(on_device(cuda, weight)),
        .y = cuda->buffer[KVQ_BUFFER_NORMED],
        .epsilon = c->norm_epsilon,
        .n = n,
        .d_model = (int32_t)c->d_model,
    };
    kvq_cuda_launch(cuda, KVQ_KERNEL_norm, (unsigned)n, 1, 1, KVQ_ELEMENTWISE_THREADS, 0, &args);
}

/* Of each weight format: products with 1, up to 4 and up to 8 tokens, and with many. */
static const kvq_cuda_kernel_id matvecs[KVQ_WEIGHT_KINDS][3] = {
#define KVQ_WEIGHT(NAME, ID, BLOCK, BYTES)                                                         \
    {KVQ_KERNEL_matvec_##NAME##_1, KVQ_KERNEL_matvec_##NAME##_4, KVQ_KERNEL_matvec_##NAME##_8},
#include "weights.def"
#undef KVQ_WEIGHT
};

static const kvq_cuda_kernel_id gemms[KVQ_WEIGHT_KINDS] = {
#define KVQ_WEIGHT(NAME, ID, BLOCK, BYTES) KVQ_KERNEL_gemm_##NAME,
#include "weights.def"
#undef KVQ_WEIGHT
};

/* Products of matrices of one format. With many tokens the input goes to tensor cores in halves,
 * which halve_input() has made. */
static void multiply_alike(kvq_cuda *cuda, kvq_weight_kind kind, kvq_cuda_matmul_args *a) {
    if (a->n > KVQ_MATVEC_TOKENS) {
        const kvq_cuda_launch_shape shape = kvq_cuda_gemm_shape(a);
        a->halves = cuda->halves;
        a->unscale = cuda->unscale;
        kvq_cuda_launch(cuda, gemms[kind], shape.blocks, shape.blocks_y, 1, shape.threads,
                        shape.shared_bytes, a);
        return;
    }
    const int tokens = kvq_cuda_matvec_tokens(a->n);
    const kvq_cuda_launch_shape shape = kvq_cuda_matvec_shape(a, cuda->n_processors);
    kvq_cuda_launch(cuda,
                    matvecs[kind][tokens == 1   ? 0
                                  : tokens == 4 ? 1
                                                : 2],
                    shape.blocks, shape.blocks_y, 1, shape.threads, shape.shared_bytes, a);
}

static void halve_input(kvq_cuda *cuda, const float *x, int n, int n_cols) {
    const kvq_cuda_halve_args args = {
        .x = x, .halves = cuda->halves, .unscale = cuda->unscale, .n = n, .n_cols = n_cols};
    kvq_cuda_launch(cuda, KVQ_KERNEL_halve, (unsigned)n, 1, 1, KVQ_HALVE_THREADS, 0, &args);
}

static void multiply_from(kvq_cuda *cuda, const float *x, const kvq_product *list, int count,
                          int n) {
    if (n > KVQ_MATVEC_TOKENS) halve_input(cuda, x, n, (int)list[0].w->cols);
    for (int first = 0, end; first < count; first = end) {
        const kvq_weight_kind kind = list[first].w->kind;
        kvq_cuda_matmul_args args = {
            .x = x, .n = n, .n_cols = (int32_t)list[first].w->cols, .add = list[first].add};
        for (end = first; end < count && list[end].w->kind == kind; end++) {
            const kvq_tensor *const w = on_device(cuda, list[end].w);
            const kvq_tensor *const bias = list[end].bias;
            args.matrices[args.n_matrices++] = (kvq_cuda_matrix){
                .w = w->data,
                .bias = bias && bias->data ? kvq_tensor_vector(on_device(cuda, bias)) : NULL,
                .y = cuda->buffer[list[end].y],
                .n_rows = (int32_t)w->rows,
                .y_stride = (int32_t)w->rows,
            };
        }
        multiply_alike(cuda, kind, &args);
    }
}

/* Logits of `rows` tokens from token `first` on, to memory of the host. */
static void fetch_logits(kvq_cuda *cuda, int first, int rows) {
    const size_t n_vocab = config_of(cuda)->n_vocab, bytes = (size_t)rows * n_vocab * sizeof(float);
    if (cuda->status != KVQ_OK || !rows) return;
    kvq_cuda_did(cuda,
                 cuda->api->cuMemcpyDtoHAsync(cuda->span.logits + (size_t)first * n_vocab,
                                              kvq_cuda_address(cuda->buffer[KVQ_BUFFER_LOGITS]),
                                              bytes, cuda->stream),
                 "cuMemcpyDtoHAsync of logits");
}

static void multiply(kvq_device *device, kvq_buffer x, const kvq_product *list, int count, int n) {
    kvq_cuda *const cuda = kvq_cuda_of(device);
    const float *const input = cuda->buffer[x];
    if (list[0].y != KVQ_BUFFER_LOGITS) {
        multiply_from(cuda, input, list, count, n);
        return;
    }
    cuda->logits_rows = n;
    for (int done = 0; done < n; done += cuda->n_logits) { /* all but the last wait for nobody */
        const int rows = smaller(cuda->n_logits, n - done);
        multiply_from(cuda, input + (size_t)done * list[0].w->cols, list, count, rows);
        if (n > cuda->n_logits) fetch_logits(cuda, done, rows);
    }
}

static void rotate(kvq_device *device) {
    kvq_cuda *const cuda = kvq_cuda_of(device);
    const kvq_config *const c = config_of(cuda);
    const kvq_cuda_rotate_args args = {
        .q = cuda->buffer[KVQ_BUFFER_Q],
        .k = cuda->buffer[KVQ_BUFFER_K],
        .cos_sin = cuda->cos_sin,
        .n = cuda->span.n,
        .n_heads = (int32_t)c->n_heads,
        .n_kv_heads = (int32_t)c->n_kv_heads,
        .d_head = (int32_t)c->d_head,
        .d_rope = (int32_t)c->d_rope,
        .neox = c->rope == KVQ_ROPE_NEOX,
    };
    const size_t pairs = (size_t)(c->n_heads + c->n_kv_heads) * c->d_rope / 2;
    kvq_cuda_launch(cuda, KVQ_KERNEL_rotate, over(pairs, KVQ_ELEMENTWISE_THREADS),
                    (unsigned)cuda->span.n, 1, KVQ_ELEMENTWISE_THREADS, 0, &args);
}

static void merge_splits(kvq_cuda *cuda, const kvq_cuda_cache *cache, int n_splits) {
    const kvq_cuda_merge_args args = {.cache = *cache,
                                      .partial = cuda->partial,
                                      .out = cuda->buffer[KVQ_BUFFER_HEADS],
                                      .n_splits = n_splits};
    kvq_cuda_launch(cuda, KVQ_KERNEL_merge, (unsigned)(cuda->span.n * cache->group),
                    (unsigned)cache->n_heads, 1, KVQ_CUDA_MERGE_THREADS, 0, &args);
}

static void attend_all(kvq_cuda *cuda, const kvq_cuda_cache *cache) {
    const int rows = cuda->span.n * cache->group;
    const attend_shape shape = shape_of_attend(cache->d);
    const unsigned tiles = over((size_t)rows, (size_t)shape.rows);
    const size_t blocks = (size_t)tiles * (size_t)(cache->n_heads * shape.slices);
    const kvq_cuda_attend_args args = {
        .cache = *cache,
        .q = cuda->queries,
        .partial = cuda->partial,
        .n_splits = smaller(splits_for(cuda, blocks, ATTEND_BLOCKS), cuda->partial_rows / rows),
    };
    kvq_cuda_launch(cuda, shape.kernel, tiles, (unsigned)cache->n_heads,
                    (unsigned)(args.n_splits * shape.slices), (unsigned)shape.threads, shape.shared,
                    &args);
    merge_splits(cuda, cache, args.n_splits);
}

/* The kind of kernel of one token that takes all KV heads of a layer. */
static kvq_cuda_decode_kind decode_kind(const kvq_ring *ring) {
    kvq_cuda_decode_kind all = KVQ_CUDA_DECODE_NONE;
    for (int head = 0; head < ring->n_heads; head++) {
        const kvq_track *const keys = &ring->track[KVQ_KEYS][head];
        const kvq_track *const values = &ring->track[KVQ_VALUES][head];
        const kvq_cuda_decode_kind kind = kvq_cuda_decode_kind_of(
            keys->codec, &keys->shape, keys->wave.n, values->codec, &values->shape);
        if (head > 0 && kind != all) return KVQ_CUDA_DECODE_NONE;
        all = kind;
    }
    return all;
}

static void attend_one(kvq_cuda *cuda, const kvq_cuda_cache *cache, const kvq_ring *ring,
                       kvq_cuda_decode_kind kind) {
    static const kvq_cuda_kernel_id kernels[][2] = {
        [KVQ_CUDA_DECODE_HALVES] = {KVQ_KERNEL_decode_halves_64, KVQ_KERNEL_decode_halves_128},
        [KVQ_CUDA_DECODE_PAIRS] = {KVQ_KERNEL_decode_pairs_64, KVQ_KERNEL_decode_pairs_128},
        [KVQ_CUDA_DECODE_TRELLIS] = {KVQ_KERNEL_decode_trellis_64, KVQ_KERNEL_decode_trellis_128},
    };
    const unsigned eights = over((size_t)cache->group, 8);
    const kvq_cuda_attend_args args = {
        .cache = *cache,
        .q = cuda->queries,
        .partial = cuda->partial,
        .n_splits = decode_splits(cuda, ring),
    };
    kvq_cuda_launch(cuda, kernels[kind][cache->d > 64], eights, (unsigned)cache->n_heads,
                    (unsigned)args.n_splits, 32 * KVQ_CUDA_DECODE_WARPS, 0, &args);
    merge_splits(cuda, cache, args.n_splits);
}

static void attend(kvq_device *device, int layer) {
    kvq_cuda *const cuda = kvq_cuda_of(device);
    const kvq_cuda_cache *const cache = &cuda->caches[layer - cuda->first_layer];
    const size_t n = (size_t)cuda->span.n, rows = n * (size_t)cache->group;
    const unsigned heads = (unsigned)cache->n_heads;
    const kvq_cuda_prepare_args prepare = {.cache = *cache,
                                           .q = cuda->buffer[KVQ_BUFFER_Q],
                                           .k = cuda->buffer[KVQ_BUFFER_K],
                                           .v = cuda->buffer[KVQ_BUFFER_V],
                                           .prepared = cuda->queries};
    kvq_cuda_launch(cuda, KVQ_KERNEL_prepare, over(rows, KVQ_CUDA_VECTORS), heads, 3,
                    KVQ_CUDA_CACHE_THREADS, kvq_cuda_basis_shared(cache->d), &prepare);
    const kvq_cuda_decode_kind kind =
        cuda->span.n == 1 ? decode_kind(&device->rings[layer]) : KVQ_CUDA_DECODE_NONE;
    if (kind == KVQ_CUDA_DECODE_NONE) {
        attend_all(cuda, cache);
    } else {
        attend_one(cuda, cache, &device->rings[layer], kind);
    }
    /* A graph is launched again when a block is due, so the kernel is in it always. */
    const kvq_cuda_seal_args seal = {.cache = *cache};
    kvq_cuda_launch(cuda, KVQ_KERNEL_seal, 2 * heads, over(n, KVQ_BLOCK) + (n > 1), 1,
                    KVQ_CUDA_CACHE_THREADS, kvq_cuda_seal_shared(cache->d), &seal);
    const kvq_cuda_append_args append = {.cache = *cache};
    kvq_cuda_launch(cuda, KVQ_KERNEL_append, 2 * heads, over(n, KVQ_CUDA_APPEND_ROWS), 1,
                    KVQ_CUDA_CACHE_THREADS, 0, &append);
    kvq_ring_advance(&device->rings[layer], cuda->span.n);
}

static void gate(kvq_device *device) {
    kvq_cuda *const cuda = kvq_cuda_of(device);
    const kvq_config *const c = config_of(cuda);
    const kvq_cuda_gate_args args = {.gate = cuda->buffer[KVQ_BUFFER_GATE],
                                     .up = cuda->buffer[KVQ_BUFFER_UP],
                                     .n = cuda->span.n,
                                     .d_ff = (int32_t)c->d_ff};
    kvq_cuda_launch(cuda, KVQ_KERNEL_gate, over(c->d_ff, KVQ_ELEMENTWISE_THREADS),
                    (unsigned)cuda->span.n, 1, KVQ_ELEMENTWISE_THREADS, 0, &args);
}

/* Whether the pass was not stopped between layers. */
static bool is_complete(const kvq_cuda *cuda) {
    const kvq_ring *const last = &cuda->device.rings[config_of(cuda)->n_layers - 1];
    return last->n == cuda->span.held + cuda->span.n &&
           (!cuda->span.logits || !cuda->has_head || cuda->logits_rows);
}

/* Ends the recording, and runs it. What is not complete is not kept. */
static void run_recorded(kvq_cuda *cuda) {
    const kvq_cuda_api *const api = cuda->api;
    CUgraph graph = NULL;
    CUgraphExec run = NULL;
    cuda->mode = KVQ_CUDA_RUNS;
    if (kvq_cuda_did(cuda, api->cuStreamEndCapture(cuda->stream, &graph), "cuStreamEndCapture") &&
        kvq_cuda_did(cuda, api->cuGraphInstantiate(&run, graph, 0), "cuGraphInstantiate")) {
        kvq_cuda_did(cuda, api->cuGraphLaunch(run, cuda->stream), "cuGraphLaunch");
    }
    if (graph) api->cuGraphDestroy(graph);
    if (is_complete(cuda) && cuda->status == KVQ_OK) {
        graph_of(cuda)->recorded = run;
    } else if (run) {
        kvq_cuda_did(cuda, api->cuStreamSynchronize(cuda->stream), "cuStreamSynchronize");
        api->cuGraphExecDestroy(run);
    }
}

static bool read_buffer(kvq_device *device, kvq_buffer buffer, float *out, size_t n) {
    kvq_cuda *const cuda = kvq_cuda_of(device);
    if (cuda->mode == KVQ_CUDA_RECORDS) run_recorded(cuda);
    if (cuda->status != KVQ_OK) return false;
    kvq_cuda_did(cuda,
                 cuda->api->cuMemcpyDtoHAsync(out, kvq_cuda_address(cuda->buffer[buffer]),
                                              n * sizeof *out, cuda->stream),
                 "cuMemcpyDtoHAsync of %zu numbers", n);
    return kvq_cuda_did(cuda, cuda->api->cuStreamSynchronize(cuda->stream), "cuStreamSynchronize");
}

static kvq_status finish(kvq_device *device) {
    kvq_cuda *const cuda = kvq_cuda_of(device);
    if (cuda->mode == KVQ_CUDA_RECORDS) run_recorded(cuda);
    if (cuda->logits_rows <= cuda->n_logits) fetch_logits(cuda, 0, cuda->logits_rows);
    /* After a failure, too: logits that were asked for may still be on their way. */
    kvq_cuda_did(cuda, cuda->api->cuStreamSynchronize(cuda->stream), "cuStreamSynchronize");
    if (cuda->span.n == 1 && is_complete(cuda)) graph_of(cuda)->has_run = true;
    cuda->mode = KVQ_CUDA_RUNS;
    kvq_cuda_leave(cuda);
    return cuda->status == KVQ_OK ? KVQ_OK : kvq_fail(cuda->status, "%s", cuda->error);
}

/* ---- lifetime ------------------------------------------------------------------------------ */

static const kvq_device_ops ops = {
    .reserve = kvq_cuda_cache_reserve,
    .begin = begin,
    .norm = norm,
    .multiply = multiply,
    .rotate = rotate,
    .attend = attend,
    .gate = gate,
    .read = read_buffer,
    .finish = finish,
    .truncate = kvq_cuda_cache_truncate,
    .seal = kvq_cuda_cache_seal,
    .repeat = kvq_cuda_cache_repeat,
    .block = kvq_cuda_cache_lend,
};

/* The kernel may want more shared memory than all GPUs give unasked. Sessions share it, so that
 * each asks for what the widest heads need. */
static void ask_for_shared(kvq_cuda *cuda, attend_shape shape) {
    const int most = (int)kvq_cuda_attend_shared(shape.width, shape.width);
    kvq_cuda_did(cuda,
                 cuda->api->cuFuncSetAttribute(cuda->gpu->kernels.functions[shape.kernel],
                                               CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                               most),
                 "cuFuncSetAttribute for %d bytes of shared memory", most);
}

static kvq_status allocate(kvq_cuda *cuda, const kvq_cuda_options *o) {
    const kvq_config *const c = config_of(cuda);
    const size_t per_layer = KVQ_SIDES * (size_t)c->n_kv_heads;
    const size_t layers = c->n_layers - (size_t)cuda->first_layer;
    const kvq_track *const tracks = o->tracks + (size_t)cuda->first_layer * per_layer;
    const size_t n = (size_t)cuda->n_batch;
    size_t largest_block = 0;
    kvq_cuda_bytes bytes;
    for (size_t i = 0; i < layers * per_layer; i++) {
        if (tracks[i].block_bytes > largest_block) largest_block = tracks[i].block_bytes;
    }
    const size_t recent = (size_t)o->rings[o->first_layer].recent_rows *
                          (size_t)o->rings[o->first_layer].d * sizeof(uint16_t);
    cuda->staging_bytes =
        sizeof(kvq_cuda_step) + n * (c->d_rope + c->d_model) * sizeof(float) + 3 * KVQ_ALIGN;
    cuda->caches = kvq_alloc(layers * sizeof *cuda->caches);
    cuda->chunk_list = kvq_alloc((size_t)(cuda->max_chunks + 1) * sizeof *cuda->chunk_list);
    cuda->room = kvq_alloc(largest_block > recent ? largest_block : recent);
    cuda->placed = kvq_alloc(layers * per_layer * sizeof *cuda->placed);
    if (!cuda->caches || !cuda->chunk_list || !cuda->room || !cuda->placed) {
        return kvq_fail(KVQ_ERR_MEMORY, "There is no memory for a session.");
    }
    void *staging = NULL;
    if (kvq_cuda_did(cuda, cuda->api->cuMemAlloc(&cuda->memory, cuda->fixed_bytes),
                     "cuMemAlloc of %.2f GB for rows, tables and scratch",
                     (double)cuda->fixed_bytes / 1e9) &&
        kvq_cuda_did(cuda, cuda->api->cuMemAllocHost(&staging, cuda->staging_bytes),
                     "cuMemAllocHost of %zu bytes", cuda->staging_bytes)) {
        kvq_arena arena = {.base = (uint8_t *)(uintptr_t)cuda->memory};
        cuda->staging = staging;
        lay_out(cuda, &arena, &bytes, tracks, o->turns, cuda->placed);
        ask_for_shared(cuda, shape_of_attend(cuda->caches[0].d));
    }
    return cuda->status;
}

static kvq_status open_stream(kvq_cuda *cuda) {
    kvq_cuda_enter(cuda);
    if (cuda->status == KVQ_OK) {
        kvq_cuda_did(cuda, cuda->api->cuStreamCreate(&cuda->stream, CU_STREAM_NON_BLOCKING),
                     "cuStreamCreate");
    }
    return cuda->status;
}

kvq_status kvq_cuda_open(kvq_device **out, const kvq_cuda_options *o) {
    kvq_cuda *const cuda = kvq_alloc(sizeof *cuda);
    kvq_cuda_bytes bytes;
    if (!cuda) return kvq_fail(KVQ_ERR_MEMORY, "There is no memory for a session.");
    cuda->device.ops = &ops;
    cuda->gpu = o->gpu;
    cuda->api = o->gpu->api;
    kvq_status status = measure(cuda, &bytes, o, o->gpu->n_processors);
    if (status == KVQ_OK) status = open_stream(cuda);
    if (status == KVQ_OK) {
        status = kvq_cuda_weights_open(&cuda->weights, cuda->api, cuda->stream, o->model,
                                       o->gpu->index, o->first_layer, o->head, o->upload, o->user);
    }
    if (status == KVQ_OK) status = allocate(cuda, o);
    kvq_cuda_leave(cuda);
    if (status != KVQ_OK) {
        cuda->status = status; /* whose sentence no failure of closing replaces */
        kvq_cuda_close(&cuda->device);
        return status;
    }
    *out = &cuda->device;
    return KVQ_OK;
}

void kvq_cuda_close(kvq_device *device) {
    if (!device) return;
    kvq_cuda *const cuda = kvq_cuda_of(device);
    const kvq_cuda_api *const api = cuda->api;
    cuda->lent = NULL; /* nobody will read it again */
    kvq_cuda_enter(cuda);
    if (cuda->stream) api->cuStreamSynchronize(cuda->stream);
    for (int i = 0; i < KVQ_CUDA_GRAPHS; i++) {
        if (cuda->graphs[i].recorded) api->cuGraphExecDestroy(cuda->graphs[i].recorded);
    }
    for (int i = 0; i < cuda->n_chunks; i++) api->cuMemFree(cuda->chunk_list[i]);
    if (cuda->memory) api->cuMemFree(cuda->memory);
    if (cuda->staging) api->cuMemFreeHost(cuda->staging);
    kvq_cuda_weights_close(cuda->weights, api, device->model);
    if (cuda->stream) api->cuStreamDestroy(cuda->stream);
    kvq_cuda_leave(cuda);
    kvq_free(cuda->caches);
    kvq_free(cuda->placed);
    kvq_free(cuda->chunk_list);
    kvq_free(cuda->room);
    kvq_free(cuda);
}

uint64_t kvq_cuda_bytes_now(const kvq_device *device) {
    const kvq_cuda *const cuda = (const kvq_cuda *)(const void *)device;
    return cuda->weights->bytes + cuda->fixed_bytes + (uint64_t)cuda->n_chunks * cuda->chunk_bytes;
}
