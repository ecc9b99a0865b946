/* test_cache.cpp: the kernels of cache.cu on the simulator against the C core, byte by byte; and
 * what merge.cu has of bases.
 *
 * usage: test_cache [variant]      fewer orders of threads where it is not o2, which has no
 * checkers
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "cusim.h"

#define _Static_assert static_assert /* C11's, in headers of the core */
extern "C" {
#include "cuda/cuda_layout.h"
#include "cuda/kernels/attend_args.h"
#include "cuda/kernels/prepare_args.h"
#include "isa/isa.h"
#include "kv/kv_ring.h"

void kvq_cuda_prepare(const kvq_cuda_prepare_args a);
void kvq_cuda_merge(const kvq_cuda_merge_args a);
void kvq_cuda_seal(const kvq_cuda_seal_args a);
void kvq_cuda_append(const kvq_cuda_append_args a);
}

namespace {

bool quick = false;
int n_passed = 0, n_failed = 0;

void check(bool right, const std::string &claim) {
    if (right) {
        n_passed++;
        return;
    }
    n_failed++;
    fprintf(stderr, "FAILED: %s\n", claim.c_str());
}

/* "text", with numbers. */
template <class... A> std::string text(const char *format, A... a) {
    char line[512];
    snprintf(line, sizeof line, format, a...);
    return line;
}

// ---- orders of threads --------------------------------------------------------------------------

struct Order {
    const char *name;
    cusim::Order order;
    uint64_t seed;
};

std::vector<Order> orders() {
    std::vector<Order> all = {{"forward", cusim::Order::forward, 1},
                              {"reverse", cusim::Order::reverse, 1},
                              {"random 1", cusim::Order::random, 1},
                              {"random 2", cusim::Order::random, 2}};
    if (quick) all = {all[1], all[2]};
    return all;
}

template <class F> void in_each_order(F run) {
    for (const Order &order : orders()) {
        cusim::options.order = order.order;
        cusim::options.seed = order.seed;
        run(order.name);
    }
}

template <class Args>
bool launch(void (*kernel)(const Args), dim3 grid, size_t shared, const Args &args) {
    return cusim::launch(kernel, grid, dim3(KVQ_CUDA_CACHE_THREADS), shared, args);
}

// ---- numbers ------------------------------------------------------------------------------------

struct Random {
    uint64_t state;

    explicit Random(uint64_t seed) : state(seed * 2 + 1) {}
    uint32_t bits() { /* xorshift64* */
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return (uint32_t)((state * 2685821657736338717u) >> 32);
    }
    float uniform() { return (float)(bits() >> 8) / 8388608.0f - 1.0f; } /* [-1, 1) */
    float normal() {
        float sum = 0;
        for (int i = 0; i < 12; i++) sum += uniform();
        return 0.5f * sum;
    }
};

enum Kind {
    NORMAL,
    HEAVY,
    CONSTANT,
    ZEROS,
    SUBNORMAL,
    LARGE,
    NEAR_LIMIT,
    SPARSE,
    OUTLIERS,
    ANY_HALF,
    KINDS
};
const char *const kind_name[KINDS] = {"normal",    "heavy-tailed", "constant", "zero",
                                      "subnormal", "large",        "largest",  "sparse",
                                      "outlying",  "any finite"};

/* Token t, channel c; offset is the channel's. */
uint16_t value_of(Kind kind, Random &random, float offset, int t, int c) {
    const float x = random.normal();
    switch (kind) {
    case NORMAL:
        return kvq_f32_to_f16(2.0f * offset + x);
    case HEAVY:
        return kvq_f32_to_f16(x * x * x * x * x);
    case CONSTANT:
        return kvq_f32_to_f16(1.25f);
    case ZEROS:
        return c % 2 ? 0x8000 : 0;
    case SUBNORMAL:
        return (uint16_t)(random.bits() & 0x83ffu);
    case LARGE:
        return kvq_f32_to_f16(65504.0f * random.uniform());
    case NEAR_LIMIT: /* of a size that some scales would take beyond the largest half */
        return kvq_f32_to_f16((c % 10 ? 0.83f : 1.0f) * (x < 0 ? -65504.0f : 65504.0f));
    case OUTLIERS:
        return kvq_f32_to_f16((c == 3 || t == 9 ? 500.0f : 0.5f) * x);
    case SPARSE: /* most tokens and channels have nothing */
        return t % 7 == 3 || c % 11 == 5 ? kvq_f32_to_f16(x) : 0;
    default: { /* of any exponent */
        const uint16_t bits = (uint16_t)random.bits();
        return (bits & 0x7c00) == 0x7c00 ? (uint16_t)(bits & 0xbfff) : bits;
    }
    }
}

// ---- a layer's cache ----------------------------------------------------------------------------

/* One side of one head; the same bytes on the host. */
kvq_track make_track(kvq_codec_id codec, const kvq_kv_shape &shape) {
    kvq_track track = {};
    track.codec = codec;
    track.shape = shape;
    track.block_bytes = kvq_codecs[codec].bytes(&shape);
    return track;
}

/* Memory of the device: exactly as many bytes as asked for, so that an overrun is one; 16 of them
 * aligned, and filled with what is neither zero nor a number. */
class Memory {
  public:
    template <class T> T *take(size_t n) {
        void *p = nullptr;
        if (posix_memalign(&p, 16, n * sizeof(T) + (n == 0)) != 0) abort();
        memset(p, 0xff, n * sizeof(T));
        parts.emplace_back(p);
        return static_cast<T *>(p);
    }

