/* cuda_weights.h: the weights of a model on a device, shared by its sessions there.
 *
 * They go up straight from the mapped file, in the bytes of the file. Owned by the model's list
 * (kvq_model.uploaded); the last session that uses them frees them. Called by cuda_device.c.
 */
#ifndef KVQ_CUDA_WEIGHTS_H
#define KVQ_CUDA_WEIGHTS_H

#include "arch.h"
#include "cuda/cuda_api.h"

typedef struct kvq_cuda_weights {
    struct kvq_cuda_weights *next;
    int users;
    int index, first_layer; /* of the device; the first layer that is there */
    bool head;
    CUdeviceptr memory;
    uint64_t bytes;
    /* The model's tensors, whose data are addresses on the device. */
    kvq_layer *layers; /* [n_layers]; those before first_layer are empty */
    kvq_tensor output_norm, output;
} kvq_cuda_weights;

/* Bytes that the weights of layers first_layer .. take on a device, and those of the head. */
uint64_t kvq_cuda_weights_bytes(const kvq_model *model, int first_layer, bool head);

/* Whether a session of the model has put them there, so that another one takes no more. */
bool kvq_cuda_weights_shared(const kvq_model *model, int index, int first_layer, bool head);

/* Those that are there already, or uploads them into the context that is current. The stream is
 * one of that context, and free. */
kvq_status kvq_cuda_weights_open(const kvq_cuda_weights **out, const kvq_cuda_api *api,
                                 CUstream stream, const kvq_model *model, int index,
                                 int first_layer, bool head, kvq_progress upload, void *user);
void kvq_cuda_weights_close(const kvq_cuda_weights *weights, const kvq_cuda_api *api,
                            const kvq_model *model); /* takes NULL */

/* A tensor of the model as it is on the device. */
const kvq_tensor *kvq_cuda_weights_find(const kvq_cuda_weights *weights, const kvq_model *model,
                                        const kvq_tensor *tensor);

#endif
