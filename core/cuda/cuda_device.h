/* cuda_device.h: a GPU as a device (device.h): the last layers of a model, and its head.
 *
 * Everything of a session that the device keeps is allocated when it is opened, but for sealed
 * blocks: chunks of those come as the context grows (kvq_device_ops.reserve), so that a long
 * context does not take its bytes at once. Weights are shared by the sessions of a model that want
 * the same of them. Called by session.c, and through device.h by forward.c.
 */
#ifndef KVQ_CUDA_DEVICE_H
#define KVQ_CUDA_DEVICE_H

#include "cuda/cuda_gpu.h"
#include "device.h"

typedef struct kvq_cuda_options {
    const kvq_model *model;
    kvq_ring *rings;         /* [n_layers] laid out in no memory: their numbers are used */
    const kvq_track *tracks; /* [n_layers][KVQ_SIDES][n_kv_heads] */
    const kvq_turns *turns;  /* NULL: no track has waves */
    const kvq_cuda_gpu *gpu; /* in use as long as the device is open; NULL: to measure alone */
    int first_layer;         /* that it has; it has all that follow */
    bool head;               /* whether it has the output norm and matrix */
    int n_batch;
    kvq_progress upload; /* called as weights go up, in MiB; NULL: nobody looks */
    void *user;
} kvq_cuda_options;

/* What a session takes of the device's memory. */
typedef struct kvq_cuda_bytes {
    uint64_t weights;
    uint64_t rows;    /* sinks and recent rows */
    uint64_t sealed;  /* once the context is full */
    uint64_t tables;  /* bases and waves */
    uint64_t scratch; /* what a pass works in */
    uint64_t chunk;   /* sealed blocks come in pieces of this size */
} kvq_cuda_bytes;

/* Needs no device: options->gpu is not read. The number of multiprocessors decides on scratch. */
kvq_status kvq_cuda_measure(kvq_cuda_bytes *out, const kvq_cuda_options *options, int n_processors);

kvq_status kvq_cuda_open(kvq_device **out, const kvq_cuda_options *options);
void kvq_cuda_close(kvq_device *device); /* takes NULL */

/* Bytes that the session has on the device now. */
uint64_t kvq_cuda_bytes_now(const kvq_device *device);

#endif