  private:
    struct Free {
        void operator()(void *p) const { free(p); }
    };
    std::vector<std::unique_ptr<void, Free>> parts;
};

/* A layer as the kernels see it. */
struct Layer {
    Memory memory;
    std::vector<kvq_cuda_track> tracks; /* [2][n_heads] */
    kvq_cuda_step step = {};
    kvq_cuda_cache cache = {};
    std::vector<uint8_t *> chunks;
    size_t bytes_per_block;

    /* all: [2][n_heads]. Chunks have room for n_blocks blocks; another layer has blocks before. */
    Layer(const std::vector<kvq_track> &all, int group, int d_head, int n_sinks, int recent_rows,
          int n_batch, int n_blocks, int chunk_blocks) {
        const int n_heads = (int)all.size() / 2, d = all[0].shape.d;
        std::vector<kvq_track> placed = {make_track(KVQ_CODEC_u1, kvq_plain_shape(32))};
        placed.insert(placed.end(), all.begin(), all.end());
        tracks.resize(placed.size());
        bytes_per_block = kvq_cuda_place_tracks(tracks.data(), placed.data(), placed.size());
        tracks.erase(tracks.begin());
        for (int chunk = 0; chunk * chunk_blocks < n_blocks; chunk++) {
            chunks.push_back(memory.take<uint8_t>((size_t)chunk_blocks * bytes_per_block));
        }
        cache.step = &step;
        cache.tracks = tracks.data();
        cache.chunks = chunks.data();
        for (int side = 0; side < 2; side++) {
            const size_t heads = (size_t)n_heads * (size_t)d;
            cache.sinks[side] = memory.take<uint16_t>(heads * (size_t)n_sinks);
            cache.recent[side] = memory.take<uint16_t>(heads * (size_t)recent_rows);
            cache.new_rows[side] = memory.take<uint16_t>(heads * (size_t)n_batch);
        }
        cache.chunk_blocks = chunk_blocks;
        cache.n_heads = n_heads;
        cache.group = group;
        cache.d_head = d_head;
        cache.d = d;
        cache.n_sinks = n_sinks;
        cache.recent_rows = recent_rows;
        cache.n_batch = n_batch;
    }

    const kvq_cuda_track &track(int head, int side) const {
        return tracks[(size_t)(side * cache.n_heads + head)];
    }

    bool seal(int most) const {
        const kvq_cuda_seal_args args = {cache};
        return launch(kvq_cuda_seal, dim3((unsigned)(2 * cache.n_heads), (unsigned)most),
                      kvq_cuda_seal_shared(cache.d), args);
    }

