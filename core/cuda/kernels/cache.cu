/* cache.cu: vectors on their way into the cache: into the basis (kvq_cuda_prepare), into sealed
 * blocks (kvq_cuda_seal), to sinks and recent rows (kvq_cuda_append). What kv/kv_attend.c and
 * kv/kv_ring.c do on the CPU, to the bit.
 *
 * Compiled without contraction of products into sums (-fmad=false). Tensors, launch shapes and
 * order: prepare_args.h.
 */
#include "cuda/kernels/port.cuh"

#include "cuda/kernels/basis.cuh"
#include "cuda/kernels/encode_c8.cuh"
#include "cuda/kernels/encode_ggml.cuh"
#include "cuda/kernels/encode_levels.cuh"
#include "cuda/kernels/encode_mixed.cuh"
#include "cuda/kernels/encode_trellis.cuh"
#include "cuda/kernels/encode_u.cuh"
#include "cuda/kernels/prepare_args.h"

/* CUDA blocks that registers leave room for on a multiprocessor. Left to itself, ptxas spills some
 * to make room for more, which shared memory would not hold. */
enum { FIT = 4 };

/* ---- into the basis ---------------------------------------------------------------------- */

enum kvq_kind { KVQ_PREPARE_QUERIES, KVQ_PREPARE_KEYS, KVQ_PREPARE_VALUES };

/* x[N][d] of which m <= N vectors are read, the others zero: vector i is that of token
 * (first + i) / per_token and of head `head` * per_token + (first + i) % per_token. */
template <int N>
static __device__ __forceinline__ void load_vectors(float *x, const float *from, int first, int m,
                                                    int head, int n_heads, int per_token, int width,
                                                    int d, float factor) {
    for (KVQ_EACH(i, N * d)) {
        const int v = first + i / d, c = i % d, t = v / per_token;
        const size_t row = ((size_t)t * n_heads + head) * per_token + v % per_token;
        x[i] = i / d < m && c < width ? from[row * width + c] * factor : 0.0f;
    }
    __syncthreads();
}

template <int N>
static __device__ __forceinline__ void prepare(const kvq_cuda_prepare_args &a, float *x, int first,
                                               int m, int head, int kind) {
    const kvq_cuda_cache &cache = a.cache;
    const int d = cache.d, n_heads = cache.n_heads;
    float *const spare = x + N * d;
    if (kind == KVQ_PREPARE_QUERIES) {
        const float over_root = 1.0f / sqrtf((float)cache.d_head);
        load_vectors<N>(x, a.q, first, m, head, n_heads, cache.group, cache.d_head, d, over_root);
        const float *const y = kvq_turn_queries<N>(cache.tracks[head], x, spare, d);
        float *const to =
            a.prepared + ((size_t)head * cache.n_batch * cache.group + first) * (size_t)d;
        for (KVQ_EACH(i, m * d)) to[i] = y[i];
        return;
    }
    const bool keys = kind == KVQ_PREPARE_KEYS;
    load_vectors<N>(x, keys ? a.k : a.v, first, m, head, n_heads, 1, cache.d_head, d, 1.0f);
    const float *const y = kvq_store<N>(cache.tracks[keys ? head : n_heads + head], x, spare, d);
    uint16_t *const to = (keys ? cache.new_rows[0] : cache.new_rows[1]) +
                         ((size_t)head * cache.n_batch + first) * (size_t)d;
    for (KVQ_EACH(i, m * d)) to[i] = kvq_f32_to_f16(y[i]);
}

extern "C" __global__ void __launch_bounds__(KVQ_CUDA_CACHE_THREADS, FIT)
    kvq_cuda_prepare(const kvq_cuda_prepare_args a) {
    KVQ_SHARED_MEMORY(float, x);
    const int head = (int)blockIdx.y, kind = (int)blockIdx.z;
    const int n = a.cache.step->n * (kind == KVQ_PREPARE_QUERIES ? a.cache.group : 1);
    const int first = (int)blockIdx.x * KVQ_CUDA_VECTORS, m = min(n - first, KVQ_CUDA_VECTORS);
    if (m <= 0) return;
    if (m == 1)
        prepare<1>(a, x, first, m, head, kind);
    else
        prepare<KVQ_CUDA_VECTORS>(a, x, first, m, head, kind);
}
KVQ_EXPORT_KERNEL(kvq_cuda_prepare)

/* ---- into blocks ------------------------------------------------------------------------- */

/* The rows of block b of a track, into shared memory. */
static __device__ __forceinline__ void load_rows(uint16_t *rows, const kvq_cuda_cache &cache,
                                                 int head, int side, int b) {
    const int words = cache.d / 2, stride = kvq_cuda_row_stride(cache.d), held = cache.step->held;
    for (KVQ_EACH(i, KVQ_BLOCK * words)) {
        const int t = i / words, word = i % words;
        const uint16_t *const row = kvq_cuda_row(cache, head, side, b * KVQ_BLOCK + t, held);
        *(uint32_t *)(rows + t * stride + 2 * word) = ((const uint32_t *)row)[word];
    }
    __syncthreads();
}

