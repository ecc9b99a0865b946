/* levels.cuh: the tables of levels of kv/kv_format.h. They lie in global memory, where L1 serves a
 * warp whose lanes ask for different levels at once; constant memory would serve each in turn. */
#ifndef KVQ_CUDA_LEVELS_CUH
#define KVQ_CUDA_LEVELS_CUH

#include "cuda/kernels/port.cuh"
#include "kv/kv_format.h"

static __device__ const int8_t kvq_device_t1_level[16] = {KVQ_T1_LEVELS};
static __device__ const int8_t kvq_device_t2_level[16] = {KVQ_T2_LEVELS};
static __device__ const int8_t kvq_device_c8_x[8] = {KVQ_C8_X};
static __device__ const int8_t kvq_device_c8_y[8] = {KVQ_C8_Y};
static __device__ const float kvq_device_n2_level[8] = {KVQ_N2_LEVELS};
static __device__ const float kvq_device_n3_level[8] = {KVQ_N3_LEVELS};
static __device__ const float kvq_device_nf4_level[16] = {KVQ_NF4_LEVELS};

#endif
