/* cuda_gpu.h: a GPU in use: its context with the kernels, which all who use it share.
 *
 * The first one makes them, the last one unmakes them; any thread may. session_place.c opens them
 * for a session, session.c closes them after it.
 */
#ifndef KVQ_CUDA_GPU_H
#define KVQ_CUDA_GPU_H

#include "cuda/cuda_image.h"

typedef struct kvq_cuda_gpu {
    struct kvq_cuda_gpu *next;
    int users;
    int index; /* of the device, as users count them */
    int n_processors;
    CUdevice id;
    const kvq_cuda_api *api;
    CUcontext context; /* the primary one; current in no thread by itself */
    kvq_cuda_kernels kernels;
} kvq_cuda_gpu;

/* Says what a device is, with the errors of kvq_device_describe (kvq.h), and takes it in use; *out
 * is NULL where it cannot be used, which *info gives the reason for. */
kvq_status kvq_cuda_gpu_open(const kvq_cuda_gpu **out, kvq_device_info *info, int index);
void kvq_cuda_gpu_close(const kvq_cuda_gpu *gpu); /* takes NULL */

#endif
