/* attend.cu: attention of many queries: prompts, and codecs that decode.cu has no path for.
 *
 * A block of threads takes 16 rows of queries per warp (attend_args.h) and goes through the units
 * of its split, 32 tokens at a time: keys are unpacked into shared memory as halves, all warps
 * multiply them on tensor cores, weigh, then the same with values. Nothing unpacked ever reaches
 * global memory. Queries go in as a sum of two halves, so that scores are as exact as the keys.
 *
 * Softmax is online (Milakov and Gimelshein, arXiv 1805.02867), the order of work that of
 * FlashAttention-2 (arXiv 2307.08691): a warp owns rows, so weights never leave its registers.
 */
#include "cuda/kernels/port.cuh"

#include "cuda/kernels/units.cuh"
#include "cuda/kernels/unpack.cuh"
#include "cuda/kernels/waves.cuh"

enum { TOKENS = KVQ_CUDA_ATTEND_TOKENS, PADDING = KVQ_CUDA_ATTEND_PADDING };

/* What the threads of a block share. */
typedef struct attend_memory {
    __half *high, *low; /* [rows][d + PADDING] queries */
    __half *tile;  /* keys [TOKENS][d + PADDING], then rows of which the first is the block's mean;
                      then values [slice][TOKENS + PADDING] */
    float *turned; /* [rows][2 * KVQ_WAVES] */
} attend_memory;

static __device__ __forceinline__ uint32_t two_halves(const __half *p) {
    return *reinterpret_cast<const uint32_t *>(p);
}

template <int ROWS>
static __device__ __forceinline__ void load_queries(const attend_memory &m, const float *q, int d,
                                                    int n_rows) {
    for (int i = threadIdx.x; i < ROWS * d; i += blockDim.x) {
        const int row = i / d, c = i % d;
        const float x = row < n_rows ? q[(size_t)row * d + c] : 0.0f;
        const __half high = __float2half_rn(x);
        m.high[row * (d + PADDING) + c] = high;
        m.low[row * (d + PADDING) + c] = __float2half_rn(x - __half2float(high));
    }
}

/* Where the tokens of half a unit come from. */
typedef struct attend_source {
    const kvq_cuda_track *track;
    const uint8_t *block; /* NULL: rows */
    int first, n_tokens;  /* of the half: position in the timeline, tokens there are */
    int within;           /* of its first token, in the block */
    int head, side, held;
} attend_source;

/* Channels c .. c + 7 of token t of the half; zeros behind its end. */
static __device__ __forceinline__ kvq_eight unpack_token(const kvq_cuda_cache &cache,
                                                         const attend_source &from, int t, int c) {
    if (t < from.n_tokens) {
        if (from.block) return kvq_unpack(*from.track, from.block, from.within + t, c);
        const uint16_t *const row =
            kvq_row_of(cache, from.head, from.side, from.first + t, from.held);
        return kvq_unpack_f16(reinterpret_cast<const uint8_t *>(row), 0, 0, c);
    }
    kvq_eight none;
#pragma unroll
    for (int i = 0; i < 8; i++) none.x[i] = 0;
    return none;
}

static __device__ __forceinline__ void unpack_keys(const kvq_cuda_cache &cache,
                                                   const attend_source &from, __half *tile,
                                                   const int8_t *mean) {
    const int d = cache.d;
    for (int i = threadIdx.x; i < TOKENS * d / 8; i += blockDim.x) {
        const int t = i % TOKENS, c = i / TOKENS * 8;
        const kvq_eight x = unpack_token(cache, from, t, c);
        uint32_t *const to = reinterpret_cast<uint32_t *>(tile + t * (d + PADDING) + c);
#pragma unroll
        for (int j = 0; j < 4; j++) to[j] = kvq_pack_halves(x.x[2 * j], x.x[2 * j + 1]);
    }
    if (!mean) return;
    for (int i = threadIdx.x; i < KVQ_CUDA_ATTEND_MEAN_ROWS * d; i += blockDim.x) {
        const int row = i / d, c = i % d;
        tile[(TOKENS + row) * (d + PADDING) + c] = __float2half_rn(row ? 0.0f : (float)mean[c]);
    }
}

/* Values stand token by token within a channel, as the fragments of a product over tokens want. */
static __device__ __forceinline__ void unpack_values(const kvq_cuda_cache &cache,
                                                     const attend_source &from, __half *tile,
                                                     int first_channel, int n_channels) {
    for (int i = threadIdx.x; i < TOKENS * n_channels / 8; i += blockDim.x) {
        const int t = i % TOKENS, c = i / TOKENS * 8;
        const kvq_eight x = unpack_token(cache, from, t, first_channel + c);
#pragma unroll
        for (int j = 0; j < 8; j++)
            tile[(c + j) * (TOKENS + PADDING) + t] = __float2half_rn(x.x[j]);
    }
}

