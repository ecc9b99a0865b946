/* cuda_api.h: the CUDA driver, found at run time.
 *
 * Nothing here needs CUDA to build: cuda_types.h has the types that cross the interface,
 * cuda_api.def a row per function. Owns the loaded library, which stays until the process ends.
 * Called by the other files of core/cuda/.
 */
#ifndef KVQ_CUDA_API_H
#define KVQ_CUDA_API_H

#include "base.h"
#include "cuda/cuda_types.h"

typedef struct kvq_cuda_api {
#define KVQ_CUDA_API(name, symbol, parameters) CUresult(*name) parameters;
#include "cuda/cuda_api.def"
#undef KVQ_CUDA_API
    int version;   /* of the newest CUDA that the driver knows: 1000 * major + 10 * minor */
    int n_devices; /* at least 1 */
} kvq_cuda_api;

/* The driver, which the first call of the process loads and initializes; any thread may call. The
 * library is libcuda.so.1 (nvcuda.dll on Windows), or what the environment variable KVQ_LIBCUDA
 * names. Fails with KVQ_ERR_DEVICE, each time with the same sentence, where there is no driver,
 * where it lacks a function, and where it finds no device. */
kvq_status kvq_cuda_api_get(const kvq_cuda_api **out);

/* KVQ_OK for CUDA_SUCCESS. Otherwise the sentence is what `what` formats, which names the call and
 * what it was for, and the driver's words for the error: "cuMemAlloc of 64 bytes for logits: out of
 * memory (CUDA_ERROR_OUT_OF_MEMORY)."; KVQ_ERR_MEMORY where that is the error, else KVQ_ERR_DEVICE.
 */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
kvq_status kvq_cuda_check(const kvq_cuda_api *api, CUresult result, const char *what, ...);

/* Copies to the device and waits until it is there. cuMemcpyHtoD would not do: it can return while
 * what it has read is still on its way, and streams that do not block do not wait for it. */
CUresult kvq_cuda_copy_up(const kvq_cuda_api *api, CUdeviceptr to, const void *from, size_t bytes,
                          CUstream stream);

/* The device of an index; KVQ_ERR_ARGUMENT if there is none. */
kvq_status kvq_cuda_device(CUdevice *out, const kvq_cuda_api *api, int index);

#endif
