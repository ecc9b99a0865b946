/* cuda_state.h: what the files of the CUDA device share; nobody else includes it. */
#ifndef KVQ_CUDA_STATE_H
#define KVQ_CUDA_STATE_H

#include "cuda/cuda_device.h"
#include "cuda/cuda_weights.h"
#include "cuda/kernels/attend_args.h"

/* The launches of a token. They are recorded when all of them have run once, one by one: the first
 * launch of a kernel may load it, which is not to happen while a stream is captured. */
typedef struct kvq_cuda_graph {
    bool has_run;
    CUgraphExec recorded; /* NULL: not yet */
} kvq_cuda_graph;

enum { KVQ_CUDA_GRAPHS = 2 }; /* of a token without and with logits */

typedef enum kvq_cuda_mode {
    KVQ_CUDA_RUNS,    /* steps are launched as they come */
    KVQ_CUDA_RECORDS, /* steps go into a graph, which runs when it is complete */
    KVQ_CUDA_REPLAYS  /* a graph with all the steps runs already */
} kvq_cuda_mode;

typedef struct kvq_cuda {
    kvq_device device; /* the first member */
    const kvq_cuda_gpu *gpu;
    const kvq_cuda_api *api; /* the gpu's */
    CUstream stream;
    bool is_current; /* the context, in the thread that calls */
    const kvq_cuda_weights *weights;
    int n_processors;
    int first_layer, n_batch;
    bool has_head;
    int n_logits; /* tokens whose logits there is room for */

    /* One allocation: the parts that are addresses on the device. */
    CUdeviceptr memory;
    float *buffer[KVQ_BUFFERS];
    float *cos_sin;   /* [n_batch][d_rope] */
    uint16_t *halves; /* [n_batch][widest input]: of products with many tokens */
    float *unscale;   /* [n_batch] */
    float *queries;   /* [n_kv_heads][n_batch * group][d] in the basis of the keys */
    float *partial;   /* results of splits: partial_rows rows of all KV heads */
    int partial_rows;
    kvq_cuda_step *step, *seal_step;
    kvq_cuda_track *tracks; /* [n_layers of the device][KVQ_SIDES][n_kv_heads] */
    uint8_t **chunks;       /* [max_chunks] */
    kvq_cuda_cache *caches; /* on the host: [n_layers of the device] */
    kvq_cuda_track *placed; /* on the host: the tracks as the device has them */

    int chunk_blocks, max_chunks, n_chunks;
    uint64_t chunk_bytes, fixed_bytes;
    CUdeviceptr *chunk_list; /* on the host: [max_chunks], and one more: there may be none */

    uint8_t *staging; /* pinned: the step, cos_sin and X of a pass */
    size_t staging_bytes;

    kvq_span span;
    kvq_cuda_mode mode;
    int logits_rows; /* that wait to be copied */
    kvq_cuda_graph graphs[KVQ_CUDA_GRAPHS];

    uint8_t *room; /* on the host: for a block, or for the recent rows of a head */
    /* The block that was handed out last, whose bytes go back before anything else happens. */
    uint8_t *lent; /* in the room; NULL: none */
    CUdeviceptr lent_from;
    size_t lent_bytes;

    kvq_status status; /* of the first call that failed: nothing runs after it */
    char error[512];
} kvq_cuda;

static inline kvq_cuda *kvq_cuda_of(kvq_device *device) { return (kvq_cuda *)(void *)device; }

/* Addresses on the device are pointers where structs of kernels want them, numbers where the driver
 * does. */
static inline CUdeviceptr kvq_cuda_address(const void *p) { return (CUdeviceptr)(uintptr_t)p; }

/* Keeps the first failure. True if all is well. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
bool kvq_cuda_did(kvq_cuda *cuda, CUresult result, const char *what, ...);

/* Copies to the device, at once. What it is goes into the sentence of a failure. */
void kvq_cuda_put(kvq_cuda *cuda, CUdeviceptr to, const void *from, size_t bytes, const char *what);

/* Launches a kernel, whose argument is one struct. */
void kvq_cuda_launch(kvq_cuda *cuda, kvq_cuda_kernel_id kernel, unsigned grid_x, unsigned grid_y,
                     unsigned grid_z, unsigned threads, size_t shared, const void *args);

/* Makes the context current, and puts a lent block back: true if all is well. And the context away.
 */
bool kvq_cuda_enter(kvq_cuda *cuda);
void kvq_cuda_leave(kvq_cuda *cuda);

/* cuda_cache.c: the functions of kvq_device_ops about the cache. */
kvq_status kvq_cuda_cache_reserve(kvq_device *device, int n_blocks);
void kvq_cuda_cache_truncate(kvq_device *device, int layer, int n);
void kvq_cuda_cache_seal(kvq_device *device, int layer, int n_sealed);
void kvq_cuda_cache_repeat(kvq_device *device, int layer, int n);
uint8_t *kvq_cuda_cache_lend(kvq_device *device, int layer, int head, int side, int block);

#endif
