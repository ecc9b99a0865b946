/* cuda_cache.c: the cache of a CUDA device beyond a pass: room for it, truncation, early seals.
 *
 * What is rare goes over the host: a block that is cut is decoded there, by the same code.
 */
#include "cuda/cuda_state.h"
#include "cuda/kernels/prepare_args.h"

static const kvq_cuda_cache *cache_of(const kvq_cuda *cuda, int layer) {
    return &cuda->caches[layer - cuda->first_layer];
}

static const kvq_cuda_track *place_of(const kvq_cuda *cuda, int layer, int side, int head) {
    const size_t of_layer = KVQ_SIDES * (size_t)cuda->device.model->config.n_kv_heads;
    return &cuda->placed[(size_t)(layer - cuda->first_layer) * of_layer +
                         of_layer / KVQ_SIDES * (size_t)side + (size_t)head];
}

/* Where a sealed block lies on the device. */
static CUdeviceptr block_at(const kvq_cuda *cuda, int layer, int head, int side, int block) {
    const kvq_cuda_track *const place = place_of(cuda, layer, side, head);
    return cuda->chunk_list[block / cuda->chunk_blocks] +
           (uint64_t)cuda->chunk_blocks * place->bytes_before +
           (uint64_t)(block % cuda->chunk_blocks) * place->stride + place->lead;
}

static void wait(kvq_cuda *cuda) {
    if (cuda->status != KVQ_OK) return;
    kvq_cuda_did(cuda, cuda->api->cuStreamSynchronize(cuda->stream), "cuStreamSynchronize");
}

kvq_status kvq_cuda_cache_reserve(kvq_device *device, int n_blocks) {
    kvq_cuda *const cuda = kvq_cuda_of(device);
    const int wanted = (n_blocks + cuda->chunk_blocks - 1) / cuda->chunk_blocks;
    kvq_status status = KVQ_OK;
    if (cuda->status != KVQ_OK) return kvq_fail(cuda->status, "%s", cuda->error);
    if (wanted <= cuda->n_chunks) return KVQ_OK;
    kvq_cuda_enter(cuda);
    while (cuda->n_chunks < wanted && cuda->status == KVQ_OK && status == KVQ_OK) {
        CUdeviceptr *const chunk = &cuda->chunk_list[cuda->n_chunks];
        const double gigabytes = (double)cuda->chunk_bytes / 1e9;
        const CUresult result = cuda->api->cuMemAlloc(chunk, cuda->chunk_bytes);
        if (result == CUDA_ERROR_OUT_OF_MEMORY) {
            /* This leaves all as it is: the session goes on with the context that it has. */
            status = kvq_cuda_check(cuda->api, result,
                                    "The context cannot grow beyond about %d tokens: cuMemAlloc of "
                                    "%.2f GB for sealed blocks",
                                    cuda->n_chunks * cuda->chunk_blocks * KVQ_BLOCK, gigabytes);
        } else if (kvq_cuda_did(cuda, result, "cuMemAlloc of %.2f GB for sealed blocks",
                                gigabytes)) {
            CUdeviceptr *const to = (CUdeviceptr *)(void *)(cuda->chunks + cuda->n_chunks++);
            kvq_cuda_put(cuda, kvq_cuda_address(to), chunk, sizeof *chunk, "an address");
        }
    }
    kvq_cuda_leave(cuda);
    return cuda->status == KVQ_OK ? status : kvq_fail(cuda->status, "%s", cuda->error);
}