/* The scores of a warp's 16 rows: s[i] of tokens 8 i .. 8 i + 7, and s[4] of the mean. */
static __device__ __forceinline__ void multiply_keys(float s[5][4], const attend_memory &m,
                                                     int first_row, int d, bool has_mean) {
    const int lane = threadIdx.x % 32, g = lane / 4, pair = lane % 4 * 2, width = d + PADDING;
#pragma unroll
    for (int i = 0; i < 5; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) s[i][j] = 0;
    }
    for (int k = 0; k < d; k += 16) {
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = (first_row + g + i % 2 * 8) * width + k + i / 2 * 8 + pair;
            high[i] = two_halves(m.high + at);
            low[i] = two_halves(m.low + at);
        }
#pragma unroll
        for (int i = 0; i < 5; i++) {
            if (i == 4 && !has_mean) break;
            const __half *const row = m.tile + (8 * i + g) * width + k + pair;
            const uint32_t b[2] = {two_halves(row), two_halves(row + 8)};
            kvq_mma_f16(s[i], high, b);
            kvq_mma_f16(s[i], low, b);
        }
    }
}

/* The state of a warp's 16 rows: of rows g and g + 8 in a lane, g = lane / 4. */
template <int TILES> struct running {
    float o[TILES][4]; /* channels 8 i + lane % 4 * 2 and the next one, of both rows */
    float largest[2], sum[2];
};

/* Turns scores into weights, which it leaves in s, and makes room for them in the running sums. */
template <int TILES>
static __device__ __forceinline__ void weigh(float s[4][4], running<TILES> &r) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float largest = r.largest[row];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            largest = fmaxf(largest, fmaxf(s[i][2 * row], s[i][2 * row + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        const float safe = largest == -INFINITY ? 0.0f : largest; /* nothing seen yet */
        const float factor = exp2f((r.largest[row] - safe) * KVQ_LOG2E);
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 2 * row; j < 2 * row + 2; j++) {
                /* as it is multiplied, so that weights and their sum agree */
                s[i][j] = __half2float(__float2half_rn(exp2f((s[i][j] - safe) * KVQ_LOG2E)));
                sum += s[i][j];
            }
        }
        r.largest[row] = largest;
        r.sum[row] = r.sum[row] * factor + sum;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            r.o[i][2 * row] *= factor;
            r.o[i][2 * row + 1] *= factor;
        }
    }
}

template <int TILES>
static __device__ __forceinline__ void multiply_values(running<TILES> &r, const float s[4][4],
                                                       const __half *tile, int n_channels) {
    const int lane = threadIdx.x % 32, g = lane / 4, pair = lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < TOKENS / 16; k++) {
        const float *const left = s[2 * k], *const right = s[2 * k + 1];
        const uint32_t a[4] = {kvq_pack_halves(left[0], left[1]), kvq_pack_halves(left[2], left[3]),
                               kvq_pack_halves(right[0], right[1]),
                               kvq_pack_halves(right[2], right[3])};
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            if (8 * i >= n_channels) break;
            const __half *const row = tile + (8 * i + g) * (TOKENS + PADDING) + 16 * k + pair;
            const uint32_t b[2] = {two_halves(row), two_halves(row + 8)};
            kvq_mma_f16(r.o[i], a, b);
        }
    }
}

