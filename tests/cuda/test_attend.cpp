/* test_attend.cpp: kernels of attention against kv_attend.c with the reference's arithmetic. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <memory>
#include <vector>

#include "attend_case.h"
#include "cusim.h"

namespace {

int passed, failed;

const char *const codec_names[] = {
#define KVQ_CODEC(NAME, MULTIPLE, SUMMARY) #NAME,
#include "kv/codecs.def"
#undef KVQ_CODEC
};

struct Close {
    void operator()(attend_case *c) const { attend_case_close(c); }
};

bool launch(const char *name, dim3 grid, int threads, size_t shared, void *arguments) {
    const cusim::Kernel *kernel = cusim::find_kernel(std::string(name));
    if (!kernel) {
        printf("there is no kernel %s\n", name);
        return false;
    }
    void *parameters[] = {arguments};
    return cusim::launch(*kernel, grid, dim3(threads), shared, parameters);
}

/* The name of the kernel for heads of width d, and its launch. */
bool attend_tiles(const kvq_cuda_attend_args &args, int n_rows) {
    const int d = args.cache.d, widest = d <= 64 ? 64 : d <= 128 ? 128 : 256;
    const int rows = 16 * KVQ_CUDA_ATTEND_WARPS(widest), slice = KVQ_CUDA_ATTEND_SLICE(widest);
    const dim3 grid((n_rows + rows - 1) / rows, args.cache.n_heads,
                    args.n_splits * ((d + slice - 1) / slice));
    char name[32];
    snprintf(name, sizeof name, "kvq_cuda_attend_%d", widest);
    kvq_cuda_attend_args a = args;
    return launch(name, grid, 32 * KVQ_CUDA_ATTEND_WARPS(widest), kvq_cuda_attend_shared(widest, d),
                  &a);
}

/* The kernel of one token; splits are two at least. */
bool decode(const kvq_cuda_attend_args &args, int) {
    const kvq_cuda_track &keys = args.cache.tracks[0],
                         &values = args.cache.tracks[args.cache.n_heads];
    const char *const kinds[] = {"none", "halves", "pairs", "trellis"};
    const kvq_cuda_decode_kind kind =
        kvq_cuda_decode_kind_of((kvq_codec_id)keys.codec, &keys.shape, keys.n_waves,
                                (kvq_codec_id)values.codec, &values.shape);
    const dim3 grid((args.cache.group + 7) / 8, args.cache.n_heads, args.n_splits);
    kvq_cuda_attend_args a = args;
    const std::string name =
        std::string("kvq_cuda_decode_") + kinds[kind] + (args.cache.d <= 64 ? "_64" : "_128");
    return launch(name.c_str(), grid, 32 * KVQ_CUDA_DECODE_WARPS, 0, &a);
}

using Attend = bool (*)(const kvq_cuda_attend_args &args, int n_rows);

void check(const char *what, Attend attend, const attend_options &o, int n_splits,
           double tolerance) {
    const std::unique_ptr<attend_case, Close> c(attend_case_open(&o));
    if (!c) return;
    const int n_rows = o.n * o.group, n_out = n_rows * o.n_heads * o.d_head;
    std::vector<float> partial((size_t)n_splits * o.n_heads * n_rows * (c->cache.d + 2), NAN);
    std::vector<float> out(n_out, NAN);
    kvq_cuda_attend_args args = {c->cache, c->q, partial.data(), n_splits, 0};
    kvq_cuda_merge_args merge = {c->cache, partial.data(), out.data(), n_splits, 0};
    bool good =
        attend(args, n_rows) && launch("kvq_cuda_merge", dim3(n_rows, o.n_heads), 128, 0, &merge);
    double error = 0, size = 0;
    for (int i = 0; i < n_out; i++) {
        const double difference = fabs((double)out[i] - (double)c->expected[i]);
        error = difference <= error ? error : difference; /* NaN stays */
        size = fmax(size, fabs((double)c->expected[i]));
    }
    good = good && error <= tolerance * size;
    for (const std::string &sentence : cusim::take_errors()) {
        printf("%s\n", sentence.c_str());
        good = false;
    }
    good ? passed++ : failed++;
    if (good && !getenv("KVQ_VERBOSE")) return;
    printf("%s %s: keys %s, values %s, d %d, %d x %d heads, sinks %d, window %d, held %d, n %d, "
           "waves %d, group %d, splits %d: error %.2e of %.2e, allowed %.0e\n",
           good ? "passed" : "FAILED", what, codec_names[o.keys], codec_names[o.values], o.d_head,
           o.n_heads, o.group, o.sinks, o.window, o.held, o.n, o.n_waves, o.channel_group, n_splits,
           error, size, tolerance);
}