/* Rows of a block that is cut return to f16 as the codes give them back. */
static void unseal(kvq_cuda *cuda, int layer, int block) {
    const kvq_ring *const ring = &cuda->device.rings[layer];
    const kvq_cuda_cache *const cache = cache_of(cuda, layer);
    uint16_t rows[KVQ_BLOCK * KVQ_CUDA_D_MAX];
    const size_t row_bytes = (size_t)ring->d * sizeof *rows;
    for (int head = 0; head < ring->n_heads; head++) {
        for (int side = 0; side < KVQ_SIDES; side++) {
            const size_t slot = (size_t)(block * KVQ_BLOCK % ring->recent_rows) +
                                (size_t)head * (size_t)ring->recent_rows;
            kvq_cuda_did(cuda,
                         cuda->api->cuMemcpyDtoH(cuda->room,
                                                 block_at(cuda, layer, head, side, block),
                                                 ring->track[side][head].block_bytes),
                         "cuMemcpyDtoH of a sealed block");
            if (cuda->status != KVQ_OK) return;
            kvq_ring_decode(ring, head, side, block, cuda->room, rows);
            kvq_cuda_put(cuda, kvq_cuda_address(cache->recent[side] + slot * (size_t)ring->d), rows,
                         KVQ_BLOCK * row_bytes, "rows");
        }
    }
}

void kvq_cuda_cache_truncate(kvq_device *device, int layer, int n) {
    kvq_cuda *const cuda = kvq_cuda_of(device);
    kvq_ring *const ring = &device->rings[layer];
    if (n >= ring->n) return;
    const bool well = kvq_cuda_enter(cuda);
    const int rows = n > ring->sinks ? n - ring->sinks : 0, whole = rows / KVQ_BLOCK;
    if (whole < ring->n_sealed) {
        if (well && rows % KVQ_BLOCK) unseal(cuda, layer, whole);
        ring->n_sealed = whole;
    }
    ring->n = n;
    kvq_cuda_leave(cuda);
}

void kvq_cuda_cache_seal(kvq_device *device, int layer, int n_sealed) {
    kvq_cuda *const cuda = kvq_cuda_of(device);
    kvq_ring *const ring = &device->rings[layer];
    const kvq_cuda_step step = {
        .held = ring->n, .sealed = ring->n_sealed, .seals = n_sealed - ring->n_sealed};
    kvq_cuda_seal_args args = {.cache = *cache_of(cuda, layer)};
    if (step.seals <= 0) return;
    args.cache.step = cuda->seal_step;
    kvq_cuda_enter(cuda);
    kvq_cuda_put(cuda, kvq_cuda_address(cuda->seal_step), &step, sizeof step, "a step");
    kvq_cuda_launch(cuda, KVQ_KERNEL_seal, (unsigned)(2 * ring->n_heads), (unsigned)step.seals, 1,
                    KVQ_CUDA_CACHE_THREADS, kvq_cuda_seal_shared(ring->d), &args);
    wait(cuda);
    ring->n_sealed = n_sealed;
    kvq_cuda_leave(cuda);
}

/* Moves the recent rows of one head and side to the slots of n blocks later. */
static void move_recent(kvq_cuda *cuda, uint16_t *rows, const kvq_ring *ring, int n) {
    const size_t block = KVQ_BLOCK * (size_t)ring->d * sizeof *rows;
    const size_t slots = (size_t)ring->recent_rows / KVQ_BLOCK, bytes = slots * block;
    const size_t moved = (size_t)n % slots * block;
    const CUdeviceptr at = kvq_cuda_address(rows);
    if (!moved || cuda->status != KVQ_OK) return;
    kvq_cuda_did(cuda, cuda->api->cuMemcpyDtoH(cuda->room, at, bytes), "cuMemcpyDtoH of rows");
    if (cuda->status != KVQ_OK) return;
    kvq_cuda_put(cuda, at + moved, cuda->room, bytes - moved, "rows");
    kvq_cuda_put(cuda, at, cuda->room + bytes - moved, moved, "rows");
}

static int least(int a, int b) { return a < b ? a : b; }

static void copy_within(kvq_cuda *cuda, CUdeviceptr to, CUdeviceptr from, uint64_t bytes) {
    if (cuda->status != KVQ_OK) return;
    kvq_cuda_did(cuda, cuda->api->cuMemcpyDtoDAsync(to, from, bytes, cuda->stream),
                 "cuMemcpyDtoDAsync of sealed blocks");
}

