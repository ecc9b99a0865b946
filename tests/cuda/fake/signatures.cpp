/* signatures.cpp: holds cuda_types.h and cuda_api.def against NVIDIA's cuda.h; compiling it is the
 * test.
 */
#include <cuda.h>

#include <type_traits>

namespace kvq {
#include "cuda/cuda_types.h"
}

#define SAME(name) static_assert(int(kvq::name) == int(::name), #name);
SAME(CUDA_SUCCESS)
SAME(CUDA_ERROR_INVALID_VALUE)
SAME(CUDA_ERROR_OUT_OF_MEMORY)
SAME(CUDA_ERROR_NO_DEVICE)
SAME(CUDA_ERROR_INVALID_IMAGE)
SAME(CUDA_ERROR_NO_BINARY_FOR_GPU)
SAME(CUDA_ERROR_UNSUPPORTED_PTX_VERSION)
SAME(CU_DEVICE_ATTRIBUTE_CLOCK_RATE)
SAME(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
SAME(CU_DEVICE_ATTRIBUTE_INTEGRATED)
SAME(CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)
SAME(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)
SAME(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)
SAME(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
SAME(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
SAME(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
SAME(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
SAME(CU_STREAM_CAPTURE_MODE_RELAXED)
SAME(CU_STREAM_NON_BLOCKING)

static_assert(std::is_same<kvq::CUdevice, CUdevice>::value, "CUdevice");
static_assert(std::is_same<kvq::CUdeviceptr, CUdeviceptr>::value, "CUdeviceptr");

#define KVQ_CUDA_API(name, symbol, parameters)                                                     \
    static_assert(std::is_same<CUresult parameters, decltype(symbol)>::value, #symbol);
#include "cuda/cuda_api.def"
