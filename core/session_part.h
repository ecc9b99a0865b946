/* session_part.h: what the files of a session share; nobody else includes it. */
#ifndef KVQ_SESSION_PART_H
#define KVQ_SESSION_PART_H

#include "cuda/cuda_device.h"
#include "forward.h"
#include "kv/kv_scheme.h"

/* Which layers run where. */
typedef struct kvq_placement {
    int gpu;          /* index of the CUDA device; -1: none */
    int n_layers_gpu; /* the last ones */
    bool head_on_gpu;
} kvq_placement;

struct kvq_session {
    const kvq_model *model;
    const kvq_scheme *scheme;
    kvq_track *tracks; /* [n_layers][KVQ_SIDES][n_kv_heads] */
    double bits[KVQ_SIDES];
    size_t table_bytes;
    bool uses_profile;
    kvq_turns turns; /* n_pairs 0: no track has waves */
    int n_ctx, n_batch, n_threads, sinks, window, topk;
    int most_batch; /* as asked for; n_batch is at most n_ctx */
    kvq_forward forward;
    kvq_pool *pool;
    uint8_t *kv, *scratch; /* NULL: only planned */
    size_t kv_bytes, scratch_bytes;
    kvq_ring_bytes bytes;
    kvq_placement placement;
    const kvq_cuda_gpu *gpu;  /* NULL: none is in use, or it is only planned for */
    kvq_cuda_bytes gpu_bytes; /* all zeros: nothing is on a GPU */
    int gpu_processors;       /* multiprocessors of the GPU, or what is assumed of it */
    atomic_int cancelled;
    uint64_t n_evaluated;
    double seconds_evaluated;
};

/* Sets where layers run and measures the session so. `is_plan`: a device that is named need not be
 * there. */
kvq_status kvq_session_place(kvq_session *s, const kvq_session_options *options, bool is_plan);

/* Lays out everything in no memory: what it would take on the host and on the GPU. */
kvq_status kvq_session_measure(kvq_session *s);

/* What a session takes of the memory of the host, the weights of that, and of the GPU. */
uint64_t kvq_session_host_bytes(const kvq_session *s);
uint64_t kvq_session_host_weights(const kvq_session *s);
uint64_t kvq_session_gpu_bytes(const kvq_session *s);

/* What a device is asked for: valid as long as the session. */
kvq_cuda_options kvq_session_cuda_options(const kvq_session *s);

#endif