/* Fills the blocks from `period` to `end` of one head and side with the first ones, again and
 * again, in runs that grow with what is there and stay within chunks. */
static void repeat_blocks(kvq_cuda *cuda, int layer, int head, int side, int period, int end) {
    const int chunk = cuda->chunk_blocks;
    const uint64_t stride = place_of(cuda, layer, side, head)->stride;
    const uint64_t bytes = cuda->device.rings[layer].track[side][head].block_bytes;
    for (int to = period, back = period, run; to < end; to += run) {
        while (back <= to / 2) back *= 2;
        const int from = to - back;
        run = least(least(chunk - to % chunk, chunk - from % chunk), least(end - to, back));
        copy_within(cuda, block_at(cuda, layer, head, side, to),
                    block_at(cuda, layer, head, side, from), (uint64_t)(run - 1) * stride + bytes);
    }
}

/* Fills the chunks from `period` to `end` with those before them, as far as they are the layer's,
 * whose blocks of all heads and both sides lie one behind the other. */
static void repeat_chunks(kvq_cuda *cuda, int layer, int period, int end) {
    const kvq_cuda_track *const first = place_of(cuda, layer, 0, 0);
    const kvq_cuda_track *const last =
        place_of(cuda, layer, KVQ_SIDES - 1, cache_of(cuda, layer)->n_heads - 1);
    const uint64_t blocks = (uint64_t)cuda->chunk_blocks, at = blocks * first->bytes_before;
    const uint64_t bytes = blocks * (last->bytes_before + last->stride) - at;
    for (int to = period; to < end; to++) {
        copy_within(cuda, cuda->chunk_list[to] + at, cuda->chunk_list[to - period] + at, bytes);
    }
}

static int common_divisor(int a, int b) { return b ? common_divisor(b, a % b) : a; }

void kvq_cuda_cache_repeat(kvq_device *device, int layer, int n) {
    kvq_cuda *const cuda = kvq_cuda_of(device);
    kvq_ring *const ring = &device->rings[layer];
    const kvq_cuda_cache *const cache = cache_of(cuda, layer);
    const int period = ring->n_sealed, end = period + n, chunk = cuda->chunk_blocks;
    /* After so many chunks the blocks begin with the first one again: from there on it is chunks
     * that repeat. */
    const int chunks = period / common_divisor(period, chunk);
    const int end_of_runs = chunks > end / chunk ? end : chunks * chunk;
    const bool well = kvq_cuda_enter(cuda);
    for (int head = 0; head < ring->n_heads && well; head++) {
        for (int side = 0; side < KVQ_SIDES; side++) {
            repeat_blocks(cuda, layer, head, side, period, end_of_runs);
            const size_t first = (size_t)head * (size_t)ring->recent_rows * (size_t)ring->d;
            move_recent(cuda, cache->recent[side] + first, ring, n);
        }
    }
    if (well) repeat_chunks(cuda, layer, chunks, (end + chunk - 1) / chunk);
    wait(cuda);
    ring->n_sealed += n;
    ring->n += n * KVQ_BLOCK;
    kvq_cuda_leave(cuda);
}

uint8_t *kvq_cuda_cache_lend(kvq_device *device, int layer, int head, int side, int block) {
    kvq_cuda *const cuda = kvq_cuda_of(device);
    const bool well = kvq_cuda_enter(cuda);
    cuda->lent_from = block_at(cuda, layer, head, side, block);
    cuda->lent_bytes = device->rings[layer].track[side][head].block_bytes;
    if (well &&
        kvq_cuda_did(cuda, cuda->api->cuMemcpyDtoH(cuda->room, cuda->lent_from, cuda->lent_bytes),
                     "cuMemcpyDtoH of a sealed block")) {
        cuda->lent = cuda->room;
    }
    kvq_cuda_leave(cuda);
    return cuda->room;
}