const kvq_codec_id key_codecs[] = {KVQ_CODEC_f16, KVQ_CODEC_q8_0, KVQ_CODEC_q4_0,  KVQ_CODEC_u1,
                                   KVQ_CODEC_u2,  KVQ_CODEC_u4,   KVQ_CODEC_mixed, KVQ_CODEC_n2,
                                   KVQ_CODEC_n3,  KVQ_CODEC_nf4};
const kvq_codec_id value_codecs[] = {KVQ_CODEC_f16, KVQ_CODEC_q8_0, KVQ_CODEC_q4_0,
                                     KVQ_CODEC_c8,  KVQ_CODEC_t1,   KVQ_CODEC_t2,
                                     KVQ_CODEC_n2,  KVQ_CODEC_n3,   KVQ_CODEC_nf4};

attend_options options(kvq_codec_id keys, kvq_codec_id values) {
    attend_options o = {};
    o.keys = keys;
    o.values = values;
    o.d_head = 64;
    o.n_heads = 2;
    o.group = 3;
    o.sinks = 5;
    o.window = 16;
    o.held = 200;
    o.n = 1;
    o.chunk_blocks = 2;
    return o;
}

/* Halves of unpacked values and weights: 2^-11 each. */
const double tolerance = 1.5e-3;

/* By what the queries are multiplied in: sums of two halves; 16 bits of numbers, as weights are;
   one half, which is 2^-11 for each channel. About three times what was seen. */
double tolerance_of_one_token(kvq_codec_id keys) {
    return keys == KVQ_CODEC_f16 ? 1e-5 : keys == KVQ_CODEC_mixed ? 9e-4 : 2.5e-3;
}

void every_codec_at_every_width() {
    const int widths[] = {64, 80, 96, 128, 256};
    for (int d : widths) {
        for (size_t i = 0; i < sizeof key_codecs / sizeof *key_codecs; i++) {
            attend_options o = options(key_codecs[i], value_codecs[i % 9]);
            o.d_head = d;
            check("codec of keys", attend_tiles, o, 2, tolerance);
        }
        for (size_t i = 0; i < sizeof value_codecs / sizeof *value_codecs; i++) {
            attend_options o = options(KVQ_CODEC_u2, value_codecs[i]);
            o.d_head = d;
            o.n = 2;
            check("codec of values", attend_tiles, o, 2, tolerance);
        }
    }
}

void edges_of_the_context() {
    const int held[] = {0, 1, 3, 31, 32, 33, 63, 64, 65, 84, 85, 86, 149, 700};
    for (int tokens : held) {
        for (int n : {1, 2, 7, 40}) {
            for (int window : {0, 128}) {
                attend_options o = options(KVQ_CODEC_u2, KVQ_CODEC_c8);
                o.held = tokens;
                o.n = n;
                o.window = window;
                o.sinks = tokens % 2 ? 5 : 0;
                check("edge", attend_tiles, o, n == 1 ? 3 : 1, tolerance);
            }
        }
    }
}

void queries_per_kv_head() {
    for (int group = 1; group <= 8; group++) {
        attend_options o = options(KVQ_CODEC_u2, KVQ_CODEC_t2);
        o.group = group;
        o.n = group == 5 ? 30 : 1;
        check("group", attend_tiles, o, 2, tolerance);
    }
}

void waves_come_back() {
    for (int n_waves : {1, 3, 8}) {
        for (int n : {1, 30}) {
            attend_options o = options(n_waves == 3 ? KVQ_CODEC_u2 : KVQ_CODEC_mixed, KVQ_CODEC_t2);
            o.n_waves = n_waves;
            o.n = n;
            check("waves", attend_tiles, o, 2, tolerance);
        }
    }
}