    bool append() const {
        const kvq_cuda_append_args args = {cache};
        const unsigned tiles =
            (unsigned)(cache.n_batch + KVQ_CUDA_APPEND_ROWS - 1) / KVQ_CUDA_APPEND_ROWS;
        return launch(kvq_cuda_append, dim3((unsigned)(2 * cache.n_heads), tiles), 0, args);
    }
};

/* The first byte in which two differ, or -1. */
long difference(const void *a, const void *b, size_t n) {
    const auto *const x = static_cast<const uint8_t *>(a), *const y =
                                                               static_cast<const uint8_t *>(b);
    for (size_t i = 0; i < n; i++) {
        if (x[i] != y[i]) return (long)i;
    }
    return -1;
}

// ---- encoders -----------------------------------------------------------------------------------

struct Case {
    kvq_track track;
    std::string name;
};

void add_case(std::vector<Case> &cases, kvq_codec_id codec, int d, int group,
              std::vector<int> runs) {
    if (d % kvq_codecs[codec].d_multiple || (group && d % group)) return;
    kvq_kv_shape shape = kvq_plain_shape(d);
    std::string name = kvq_codecs[codec].name;
    if (group) {
        shape.group = group;
        name += text(" in groups of %d", group);
    }
    if (!runs.empty()) {
        for (int i = 0; i < KVQ_RUNS; i++) shape.run[i] = runs[(size_t)i];
        name += text(" of runs %d, %d, %d, %d", runs[0], runs[1], runs[2], runs[3]);
    }
    cases.push_back({make_track(codec, shape), name});
}

std::vector<Case> cases_of(int d) {
    std::vector<Case> cases;
    for (int id = 0; id < KVQ_CODECS; id++) {
        if (id != KVQ_CODEC_mixed) add_case(cases, (kvq_codec_id)id, d, 0, {});
    }
    for (const int group : {32, 64, 128}) {
        for (const kvq_codec_id id : {KVQ_CODEC_u1, KVQ_CODEC_u2, KVQ_CODEC_u4, KVQ_CODEC_c8}) {
            if (group < d) add_case(cases, id, d, group, {});
        }
    }
    const std::vector<int> runs[] = {
        {d / 8 / 4 * 4, d / 4 / 4 * 4, d / 4 / 8 * 8, d / 4 / 16 * 16},
        {d, 0, 0, 0},
        {0, d, 0, 0},
        {0, 0, d, 0},
        {0, 0, 0, d},
        {4, 4, 8, 16},
        {8, 12, 16, d - 36}, /* the last unit is part empty */
        {0, 4, d - 4, 0},
        {12, 0, 0, 0},
        {0, 0, 0, 0},
    };
    for (const std::vector<int> &run : runs) add_case(cases, KVQ_CODEC_mixed, d, 0, run);
    return cases;
}

/* Every codec on two kinds of numbers at once, as keys and as values; a head for each codec. A
 * block is sealed whose first rows are recent ones and whose last ones are new. */
void encoders_write_the_bytes_of_the_core(int d, Kind of_keys, Kind of_values) {
    const Kind kinds[2] = {of_keys, of_values};
    const std::vector<Case> cases = cases_of(d);
    const int n_heads = (int)cases.size(), n_sinks = 5, recent_rows = 128, n_batch = 40, held = 96;
    const int b = 1; /* rows 64 .. 127, of which those from 91 on are new */
    std::vector<kvq_track> tracks;
    for (int side = 0; side < 2; side++) {
        for (const Case &c : cases) tracks.push_back(c.track);
    }
    std::vector<std::vector<uint8_t>> expected;
    Layer layer(tracks, 1, d, n_sinks, recent_rows, n_batch, 2, 1);
    layer.step = {n_batch, held, b, 1};
    for (int side = 0; side < 2; side++) {
        for (int head = 0; head < n_heads; head++) {
            Random random((uint64_t)(d * 100 + kinds[side]));
            std::vector<uint16_t> rows;
            std::vector<float> offset;
            for (int c = 0; c < d; c++) offset.push_back(random.normal());
            for (int t = 0; t < KVQ_BLOCK; t++) {
                for (int c = 0; c < d; c++) {
                    rows.push_back(value_of(kinds[side], random, offset[(size_t)c], t, c));
                }
            }
            for (int t = 0; t < KVQ_BLOCK; t++) {
                memcpy(const_cast<uint16_t *>(
                           kvq_cuda_row(layer.cache, head, side, b * KVQ_BLOCK + t, held)),
                       &rows[(size_t)(t * d)], (size_t)d * 2);
            }
            const kvq_track &track = cases[(size_t)head].track;
            expected.emplace_back(kvq_codecs[track.codec].bytes(&track.shape));
            kvq_codecs[track.codec].encode(expected.back().data(), rows.data(), &track.shape);
        }
    }
    in_each_order([&](const char *order) {
        for (uint8_t *p : layer.chunks) memset(p, 0xa5, layer.bytes_per_block);
        check(layer.seal(2), text("d %d: seal runs without errors, %s order", d, order));
        for (size_t i = 0; i < tracks.size(); i++) {
            const int side = (int)i / n_heads, head = (int)i % n_heads;
            const uint8_t *const block = kvq_cuda_block(layer.cache, layer.track(head, side), b);
            const std::vector<uint8_t> &right = expected[i];
            const long at = difference(block, right.data(), right.size());
            const long where = at < 0 ? 0 : at;
            check(at < 0, text("%s of width %d, %s numbers, %s order: byte %ld of %zu is %d, "
                               "expected %d",
                               cases[(size_t)head].name.c_str(), d, kind_name[kinds[side]], order,
                               at, right.size(), block[where], right[(size_t)where]));
            const kvq_cuda_track &track = layer.track(head, side);
            bool untouched = true; /* between blocks */
            for (size_t k = right.size(); k < track.stride - track.lead; k++) {
                untouched = untouched && block[k] == 0xa5;
            }
            check(untouched, text("%s of width %d: nothing is written behind the block",
                                  cases[(size_t)head].name.c_str(), d));
        }
    });
}

// ---- the ring -----------------------------------------------------------------------------------

/* The ring of the core, with memory. */
struct Ring {
    kvq_ring ring = {};
    std::vector<kvq_track> tracks;
    std::vector<float> within, first;
    kvq_turns turns = {};
    void *memory = nullptr;

