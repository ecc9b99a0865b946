/* elementwise.cu: the small operations between the products: norm, RoPE, gate. */
#include "cuda/kernels/port.cuh"

#include "cuda/kernels/elementwise_args.h"

/* ---- norm -------------------------------------------------------------------------------- */

extern "C" __global__ void __launch_bounds__(KVQ_ELEMENTWISE_THREADS)
    kvq_cuda_norm(const kvq_cuda_norm_args a) {
    enum { WARPS = KVQ_ELEMENTWISE_THREADS / 32 };
    __shared__ float of_warp[WARPS];
    const int thread = (int)threadIdx.x;
    const float *const x = a.x + (size_t)blockIdx.x * a.d_model;
    float *const y = a.y + (size_t)blockIdx.x * a.d_model;

    float sum = 0.0f;
    for (int i = thread; i < a.d_model; i += KVQ_ELEMENTWISE_THREADS) sum += x[i] * x[i];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (thread % 32 == 0) of_warp[thread / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += of_warp[i];

    const float scale = 1.0f / sqrtf(sum / (float)a.d_model + a.epsilon);
    for (int i = thread; i < a.d_model; i += KVQ_ELEMENTWISE_THREADS) y[i] = x[i] * scale * a.w[i];
}
KVQ_EXPORT_KERNEL(kvq_cuda_norm)

/* ---- RoPE -------------------------------------------------------------------------------- */

/* The pairs are those of kvq_rope_first and kvq_rope_second of ops.h. */
extern "C" __global__ void __launch_bounds__(KVQ_ELEMENTWISE_THREADS)
    kvq_cuda_rotate(const kvq_cuda_rotate_args a) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x), t = (int)blockIdx.y;
    const int pairs = a.d_rope / 2, pair = i % pairs, head = i / pairs;
    if (head >= a.n_heads + a.n_kv_heads) return;
    float *const x = head < a.n_heads
                         ? a.q + ((size_t)t * a.n_heads + head) * a.d_head
                         : a.k + ((size_t)t * a.n_kv_heads + (head - a.n_heads)) * a.d_head;
    const float *const angle = a.cos_sin + (size_t)t * a.d_rope + 2 * pair;
    const int first = a.neox ? pair : 2 * pair;
    const int second = a.neox ? pair + pairs : 2 * pair + 1;
    const float c = angle[0], s = angle[1], x0 = x[first], x1 = x[second];
    x[first] = x0 * c - x1 * s;
    x[second] = x0 * s + x1 * c;
}
KVQ_EXPORT_KERNEL(kvq_cuda_rotate)

/* ---- gate of the feed-forward ------------------------------------------------------------ */

/* With e = exp(-|x|), which cannot overflow: silu(x) = x * (x < 0 ? e : 1) / (1 + e). */
extern "C" __global__ void __launch_bounds__(KVQ_ELEMENTWISE_THREADS)
    kvq_cuda_gate(const kvq_cuda_gate_args a) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= a.d_ff) return;
    const size_t at = (size_t)blockIdx.y * a.d_ff + i;
    const float x = a.gate[at], e = expf(-fabsf(x));
    a.gate[at] = x * (x < 0.0f ? e : 1.0f) / (1.0f + e) * a.up[at];
}
KVQ_EXPORT_KERNEL(kvq_cuda_gate)
