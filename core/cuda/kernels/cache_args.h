/* cache_args.h: one layer's cache as kernels see it; C11 for the host, C++14 for the device.
 *
 * A kernel takes one struct by value, whose pointers are addresses on the device. What changes from
 * pass to pass (kvq_cuda_step) lies in memory of the device, so that a captured graph can be
 * launched again.
 */
#ifndef KVQ_CUDA_CACHE_ARGS_H
#define KVQ_CUDA_CACHE_ARGS_H

#include "kv/kv_format.h"

/* Where a pass stands; the same for all layers. */
typedef struct kvq_cuda_step {
    int32_t n;      /* tokens of the pass; the first has position `held` */
    int32_t held;   /* tokens in the cache before it */
    int32_t sealed; /* blocks sealed before it */
    int32_t seals;  /* blocks that it seals */
} kvq_cuda_step;

/* One side of one KV head of one layer (kvq_track of kv/kv_plan.h). Blocks are the bytes of
 * kv/kv_format.h. On the device each begins `lead` bytes after a multiple of 16, so that its codes
 * begin on one, and takes `stride` bytes, a multiple of 16. */
typedef struct kvq_cuda_track {
    int32_t codec; /* kvq_codec_id */
    int32_t basis; /* kvq_basis_kind */
    kvq_kv_shape shape;
    uint32_t lead, stride;
    uint64_t bytes_before; /* strides of all tracks before it, those of earlier layers too */
    /* As kvq_basis has them; NULL where its kind has none. */
    const uint16_t *order;                /* [d] */
    const float *store, *query, *restore; /* [d][d], column by column */
    const float *mean;                    /* [d] */
    /* As kvq_wave has them, of keys. */
    int32_t n_waves, reserved;
    const uint16_t *pair;         /* [n_waves] */
    const float *wave_u, *wave_w; /* [n_waves][d] */
} kvq_cuda_track;

typedef struct kvq_cuda_cache {
    const kvq_cuda_step *step;
    const kvq_cuda_track *tracks; /* [2][n_heads]: keys, values */
    /* Block b of a track lies in chunk b / chunk_blocks, `chunk_blocks * bytes_before + b %
     * chunk_blocks * stride + lead` bytes behind its begin. Chunks come as the context grows. */
    uint8_t *const *chunks;
    uint16_t *sinks[2];    /* [n_heads][n_sinks][d] halves */
    uint16_t *recent[2];   /* [n_heads][recent_rows][d]; row i in slot i % recent_rows */
    uint16_t *new_rows[2]; /* [n_heads][n_batch][d]: the pass's own, in the basis of the cache */
    /* kvq_turns: [n_pairs][2][64], [max_blocks][n_pairs][2] */
    const float *turns_within, *turns_first;
    int32_t n_pairs;
    int32_t chunk_blocks;
    int32_t n_heads, group; /* KV heads; query heads for each */
    int32_t d_head, d;      /* width in the model, and padded */
    int32_t n_sinks, recent_rows, n_batch;
} kvq_cuda_cache;

#ifdef __cplusplus
/* Where a chunk has the first block of a track. */
KVQ_BOTH uint64_t kvq_cuda_first_block(const kvq_cuda_cache &cache, const kvq_cuda_track &track) {
    return (uint64_t)cache.chunk_blocks * track.bytes_before + track.lead;
}
KVQ_BOTH uint8_t *kvq_cuda_block(const kvq_cuda_cache &cache, const kvq_cuda_track &track, int b) {
    return cache.chunks[b / cache.chunk_blocks] + kvq_cuda_first_block(cache, track) +
           (uint64_t)(b % cache.chunk_blocks) * track.stride;
}

/* The row of index i (token n_sinks + i) of a head and side: in the recent rows, or among those of
 * the pass. Pointers are chosen, not indexed: an index would copy the kernel's arguments to local
 * memory. */
KVQ_BOTH const uint16_t *kvq_cuda_row(const kvq_cuda_cache &cache, int head, int side, int i,
                                      int held) {
    const int fresh = cache.n_sinks + i - held;
    const uint16_t *const rows = fresh >= 0 ? (side ? cache.new_rows[1] : cache.new_rows[0])
                                            : (side ? cache.recent[1] : cache.recent[0]);
    const size_t row = fresh >= 0 ? (size_t)head * cache.n_batch + fresh
                                  : (size_t)head * cache.recent_rows + i % cache.recent_rows;
    return rows + row * cache.d;
}
#endif

#endif