/* Takes the waves of a track from its keys (kv/kv_wave.c). factor: [2 * KVQ_WAVES][KVQ_BLOCK]. */
static __device__ __forceinline__ void take_waves(uint16_t *rows, float *factor,
                                                  const kvq_cuda_cache &cache,
                                                  const kvq_cuda_track &track, int b) {
    const int d = cache.d, stride = kvq_cuda_row_stride(d), n = track.n_waves;
    for (KVQ_EACH(i, n * KVQ_BLOCK)) {
        const int wave = i / KVQ_BLOCK, t = i % KVQ_BLOCK, pair = track.pair[wave];
        const float *const start = cache.turns_first + ((size_t)b * cache.n_pairs + pair) * 2;
        const float *const within = cache.turns_within + (size_t)pair * 2 * KVQ_BLOCK;
        const float c = within[t], s = within[KVQ_BLOCK + t];
        factor[2 * wave * KVQ_BLOCK + t] = -(start[0] * c - start[1] * s);
        factor[(2 * wave + 1) * KVQ_BLOCK + t] = -(start[1] * c + start[0] * s);
    }
    __syncthreads();
    for (KVQ_EACH(i, KVQ_BLOCK * d)) {
        const int t = i / d, c = i % d;
        float x = kvq_f16_to_f32(rows[t * stride + c]);
        for (int wave = 0; wave < n; wave++) {
            x += factor[2 * wave * KVQ_BLOCK + t] * track.wave_u[wave * d + c] +
                 factor[(2 * wave + 1) * KVQ_BLOCK + t] * track.wave_w[wave * d + c];
        }
        rows[t * stride + c] = kvq_f32_to_f16(x);
    }
    __syncthreads();
}

static __device__ __forceinline__ void encode(uint8_t *block, const kvq_rows &rows,
                                              const kvq_cuda_track &track, float *scratch) {
    const kvq_kv_shape &shape = track.shape;
    switch (track.codec) {
    case KVQ_CODEC_f16:
        kvq_encode_ggml::encode_f16(block, rows);
        return;
    case KVQ_CODEC_q8_0:
        kvq_encode_ggml::encode_q8_0(block, rows);
        return;
    case KVQ_CODEC_q4_0:
        kvq_encode_ggml::encode_q4_0(block, rows);
        return;
    case KVQ_CODEC_u1:
    case KVQ_CODEC_u2:
    case KVQ_CODEC_u4: {
        const int bits = track.codec == KVQ_CODEC_u1 ? 1 : track.codec == KVQ_CODEC_u2 ? 2 : 4;
        const float step = bits == 1 ? KVQ_STEP_1 : bits == 2 ? KVQ_STEP_2 : KVQ_STEP_4;
        kvq_encode_u::encode(block, rows, shape, scratch, bits, step);
        return;
    }
    case KVQ_CODEC_c8:
        kvq_encode_c8::encode(block, rows, shape, scratch);
        return;
    case KVQ_CODEC_mixed:
        kvq_encode_mixed::encode(block, rows, shape, scratch);
        return;
    case KVQ_CODEC_t1:
        kvq_encode_trellis::encode<1>(block, rows, scratch);
        return;
    case KVQ_CODEC_t2:
        kvq_encode_trellis::encode<2>(block, rows, scratch);
        return;
    case KVQ_CODEC_n2:
        kvq_encode_levels::encode<2>(block, rows, scratch);
        return;
    case KVQ_CODEC_n3:
        kvq_encode_levels::encode<3>(block, rows, scratch);
        return;
    case KVQ_CODEC_nf4:
        kvq_encode_levels::encode<4>(block, rows, scratch);
        return;
    }
}

extern "C" __global__ void __launch_bounds__(KVQ_CUDA_CACHE_THREADS, FIT)
    kvq_cuda_seal(const kvq_cuda_seal_args a) {
    KVQ_SHARED_MEMORY(uint16_t, halves);
    const kvq_cuda_cache &cache = a.cache;
    const int head = (int)blockIdx.x / 2, side = (int)blockIdx.x % 2;
    if ((int)blockIdx.y >= cache.step->seals) return;
    const int b = cache.step->sealed + (int)blockIdx.y;
    const kvq_cuda_track &track = cache.tracks[side * cache.n_heads + head];
    const int stride = kvq_cuda_row_stride(cache.d);
    float *const scratch = (float *)(halves + KVQ_BLOCK * stride);
    load_rows(halves, cache, head, side, b);
    if (track.n_waves) take_waves(halves, scratch, cache, track, b);
    const kvq_rows rows = {halves, stride, cache.d};
    encode(kvq_cuda_block(cache, track, b), rows, track, scratch);
}
KVQ_EXPORT_KERNEL(kvq_cuda_seal)

/* ---- sinks and recent rows --------------------------------------------------------------- */

extern "C" __global__ void __launch_bounds__(KVQ_CUDA_CACHE_THREADS, FIT)
    kvq_cuda_append(const kvq_cuda_append_args a) {
    const kvq_cuda_cache &cache = a.cache;
    const int head = (int)blockIdx.x / 2, lane = (int)threadIdx.x % 32;
    const bool keys = blockIdx.x % 2 == 0;
    const int t = (int)blockIdx.y * KVQ_CUDA_APPEND_ROWS + (int)threadIdx.x / 32;
    const int n = cache.step->n, d = cache.d;
    if (t >= n) return;
    const int i = cache.step->held + t - cache.n_sinks; /* among the rows after the sinks */
    if (i >= 0 && t < n - cache.recent_rows) return;    /* a later row takes its slot */
    const size_t row = i < 0 ? (size_t)head * cache.n_sinks + (i + cache.n_sinks)
                             : (size_t)head * cache.recent_rows + i % cache.recent_rows;
    uint16_t *const begin = i < 0 ? (keys ? cache.sinks[0] : cache.sinks[1])
                                  : (keys ? cache.recent[0] : cache.recent[1]);
    const uint16_t *const from = (keys ? cache.new_rows[0] : cache.new_rows[1]) +
                                 ((size_t)head * cache.n_batch + t) * (size_t)d;
    uint32_t *const to = (uint32_t *)(begin + row * (size_t)d);
    for (int word = lane; word < d / 2; word += 32) to[word] = ((const uint32_t *)from)[word];
}
KVQ_EXPORT_KERNEL(kvq_cuda_append)
