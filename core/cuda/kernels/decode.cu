/* decode.cu: attention of one token's queries over packed blocks, on tensor cores.
 *
 * A warp takes sealed blocks by itself, up to eight query heads of a KV head at once, and keeps its
 * results in registers; nothing is unpacked but into fragments. Queries lie in shared memory.
 *
 * Scores: the rows of A are queries times the scales of the block's channels, in halves; the
 * columns of B are tokens. A code of 2 bits stays where it lies in its half of a word and is taken
 * as it is, for a subnormal half of value code * 4^j * 2^-24: tensor cores multiply those exactly,
 * and 4^-j is in the query. So unpacking is one AND for two codes.
 *
 * Keys of codec mixed: as 8-bit products, with queries times scales in 16 bits: decode_mixed.cuh.
 *
 * Values: the rows of A are the weights times the scales of their tokens, in 16 bits, the high ones
 * of eight queries above the low ones; the columns of B are channels, whose levels byte
 * permutations look up, four tokens at a time. The order of tokens is chosen for that:
 * decode_order.cuh.
 */
#include "cuda/kernels/port.cuh"

#include "cuda/kernels/decode_halves.cuh"
#include "cuda/kernels/decode_mixed.cuh"
#include "cuda/kernels/decode_rows.cuh"
#include "cuda/kernels/decode_values.cuh"

/* How codes of BITS lie: word w = 4 * step + lane % 4 of a token has the channels 32 / BITS * w +
 * 4 j + k, k the byte, j the place in it. A fragment has j of it: bytes 0 and 2 in its first
 * register, bytes 1 and 3 in its second. */
template <int BITS, int D> struct key_words {
    enum { STEPS = (D * BITS + 127) / 128, PLACES = 8 / BITS, PER_WORD = 32 / BITS };
};

/* In shared memory: queries in the order in which codes come out of their words, for all warps of a
 * block of threads; x times what load_queries returns is the query. */
struct key_queries {
    uint2 x[8][32]; /* of step * PLACES + j; of each lane */
};

template <int BITS, int D>
static __device__ __forceinline__ float load_queries(key_queries &q, const float *x, int d,
                                                     bool there) {
    typedef key_words<BITS, D> W;
    const int lane = threadIdx.x % 32;
    const float largest = largest_of_query(x, d, there);
    const float inverse = largest > 0 ? 1.0f / largest : 0.0f;
    for (int i = threadIdx.x / 32; i < W::STEPS * W::PLACES; i += KVQ_CUDA_DECODE_WARPS) {
        const int step = i / W::PLACES, j = i % W::PLACES;
        const int c = W::PER_WORD * (4 * step + lane % 4) + 4 * j;
        const float unit = inverse / (float)(1 << BITS * j);
        __half2 of[2] = {both(0), both(0)};
        if (there && c < d) {
            of[0] = __floats2half2_rn(unit * x[c], unit * x[c + 2]);
            of[1] = __floats2half2_rn(unit * x[c + 1], unit * x[c + 3]);
        }
        q.x[i][lane] = make_uint2(bits_of(of[0]), bits_of(of[1]));
    }
    __syncthreads();
    return largest;
}

/* The scores of a block for the query of this lane's row, in units of log 2: those of 16 tokens, in
 * an order of decode_order.cuh. */