template <int WARPS, int TILES>
static __device__ __forceinline__ void attend(const kvq_cuda_attend_args &a) {
    const int ROWS = 16 * WARPS, SLICE = 8 * TILES;
    KVQ_SHARED_MEMORY(uint8_t, shared);
    const kvq_cuda_cache &cache = a.cache;
    const kvq_cuda_step step = *cache.step;
    const int d = cache.d, head = blockIdx.y, lane = threadIdx.x % 32;
    const int split = blockIdx.z % a.n_splits, channel = blockIdx.z / a.n_splits * SLICE;
    const int n_channels = min(SLICE, d - channel);
    const int n_rows = step.n * cache.group, first_row = blockIdx.x * ROWS;
    if (first_row >= n_rows) return;
    const kvq_cuda_track &keys = cache.tracks[head];
    const kvq_cuda_track &values = cache.tracks[cache.n_heads + head];
    const float *const q = a.q + ((size_t)head * cache.n_batch * cache.group + first_row) * d;
    const size_t mean_at = kvq_codec_mean_at((kvq_codec_id)keys.codec, &keys.shape);

    attend_memory m;
    m.high = reinterpret_cast<__half *>(shared);
    m.low = m.high + ROWS * (d + PADDING);
    m.turned = reinterpret_cast<float *>(m.low + ROWS * (d + PADDING));
    m.tile = reinterpret_cast<__half *>(m.turned + ROWS * 2 * KVQ_WAVES);
    load_queries<16 * WARPS>(m, q, d, min(ROWS, n_rows - first_row));
    const kvq_projected on = kvq_project_waves(keys, q, min(ROWS, n_rows - first_row), d);

    running<TILES> r;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) r.o[i][j] = 0;
    }
    r.largest[0] = r.largest[1] = -INFINITY;
    r.sum[0] = r.sum[1] = 0;

    const kvq_units units = kvq_count_units(cache, step);
    const int total = kvq_total_units(units);
    const int begin = (int)((int64_t)total * split / a.n_splits);
    const int end = (int)((int64_t)total * (split + 1) / a.n_splits);
    const int my_row = threadIdx.x / 32 * 16 + lane / 4; /* of the tile; the other is 8 further */
    /* The last position that this thread's rows and the block's see. */
    const int sees[2] = {step.held + (first_row + my_row) / cache.group,
                         step.held + (first_row + my_row + 8) / cache.group};
    const int seen = step.held + min(first_row + ROWS - 1, n_rows - 1) / cache.group;

    for (int u = begin; u < end; u++) {
        const kvq_unit unit = kvq_unit_at(cache, step, units, u);
        if (unit.first > seen) break; /* units come in the order of their tokens, but for sinks */
        const uint8_t *const key_block = unit.sealed ? kvq_cuda_block(cache, keys, u) : 0;
        const uint8_t *const value_block = unit.sealed ? kvq_cuda_block(cache, values, u) : 0;
        const bool has_mean = unit.sealed && mean_at;
        if (unit.sealed && keys.n_waves) {
            __syncthreads(); /* before others' factors change */
            kvq_turn_waves(m.turned, cache, keys, on, u);
        }
        for (int half = 0; half < unit.n_tokens; half += TOKENS) {
            attend_source from;
            from.track = &keys;
            from.block = key_block;
            from.first = unit.first + half;
            from.n_tokens = min((int)TOKENS, unit.n_tokens - half);
            from.within = half;
            from.head = head;
            from.side = 0;
            from.held = step.held;
            float s[5][4];
            __syncthreads(); /* values of the tokens before are done with */
            unpack_keys(cache, from, m.tile,
                        has_mean ? reinterpret_cast<const int8_t *>(key_block + mean_at) : 0);
            __syncthreads();
            multiply_keys(s, m, threadIdx.x / 32 * 16, d, has_mean);

            /* the mean's score stands in column 0 of its tile: the first lane of each four */
            const float unit_of_mean = has_mean ? kvq_half_at(key_block) : 0.0f;
            const float of_mean[2] = {
                unit_of_mean * __shfl_sync(0xffffffffu, s[4][0], lane & ~3),
                unit_of_mean * __shfl_sync(0xffffffffu, s[4][2], lane & ~3),
            };
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int t = 8 * i + lane % 4 * 2 + j % 2, row = j / 2;
                    if (from.first + t > sees[row] || t >= from.n_tokens) {
                        s[i][j] = -INFINITY;
                        continue;
                    }
                    s[i][j] += of_mean[row];
                    if (unit.sealed && keys.n_waves) {
                        s[i][j] += kvq_wave_at(
                            cache, keys, m.turned + (my_row + 8 * row) * 2 * KVQ_WAVES, half + t);
                    }
                }
            }
            weigh<TILES>(s, r);
            __syncthreads(); /* keys are done with */
            from.track = &values;
            from.block = value_block;
            from.side = 1;
            unpack_values(cache, from, m.tile, channel, n_channels);
            __syncthreads();
            multiply_values<TILES>(r, s, m.tile, n_channels);
        }
    }

#pragma unroll
    for (int row = 0; row < 2; row++) {
        float sum = r.sum[row];
        const int at = first_row + my_row + 8 * row;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (at >= n_rows) continue;
        float *const out =
            a.partial + (((size_t)split * cache.n_heads + head) * n_rows + at) * (d + 2);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            if (8 * i >= n_channels) break;
            const int c = channel + 8 * i + lane % 4 * 2;
            out[c] = r.o[i][2 * row];
            out[c + 1] = r.o[i][2 * row + 1];
        }
        if (channel == 0 && lane % 4 == 0) {
            out[d] = r.largest[row];
            out[d + 1] = sum;
        }
    }
}

/* Grid: rows of queries / (16 * warps), KV heads, splits * slices. */
#define ATTEND(W)                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * KVQ_CUDA_ATTEND_WARPS(W), 2)                 \
        kvq_cuda_attend_##W(const kvq_cuda_attend_args a) {                                        \
        attend<KVQ_CUDA_ATTEND_WARPS(W), KVQ_CUDA_ATTEND_SLICE(W) / 8>(a);                         \
    }                                                                                              \
    KVQ_EXPORT_KERNEL(kvq_cuda_attend_##W)
ATTEND(64)
ATTEND(128)
ATTEND(256)
