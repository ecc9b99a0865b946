/* probe.cu: a kernel that only the stand-in has, for tests of what becomes of a launch. */
#include "cuda/kernels/port.cuh"

#include "probe_args.h"

/* out[i] = value + i, by way of shared memory, of which the block must have 4 bytes per thread
 * beside its own. */
extern "C" __global__ void __launch_bounds__(PROBE_THREADS) kvq_cuda_probe(const probe_args a) {
    __shared__ uint32_t own[PROBE_SHARED / sizeof(uint32_t)];
    KVQ_SHARED_MEMORY(uint32_t, turned);
    own[threadIdx.x] = threadIdx.x;
    turned[blockDim.x - 1 - threadIdx.x] = own[threadIdx.x];
    __syncthreads();
    const uint32_t i = blockIdx.x * blockDim.x + blockDim.x - 1 - turned[threadIdx.x];
    if (i < a.n) a.out[i] = a.value + i;
}
KVQ_EXPORT_KERNEL(kvq_cuda_probe)