    Ring(const std::vector<kvq_track> &all, int d_head, int sinks, int window, int n_ctx,
         int n_pairs)
        : tracks(all) {
        const int n_heads = (int)all.size() / 2;
        for (size_t i = 0; i < tracks.size(); i++) {
            if (i % (size_t)n_heads) {
                tracks[i].bytes_before = tracks[i - 1].bytes_before + tracks[i - 1].block_bytes;
            }
        }
        const int blocks = n_ctx / KVQ_BLOCK;
        for (int pair = 0; pair < n_pairs; pair++) {
            const float turn = powf(0.1f, (float)pair);
            for (int t = 0; t < KVQ_BLOCK; t++) within.push_back(cosf(turn * (float)t));
            for (int t = 0; t < KVQ_BLOCK; t++) within.push_back(sinf(turn * (float)t));
        }
        for (int b = 0; b < blocks; b++) {
            for (int pair = 0; pair < n_pairs; pair++) {
                const float angle = powf(0.1f, (float)pair) * (float)(sinks + KVQ_BLOCK * b);
                first.push_back(cosf(angle));
                first.push_back(sinf(angle));
            }
        }
        turns = {n_pairs, within.data(), first.data()};
        kvq_arena arena = {};
        kvq_ring_bytes bytes = {};
        for (int pass = 0; pass < 2; pass++) {
            kvq_ring_lay_out(&ring, &arena, &bytes, tracks.data(), &turns, n_heads, d_head, sinks,
                             window, n_ctx);
            if (pass == 0) arena = {static_cast<uint8_t *>(memory = kvq_alloc(arena.used)), 0};
        }
    }
    Ring(const Ring &) = delete;
    Ring &operator=(const Ring &) = delete;
    ~Ring() { kvq_free(memory); }
};

/* Passes of many sizes into both rings; after each, all that they hold is compared. */
void the_ring_is_that_of_the_core(int d_head, int sinks, int window, const char *order) {
    const int d = (int)kvq_round_up((size_t)d_head, KVQ_D_UNIT), n_heads = 3, n_pairs = 4;
    const int n_ctx = 1400, n_batch = 330;
    const uint16_t pairs[] = {0, 2, 3};
    Random random(7);
    std::vector<float> u, w;
    for (int i = 0; i < 3 * d; i++) {
        u.push_back(random.normal());
        w.push_back(random.normal());
    }
    const int runs[KVQ_RUNS] = {8, 16, 16, 16};
    std::vector<kvq_track> tracks;
    for (const kvq_codec_id id :
         {KVQ_CODEC_u2, KVQ_CODEC_mixed, KVQ_CODEC_u4, KVQ_CODEC_c8, KVQ_CODEC_t2, KVQ_CODEC_f16}) {
        kvq_kv_shape shape = kvq_plain_shape(d);
        if (id == KVQ_CODEC_mixed) memcpy(shape.run, runs, sizeof runs);
        tracks.push_back(make_track(id, shape));
    }
    tracks[0].wave = {3, pairs, u.data(), w.data()};
    tracks[1].wave = {1, pairs + 1, w.data(), u.data()};
    Ring c(tracks, d_head, sinks, window, n_ctx, n_pairs);
    kvq_ring &ring = c.ring;
    Layer layer(tracks, 1, d_head, sinks, ring.recent_rows, n_batch, ring.max_blocks, 3);
    layer.cache.turns_within = c.turns.within;
    layer.cache.turns_first = c.turns.first;
    layer.cache.n_pairs = n_pairs;
    const std::string where =
        text("d %d, %d sinks, window %d, %s order", d_head, sinks, window, order);
    for (const int n : {3, 1, 200, 70, 330, 1, 64, 63, 1, 128, 300}) {
        for (int side = 0; side < 2; side++) {
            for (int head = 0; head < n_heads; head++) {
                uint16_t *const rows = layer.cache.new_rows[side] + (size_t)(head * n_batch * d);
                for (int i = 0; i < n * d; i++) {
                    rows[i] = i % d < d_head ? kvq_f32_to_f16(random.normal()) : 0;
                }
            }
        }
        layer.step = {n, ring.n, ring.n_sealed, 0};
        for (int side = 0; side < 2; side++) {
            for (int head = 0; head < n_heads; head++) {
                kvq_ring_append(&ring, head, side,
                                layer.cache.new_rows[side] + (size_t)(head * n_batch * d), n);
            }
        }
        kvq_ring_advance(&ring, n);
        layer.step.seals = ring.n_sealed - layer.step.sealed;
        check(layer.seal(n_batch / KVQ_BLOCK + 1), where + ": seal runs without errors");
        check(layer.append(), where + ": append runs without errors");
        for (int side = 0; side < 2; side++) {
            for (int head = 0; head < n_heads; head++) {
                const kvq_track &track = ring.track[side][head];
                for (int b = 0; b < ring.n_sealed; b++) {
                    const long at =
                        difference(kvq_cuda_block(layer.cache, layer.track(head, side), b),
                                   kvq_ring_block(&ring, head, side, b), track.block_bytes);
                    check(at < 0, where + text(": %d tokens held, side %d, head %d, block %d "
                                               "differs at byte %ld",
                                               ring.n, side, head, b, at));
                }
                for (int token = 0; token < ring.n; token++) {
                    const int i = token - sinks;
                    if (i >= 0 && i < ring.n_sealed * KVQ_BLOCK) continue;
                    const size_t recent = (size_t)head * (size_t)ring.recent_rows +
                                          (size_t)((i < 0 ? 0 : i) % ring.recent_rows);
                    const uint16_t *const row =
                        i < 0 ? layer.cache.sinks[side] + (size_t)((head * sinks + token) * d)
                              : layer.cache.recent[side] + recent * (size_t)d;
                    const uint16_t *const right = i < 0 ? kvq_ring_sink(&ring, head, side, token)
                                                        : kvq_ring_recent(&ring, head, side, i);
                    check(difference(row, right, (size_t)d * 2) < 0,
                          where +
                              text(": %d tokens held, side %d, head %d, row of token %d differs",
                                   ring.n, side, head, token));
                }
            }
        }
    }
    check(ring.n_sealed > 6, where + ": enough blocks were sealed");
}

// ---- bases --------------------------------------------------------------------------------------

/* One basis of each kind, of width d. */
struct Bases {
    std::vector<uint16_t> order;
    std::vector<float> store, query, restore, mean;
    std::vector<kvq_basis> all;