void channels_in_groups() {
    for (int group : {32, 64}) {
        attend_options o = options(KVQ_CODEC_u2, KVQ_CODEC_c8);
        o.d_head = 128;
        o.channel_group = group;
        check("groups of channels", attend_tiles, o, 2, tolerance);
    }
}

void one_token() {
    const struct {
        kvq_codec_id keys, values;
    } pairs[] = {{KVQ_CODEC_u2, KVQ_CODEC_c8},   {KVQ_CODEC_f16, KVQ_CODEC_f16},
                 {KVQ_CODEC_u1, KVQ_CODEC_t1},   {KVQ_CODEC_u2, KVQ_CODEC_t2},
                 {KVQ_CODEC_u4, KVQ_CODEC_t2},   {KVQ_CODEC_mixed, KVQ_CODEC_t2},
                 {KVQ_CODEC_mixed, KVQ_CODEC_t1}};
    for (const auto &pair : pairs) {
        for (int d : {64, 80, 96, 128}) {
            for (int group : {1, 3, 4, 7, 8, 11}) {
                attend_options o = options(pair.keys, pair.values);
                o.d_head = d;
                o.group = group;
                o.held = 700;
                check("one token", decode, o, 2 + group % 3, tolerance_of_one_token(o.keys));
            }
        }
        for (int held : {0, 1, 3, 5, 20, 31, 32, 33, 63, 64, 65, 84, 85, 86, 149, 1600}) {
            for (int window : {0, 16, 128}) {
                attend_options o = options(pair.keys, pair.values);
                o.held = held;
                o.window = window;
                o.sinks = held % 2 ? 5 : 0;
                check("edge of one token", decode, o, held % 3 ? 2 : 5,
                      tolerance_of_one_token(o.keys));
            }
        }
    }
}

void many_splits() {
    attend_options o = options(KVQ_CODEC_u2, KVQ_CODEC_c8);
    o.held = 700;
    check("many splits", attend_tiles, o, KVQ_CUDA_MERGE_THREADS + 2, tolerance);
    check("many splits of one token", decode, o, KVQ_CUDA_MOST_SPLITS,
          tolerance_of_one_token(o.keys));
}

/* Runs of mixed keys that leave widths out, or have one alone; d stands for all channels. */
void mixtures() {
    for (int d : {64, 80, 128}) {
        const int mixtures[][KVQ_RUNS] = {{d, 0, 0, 0},  {0, d, 0, 0},  {0, 0, d, 0},
                                          {0, 0, 0, d},  {0, 0, 0, 0},  {12, 0, 24, 0},
                                          {0, 20, 0, 4}, {4, 0, 0, 12}, {d - 4, 4, 0, 0}};
        for (const int (&runs)[KVQ_RUNS] : mixtures) {
            attend_options o = options(KVQ_CODEC_mixed, KVQ_CODEC_t2);
            o.d_head = d;
            o.runs = runs;
            o.group = 5;
            check("mixture of one token", decode, o, 3, tolerance_of_one_token(o.keys));
            check("mixture", attend_tiles, o, 2, tolerance);
        }
    }
}

void waves_of_one_token() {
    for (int n_waves : {1, 3, 5, 8}) {
        for (int d : {64, 128}) {
            attend_options o = options(KVQ_CODEC_mixed, KVQ_CODEC_t2);
            o.d_head = d;
            o.held = 700;
            o.group = n_waves;
            o.n_waves = n_waves;
            check("waves of one token", decode, o, 3, tolerance_of_one_token(o.keys));
        }
    }
}

void all() {
    one_token();
    many_splits();
    mixtures();
    waves_of_one_token();
    every_codec_at_every_width();
    edges_of_the_context();
    queries_per_kv_head();
    waves_come_back();
    channels_in_groups();
}

} // namespace

/* Argument: the variant. Orders of threads matter to results, which o2 compares; what the checkers
   of the others find does not depend on them. */
int main(int argc, char **argv) {
    const bool all_orders = argc > 1 && strcmp(argv[1], "o2") == 0;
    all();
    if (all_orders) {
        cusim::options.order = cusim::Order::reverse;
        all();
        cusim::options.order = cusim::Order::random;
        for (uint64_t seed : {1, 2}) {
            cusim::options.seed = seed;
            all();
        }
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