template <class Order, int BITS, int D>
static __device__ __forceinline__ void score_block(float s[16], const key_queries &q,
                                                   float of_queries, const uint8_t *block,
                                                   const kvq_kv_shape &sh) {
    typedef key_words<BITS, D> W;
    const int part = threadIdx.x % 4, column = threadIdx.x % 32 / 4;
    const int d = sh.d, words = (d * BITS + 31) / 32;
    const uint8_t *const means = block + KVQ_U_SCALES + KVQ_BLOCK; /* one group of channels */
    const uint8_t *const scales = means + d, *const codes = scales + d;
    const uint32_t lowest = ((1u << BITS) - 1) * 0x00010001u;
    uint32_t scaled[W::STEPS][W::PLACES][2];
    float middle[4] = {0, 0, 0, 0}, mean[4] = {0, 0, 0, 0};
#pragma unroll
    for (int step = 0; step < W::STEPS; step++) {
#pragma unroll
        for (int j = 0; j < W::PLACES; j++) {
            const int c = W::PER_WORD * (4 * step + part) + 4 * j;
            const bool here = c < d; /* beyond, the query is 0 */
            const uint32_t scale = here ? word_at(scales + c) : 0;
            const uint32_t of_mean = here ? word_at(means + c) ^ 0x80808080u : 0; /* from -128 on */
            const __half2 up = both(1 << BITS * j);
            const uint2 x = q.x[step * W::PLACES + j][threadIdx.x % 32];
            scaled[step][j][0] = bits_of(__hmul2(halves_of(x.x), halves_at(scale, 0x4240, 1024)));
            scaled[step][j][1] = bits_of(__hmul2(halves_of(x.y), halves_at(scale, 0x4341, 1024)));
            const uint32_t plain[4] = {x.x, 0, x.y, 0};
            const uint32_t b[2] = {bits_of(__hmul2(halves_at(of_mean, 0x4240, 1152), up)),
                                   bits_of(__hmul2(halves_at(of_mean, 0x4341, 1152), up))};
            const uint32_t a[4] = {scaled[step][j][0], 0, scaled[step][j][1], 0};
            const uint32_t highest[2] = {lowest << (BITS * j), lowest << (BITS * j)};
            kvq_mma_f16(mean, plain, b);
            kvq_mma_f16(middle, a, highest);
        }
    }
    const float unit =
        of_queries * kvq_half_at(block + 2) * kvq_half_at(block + 4) * (0x1p24f * KVQ_LOG2E);
    const float shift = of_queries * kvq_half_at(block) * mean[0] * KVQ_LOG2E;
    const Order token_scales(block + KVQ_U_SCALES);
#pragma unroll
    for (int which = 0; which < 2; which++) {
        float product[4][4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
#pragma unroll
            for (int i = 0; i < 4; i++) product[t][i] = 0;
        }
#pragma unroll
        for (int step = 0; step < W::STEPS; step++) {
            const int w = 4 * step + part;
            const uint8_t *const at = codes + ((Order::octet(column, which) * words + w) * 8 +
                                               4 * Order::half(column, which)) *
                                                  4;
            const uint4 four =
                w < words ? *reinterpret_cast<const uint4 *>(at) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const uint32_t word = word_of(four, t);
#pragma unroll
                for (int j = 0; j < W::PLACES; j++) {
                    const uint32_t mask = lowest << (BITS * j);
                    const uint32_t a[4] = {scaled[step][j][0], 0, scaled[step][j][1], 0};
                    const uint32_t b[2] = {word & mask, word >> 8 & mask};
                    kvq_mma_f16(product[t], a, b);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            s[8 * which + i] = (product[i / 2][i % 2] - 0.5f * middle[0]) *
                                   (unit * token_scales.at(8 * which + i)) +
                               shift;
        }
    }
}

/* ---- the kernel ---------------------------------------------------------------------------------
 *
 * Splits but the last share out the sealed blocks; the last has all other rows. Grid: query heads
 * of a KV head / 8, KV heads, splits (2 at least).
 */

/* What the threads of a block have to do. */
struct decode_task {
    const kvq_cuda_attend_args &a;
    const kvq_cuda_track &keys, &values;
    const float *x;  /* the query of the lane's row; that of another where there is none */
    bool there;      /* whether there is one */
    int head, first; /* of KV heads; of its query heads */
    int n;           /* query heads */
    int begin, end;  /* sealed blocks of the split */
};

/* A warp's way along the sealed blocks of a split: kvq_cuda_block without a division for each. */
struct block_walk {
    int b, end; /* this block; of the split */
    int within, chunk_blocks;
    uint8_t *const *chunk;
    uint64_t before[2]; /* of keys and values */
    uint32_t stride[2];

    __device__ __forceinline__ explicit block_walk(const decode_task &task) {
        const kvq_cuda_cache &cache = task.a.cache;
        b = task.begin + threadIdx.x / 32;
        end = task.end;
        chunk_blocks = cache.chunk_blocks;
        within = b % chunk_blocks;
        chunk = cache.chunks + b / chunk_blocks;
        before[0] = kvq_cuda_first_block(cache, task.keys);
        before[1] = kvq_cuda_first_block(cache, task.values);
        stride[0] = task.keys.stride;
        stride[1] = task.values.stride;
    }
    __device__ __forceinline__ bool there() const { return b < end; }
    __device__ __forceinline__ void next() {
        b += KVQ_CUDA_DECODE_WARPS;
        within += KVQ_CUDA_DECODE_WARPS;
        for (; within >= chunk_blocks; within -= chunk_blocks) chunk++;
    }
    __device__ __forceinline__ const uint8_t *block(int side) const {
        return *chunk + before[side] + (uint64_t)within * stride[side];
    }
};

template <int BITS, int D, class Values>
static __device__ __forceinline__ void decode_uniform(const decode_task &task, const Values &values,
                                                      key_queries &q, all_warps<D> &all) {
    const kvq_cuda_cache &cache = task.a.cache;
    running<D> r;
    clear(r);
    const float of_queries = load_queries<BITS, D>(q, task.x, cache.d, task.there);
    for (block_walk at(task); at.there(); at.next()) {
        float s[16];
        score_block<typename Values::order, BITS, D>(s, q, of_queries, at.block(0),
                                                     task.keys.shape);
        values.add(r, s, at.block(1), cache.d);
    }
    finish(r, all, task.a, task.first, task.n, Values::channel);
}

template <int D, class Values>
static __device__ __forceinline__ void decode_mixed(const decode_task &task, const Values &values,
                                                    mixed_queries<D> &q, all_warps<D> &all) {
    const kvq_cuda_cache &cache = task.a.cache;
    running<D> r;
    clear(r);
    const mixed_lane mine = load_queries(q, task.x, task.keys.shape, task.there);
    const projected on = project(task.keys, task.x, cache.d);
    for (block_walk at(task); at.there(); at.next()) {
        float s[16];
        score_mixed(s, q, mine, at.block(0), task.keys.shape);
        if (task.keys.n_waves) add_waves(s, q.turned[threadIdx.x / 32], cache, task.keys, on, at.b);
        values.add(r, s, at.block(1), cache.d);
    }
    finish(r, all, task.a, task.first, task.n, Values::channel);
}

/* Sealed blocks by the kind of their values; the codec of keys is chosen here. Shared memory is the
 * kernel's: in templates the simulator would take it for global memory. */
struct halves_blocks {
    template <int D> struct shared {
        all_warps<D> all;
    };
    template <int D>
    static __device__ __forceinline__ void decode(const decode_task &task, shared<D> &sh) {
        const kvq_cuda_cache &cache = task.a.cache;
        running<D> r;
        row_queries<D> q;
        clear(r);
        load_queries(q, task.x, cache.d, task.there);
        for (block_walk at(task); at.there(); at.next()) {
            const uint8_t *const keys = at.block(0);
            const uint8_t *const values = at.block(1);
            add_rows(r, q, cache.d, KVQ_BLOCK, [&](int side, int t) {
                return reinterpret_cast<const uint16_t *>(side ? values : keys) + t * cache.d;
            });
        }
        finish(r, sh.all, task.a, task.first, task.n, row_channel);
    }
};

struct pairs_blocks {
    template <int D> union shared {
        all_warps<D> all;
        key_queries q;
    };
    template <int D>
    static __device__ __forceinline__ void decode(const decode_task &task, shared<D> &sh) {
        decode_uniform<2>(task, c8_values(), sh.q, sh.all);
    }
};

struct trellis_blocks {
    template <int D> union shared {
        all_warps<D> all;
        key_queries uniform;
        mixed_queries<D> mixed;
    };
    template <int D>
    static __device__ __forceinline__ void decode(const decode_task &task, shared<D> &sh) {
        const t_values values = {task.values.codec == KVQ_CODEC_t1};
        if (task.keys.codec == KVQ_CODEC_mixed) {
            decode_mixed(task, values, sh.mixed, sh.all);
        } else if (task.keys.codec == KVQ_CODEC_u1) {
            decode_uniform<1>(task, values, sh.uniform, sh.all);
        } else if (task.keys.codec == KVQ_CODEC_u2) {
            decode_uniform<2>(task, values, sh.uniform, sh.all);
        } else {
            decode_uniform<4>(task, values, sh.uniform, sh.all);
        }
    }
};

template <int D>
static __device__ __forceinline__ void decode_rows(const decode_task &task, all_warps<D> &all,
                                                   const kvq_cuda_step &step) {
    const kvq_cuda_cache &cache = task.a.cache;
    const kvq_units units = kvq_count_units(cache, step);
    running<D> r;
    row_queries<D> q;
    clear(r);
    load_queries(q, task.x, cache.d, task.there);
    for (int u = units.sealed + threadIdx.x / 32; u < kvq_total_units(units);
         u += KVQ_CUDA_DECODE_WARPS) {
        const kvq_unit unit = kvq_unit_at(cache, step, units, u);
        add_rows(r, q, cache.d, unit.n_tokens, [&](int side, int t) {
            return kvq_row_of(cache, task.head, side, unit.first + t, step.held);
        });
    }
    finish(r, all, task.a, task.first, task.n, row_channel);
}

template <int D, class Blocks>
static __device__ __forceinline__ void decode(const kvq_cuda_attend_args &a,
                                              typename Blocks::template shared<D> &sh) {
    const kvq_cuda_cache &cache = a.cache;
    const kvq_cuda_step step = *cache.step;
    const int head = blockIdx.y, first = blockIdx.x * 8, n = min(8, cache.group - first);
    const int row = threadIdx.x % 32 / 4, split = blockIdx.z, n_splits = gridDim.z - 1;
    const size_t query = (size_t)head * cache.n_batch * cache.group + first + min(row, n - 1);
    const decode_task task = {a,
                              cache.tracks[head],
                              cache.tracks[cache.n_heads + head],
                              a.q + query * cache.d,
                              row < n,
                              head,
                              first,
                              n,
                              (int)((int64_t)step.sealed * split / n_splits),
                              (int)((int64_t)step.sealed * (split + 1) / n_splits)};
    if (split == n_splits) {
        decode_rows<D>(task, sh.all, step);
    } else {
        Blocks::template decode<D>(task, sh);
    }
}

/* RESIDENT blocks at least fit a multiprocessor at a time, as far as registers go; three of the
 * widest ones would have spills on sm_120. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define WIDE 2
#else
#define WIDE 3
#endif
#define DECODE(KIND, D, RESIDENT)                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * KVQ_CUDA_DECODE_WARPS, RESIDENT)             \
        kvq_cuda_decode_##KIND##_##D(const kvq_cuda_attend_args a) {                               \
        __shared__ KIND##_blocks::shared<D> shared;                                                \
        decode<D, KIND##_blocks>(a, shared);                                                       \
    }                                                                                              \
    KVQ_EXPORT_KERNEL(kvq_cuda_decode_##KIND##_##D)
DECODE(halves, 64, 4)
DECODE(halves, 128, WIDE)
DECODE(pairs, 64, 4)
DECODE(pairs, 128, WIDE)
DECODE(trellis, 64, 3)
DECODE(trellis, 128, 2)