    explicit Bases(int d) {
        Random random(11);
        for (int c = 0; c < d; c++) {
            order.push_back((uint16_t)c);
            mean.push_back(random.normal());
        }
        for (size_t c = order.size() - 1; c > 0; c--) {
            std::swap(order[c], order[random.bits() % (c + 1)]);
        }
        for (int i = 0; i < d * d; i++) {
            store.push_back(random.normal());
            query.push_back(random.normal());
            restore.push_back(random.normal());
        }
        all = {{KVQ_BASIS_identity, nullptr, nullptr, nullptr, nullptr, nullptr},
               {KVQ_BASIS_hadamard, nullptr, nullptr, nullptr, nullptr, nullptr},
               {KVQ_BASIS_permuted, order.data(), nullptr, nullptr, nullptr, nullptr},
               {KVQ_BASIS_calibrated, nullptr, store.data(), query.data(), restore.data(),
                mean.data()}};
    }
};

std::vector<float> normals(size_t n, uint64_t seed) {
    Random random(seed);
    std::vector<float> x(n);
    for (float &v : x) v = 3.0f * random.normal();
    return x;
}

/* A KV head for each basis; keys have another one than values. */
void bases_are_those_of_the_core(int d_head, int group, int n, int n_batch) {
    const int d = (int)kvq_round_up((size_t)d_head, KVQ_D_UNIT);
    const Bases bases(d);
    const int n_heads = (int)bases.all.size(), queries = n_heads * group;
    std::vector<kvq_track> tracks;
    for (int side = 0; side < 2; side++) {
        for (int head = 0; head < n_heads; head++) {
            kvq_track track = make_track(KVQ_CODEC_f16, kvq_plain_shape(d));
            track.basis = bases.all[(size_t)((head + side) % n_heads)];
            tracks.push_back(track);
        }
    }
    Layer layer(tracks, group, d_head, 0, KVQ_BLOCK, n_batch, 0, 1);
    layer.step = {n, 17, 0, 0};
    const std::vector<float> q = normals((size_t)(n * queries * d_head), 1);
    const std::vector<float> kv[2] = {normals((size_t)(n * n_heads * d_head), 2),
                                      normals((size_t)(n * n_heads * d_head), 3)};
    std::vector<float> partial; /* of one split: numbers, largest score, sum of weights */
    const std::vector<float> o = normals((size_t)(n * queries * d), 4);
    for (size_t i = 0; i < o.size(); i += (size_t)d) {
        partial.insert(partial.end(), &o[i], &o[i] + d);
        partial.insert(partial.end(), {0.5f, 1.0f});
    }
    float *const prepared = layer.memory.take<float>((size_t)(n_batch * queries * d));
    float *const out = layer.memory.take<float>((size_t)(n * queries * d_head));
    const dim3 grid((unsigned)((n_batch * group + KVQ_CUDA_VECTORS - 1) / KVQ_CUDA_VECTORS),
                    (unsigned)n_heads, 3);
    const float over_root = 1.0f / sqrtf((float)d_head);
    std::vector<float> x((size_t)d);
    const auto load = [&](const float *from, float factor) {
        for (int c = 0; c < d; c++) x[(size_t)c] = c < d_head ? from[c] * factor : 0.0f;
    };
    in_each_order([&](const char *order) {
        const std::string where =
            text("width %d, group %d, %d tokens, %s order", d_head, group, n, order);
        memset(prepared, 0xff, (size_t)(n_batch * queries * d) * sizeof *prepared);
        memset(out, 0xff, (size_t)(n * queries * d_head) * sizeof *out);
        for (uint16_t *rows : layer.cache.new_rows) {
            memset(rows, 0xff, (size_t)(n_heads * n_batch * d) * sizeof *rows);
        }
        const kvq_cuda_prepare_args prepare = {layer.cache, q.data(), kv[0].data(), kv[1].data(),
                                               prepared};
        check(launch(kvq_cuda_prepare, grid, kvq_cuda_basis_shared(d), prepare),
              where + ": prepare runs without errors");
        const kvq_cuda_merge_args merge = {layer.cache, partial.data(), out, 1, 0};
        check(launch(kvq_cuda_merge, dim3((unsigned)(n * group), (unsigned)n_heads), 0, merge),
              where + ": merge runs without errors");
        for (int t = 0; t < n; t++) {
            for (int h = 0; h < queries; h++) {
                const int head = h / group;
                const char *const kind = kvq_basis_name(tracks[(size_t)head].basis.kind);
                load(&q[(size_t)((t * queries + h) * d_head)], over_root);
                kvq_basis_query(&tracks[(size_t)head].basis, &kvq_isa_ref, x.data(), 1, d);
                const float *const y =
                    prepared + (size_t)(((head * n_batch + t) * group + h % group) * d);
                check(difference(y, x.data(), (size_t)d * 4) < 0,
                      where + text(": query head %d of token %d, basis %s", h, t, kind));
                const kvq_basis &basis = tracks[(size_t)(n_heads + head)].basis;
                const int row = (head * n + t) * group + h % group;
                memcpy(x.data(), &o[(size_t)(row * d)], (size_t)d * 4);
                kvq_basis_restore(&basis, &kvq_isa_ref, x.data(), 1, d);
                check(difference(out + (size_t)((t * queries + h) * d_head), x.data(),
                                 (size_t)d_head * 4) < 0,
                      where + text(": output head %d of token %d, basis %s", h, t,
                                   kvq_basis_name(basis.kind)));
            }
            for (int i = 0; i < 2 * n_heads; i++) {
                const int side = i / n_heads, head = i % n_heads;
                const kvq_basis &basis = tracks[(size_t)i].basis;
                std::vector<uint16_t> right;
                load(&kv[side][(size_t)((t * n_heads + head) * d_head)], 1.0f);
                kvq_basis_store(&basis, &kvq_isa_ref, x.data(), 1, d);
                for (const float v : x) right.push_back(kvq_f32_to_f16(v));
                const uint16_t *const row =
                    layer.cache.new_rows[side] + (size_t)((head * n_batch + t) * d);
                check(difference(row, right.data(), right.size() * 2) < 0,
                      where + text(": side %d, head %d, token %d, basis %s", side, head, t,
                                   kvq_basis_name(basis.kind)));
            }
        }
        const uint32_t next = n < n_batch ? layer.cache.new_rows[0][n * d] : 0xffff;
        check(next == 0xffff, where + ": rows behind the pass stay as they were");
    });
}

} // namespace

