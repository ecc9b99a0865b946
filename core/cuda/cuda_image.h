/* cuda_image.h: the kernels as they are embedded in the library, and loaded into a context.
 *
 * Each row KVQ_CUDA_MODULE(X) of kernels.def is core/cuda/kernels/X.cu, a module of its own, each
 * row KVQ_CUDA_KERNEL(X, NAME) the kernel kvq_cuda_NAME in it. images.S embeds what `make cuda` has
 * built: for every module a fat binary of CUDA 13, and one of CUDA 12, since drivers of the CUDA 12
 * line cannot use the former. Either may be missing, and so may both. Owns nothing that outlives
 * kvq_cuda_kernels_close.
 */
#ifndef KVQ_CUDA_IMAGE_H
#define KVQ_CUDA_IMAGE_H

#include "cuda/cuda_api.h"

typedef enum kvq_cuda_module_id {
#define KVQ_CUDA_MODULE(module) KVQ_MODULE_##module,
#define KVQ_CUDA_KERNEL(module, name)
#include "cuda/kernels.def"
#undef KVQ_CUDA_MODULE
#undef KVQ_CUDA_KERNEL
    KVQ_CUDA_MODULES
} kvq_cuda_module_id;

typedef enum kvq_cuda_kernel_id {
#define KVQ_CUDA_MODULE(module)
#define KVQ_CUDA_KERNEL(module, name) KVQ_KERNEL_##name,
#include "cuda/kernels.def"
#undef KVQ_CUDA_MODULE
#undef KVQ_CUDA_KERNEL
    KVQ_CUDA_KERNELS
} kvq_cuda_kernel_id;

typedef struct kvq_cuda_kernels {
    const char *toolkit; /* that made the image: "CUDA 13.0"; NULL: not loaded */
    CUmodule modules[KVQ_CUDA_MODULES];
    CUfunction functions[KVQ_CUDA_KERNELS];
} kvq_cuda_kernels;

/* "kvq_cuda_merge" */
const char *kvq_cuda_kernel_name(kvq_cuda_kernel_id kernel);

/* Loads all kernels into the context that is current, from the first image that its device and the
 * driver take. KVQ_ERR_DEVICE where this build has none for the driver, or none is taken; `device`
 * is how the sentence calls the device. */
kvq_status kvq_cuda_kernels_open(kvq_cuda_kernels *out, const kvq_cuda_api *api,
                                 const char *device);

/* In the same context. Takes what was never opened, if it is all zeros. */
void kvq_cuda_kernels_close(kvq_cuda_kernels *kernels, const kvq_cuda_api *api);

#endif