int main(int argc, char **argv) {
    quick = argc > 1 && strcmp(argv[1], "o2") != 0;
    const size_t fixed = KVQ_CUDA_CACHE_THREADS / 32 * sizeof(float); /* static shared memory */
    check(kvq_cuda_seal_shared(256) + fixed <= cusim::default_shared_limit &&
              kvq_cuda_basis_shared(256) <= cusim::default_shared_limit,
          "heads of width 256 need no more shared memory than a GPU gives without asking");
    for (const int d : {64, 80, 96, 128, 256}) {
        for (int kind = 0; kind < KINDS; kind += 2) {
            encoders_write_the_bytes_of_the_core(d, (Kind)kind, (Kind)(kind + 1));
        }
    }
    /* More shared memory than a GPU gives without asking. */
    encoders_write_the_bytes_of_the_core(512, NORMAL, LARGE);
    in_each_order([](const char *order) {
        the_ring_is_that_of_the_core(64, 5, 128, order);
        the_ring_is_that_of_the_core(72, 0, 64, order);
    });
    for (const int d_head : {64, 72, 80, 96, 128, 256}) {
        bases_are_those_of_the_core(d_head, 1, 1, 4);
        bases_are_those_of_the_core(d_head, 4, 3, 3);
    }
    bases_are_those_of_the_core(64, 7, 17, 32);
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed != 0;
}
