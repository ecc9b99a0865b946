/* bench_kv.c: time of scores, sums and encoding of every KV codec, on one core.
 *
 * Nanoseconds per token and KV head, for 1, 3, 4, 7 and 8 queries that share the head (a group of
 * query heads, or several tokens of a prompt), at heads 64 and 128 wide; the codec f16 is the
 * reading of plain halves, and mixed is shown twice, without and with channels of 8 bits. Blocks
 * lie one after the other over more memory than the caches hold, as in a long context: an argument
 * gives another size in MiB (the default is 64 per codec), and 0 reads one block again and again,
 * which shows the arithmetic alone. Kernels fetch what they read next, as in attention. Weights are
 * small beside what the result will be divided by, as most are beside those of sinks. A codec
 * without a kernel on the instruction set, such as values' codecs for scores, is left out.
 *
 * Time is that of the processor, since others may use it as well. Best of several runs.
 *
 * Build and run: make bench-kv.  KVQ_ISA chooses the instruction set; --json prints JSON.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "isa/isa.h"

enum {
    MOST_QUERIES = 8,
    N_QUERIES = 5,
    N_WIDTHS = 2,
    REPEATS = 256,
    ENCODED = 16,
    SCORES = KVQ_BLOCKS_AT_ONCE * MOST_QUERIES * KVQ_BLOCK,
};

static const int queries[N_QUERIES] = {1, 3, 4, 7, 8}, widths[N_WIDTHS] = {64, 128};

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *allocate(size_t bytes) {
    void *const p = kvq_alloc(bytes);
    if (!p) {
        fprintf(stderr, "bench_kv: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return p;
}

/* Sums of four uniform numbers, near enough to a normal distribution. */
static float noise(uint32_t *state) {
    float sum = -2.0f;
    for (int i = 0; i < 4; i++) {
        *state = *state * 1664525u + 1013904223u;
        sum += (float)(*state >> 8) * (1.0f / 16777216.0f);
    }
    return sum;
}

/* One width of one codec: blocks, and what meets them. */
typedef struct work {
    const kvq_isa *isa;
    kvq_codec_id id;
    kvq_kv_shape shape;
    uint16_t *rows;
    uint8_t *blocks;
    size_t block_bytes, stride; /* stride: to the block that is read next */
    int n_blocks, n;            /* n: queries */
    _Alignas(KVQ_ALIGN) float q[MOST_QUERIES * KVQ_D_MAX], o[MOST_QUERIES * KVQ_D_MAX];
    _Alignas(KVQ_ALIGN) float s[SCORES], p[SCORES];
    int16_t q16[MOST_QUERIES * KVQ_D_MAX];
    float q_unit[MOST_QUERIES], sum[MOST_QUERIES];
} work;

static kvq_blocks blocks_at(const work *w, int first) {
    kvq_blocks blocks = {.n = KVQ_BLOCKS_AT_ONCE};
    for (int b = 0; b < blocks.n; b++) {
        blocks.at[b] = w->blocks + (size_t)(first + b) * w->stride;
        if (first + blocks.n < w->n_blocks) {
            blocks.ahead[b] = blocks.at[b] + (size_t)blocks.n * w->stride;
        }
    }
    return blocks;
}

static void run_score(work *w) {
    const kvq_query query = {w->q, w->q16, w->q_unit, w->n};
    for (int b = 0; b < w->n_blocks; b += KVQ_BLOCKS_AT_ONCE) {
        const kvq_blocks blocks = blocks_at(w, b);
        w->isa->score[w->id](w->s, &query, &blocks, &w->shape);
    }
}

static void run_accum(work *w) {
    const kvq_weights weights = {.p = w->p, .sum = w->sum, .n = w->n};
    for (int b = 0; b < w->n_blocks; b += KVQ_BLOCKS_AT_ONCE) {
        const kvq_blocks blocks = blocks_at(w, b);
        w->isa->accum[w->id](w->o, &weights, &blocks, &w->shape);
    }
}

static void run_encode(work *w) {
    for (int b = 0; b < ENCODED; b++) kvq_codecs[w->id].encode(w->blocks, w->rows, &w->shape);
}

/* ns per token: the best of several runs, for the machine may be shared. */
static double time_of(void (*run)(work *w), work *w, int n_blocks) {
    double best = 1e30, spent = 0;
    for (int i = 0; i < 4 || (spent < 0.2 && i < 1000); i++) {
        const double start = seconds();
        run(w);
        const double taken = seconds() - start;
        if (taken < best) best = taken;
        spent += taken;
    }
    return best * 1e9 / ((double)n_blocks * KVQ_BLOCK);
}

/* wide: mixed has as many channels of 8 bits as of 4, 2 and 1, else none of 8 and 2 bits on
 * average.
 */
static void open_work(work *w, const kvq_isa *isa, kvq_codec_id id, bool wide, int d,
                      size_t bytes) {
    uint32_t state = 1;
    const int run[KVQ_RUNS] = {wide ? d / 4 : 0, d / 4, d / 4, wide ? d / 4 : d / 2};
    *w = (work){.isa = isa, .id = id, .shape = kvq_plain_shape(d)};
    memcpy(w->shape.run, run, sizeof run);
    w->block_bytes = kvq_codecs[id].bytes(&w->shape);
    w->stride = bytes ? w->block_bytes : 0;
    w->n_blocks = bytes ? (int)(bytes / w->block_bytes) : REPEATS;
    w->n_blocks -= w->n_blocks % KVQ_BLOCKS_AT_ONCE;
    w->rows = allocate(KVQ_BLOCK * (size_t)d * sizeof *w->rows);
    w->blocks = allocate(bytes ? bytes : w->block_bytes);
    for (int i = 0; i < KVQ_BLOCK * d; i++) w->rows[i] = kvq_f32_to_f16(noise(&state));
    for (int i = 0; i < MOST_QUERIES * d; i++) w->q[i] = noise(&state);
    kvq_query_round(w->q16, w->q_unit, w->q, MOST_QUERIES, d);
    for (int i = 0; i < SCORES; i++) w->p[i] = 0.01f * fabsf(noise(&state));
    for (int i = 0; i < MOST_QUERIES; i++) w->sum[i] = 1;
    kvq_codecs[id].encode(w->blocks, w->rows, &w->shape);
    for (int b = 1; b < w->n_blocks && w->stride; b++) {
        memcpy(w->blocks + (size_t)b * w->stride, w->blocks, w->block_bytes);
    }
}

/* A cell per number of queries, in ns; empty where there is no kernel. */
static void print_times(work *w, void (*run)(work *w), bool there, bool json, const char *name) {
    if (json) printf(",\"%s\":", name);
    if (json && !there) printf("null");
    for (int i = 0; i < N_QUERIES; i++) {
        w->n = queries[i];
        if (json && there)
            printf("%c%.3f", i ? ',' : '[', time_of(run, w, w->n_blocks));
        else if (there)
            printf("%7.2f", time_of(run, w, w->n_blocks));
        else if (!json)
            printf("%7s", "");
    }
    if (json && there) printf("]");
    if (!json) printf(" |");
}

static void print_head(const kvq_isa *isa, size_t mebibytes, bool json) {
    if (json) {
        printf("{\"isa\":\"%s\",\"mebibytes\":%zu,\"queries\":[", isa->name, mebibytes);
        for (int i = 0; i < N_QUERIES; i++) printf("%s%d", i ? "," : "", queries[i]);
        printf("],\"codecs\":[");
        return;
    }
    printf("isa %s, %zu MiB per codec, ns per token and KV head\n", isa->name, mebibytes);
    printf("%-6s %4s %6s |%-35s |%-35s |%7s\n%-6s %4s %6s |", "", "", "bits",
           " score, queries:", " accum, queries:", "encode", "", "d", "");
    for (int side = 0; side < 2; side++) {
        for (int i = 0; i < N_QUERIES; i++) printf("%7d", queries[i]);
        printf(" |");
    }
    printf("\n");
}

int main(int argc, char **argv) {
    const bool json = argc > 1 && strcmp(argv[argc - 1], "--json") == 0;
    const char *const size = argc - json > 1 ? argv[1] : "64";
    char *end;
    const unsigned long mebibytes = strtoul(size, &end, 10);
    const kvq_isa *isa;
    if (*end || end == size || mebibytes > 4096 || argc - json > 2) {
        fprintf(stderr, "bench_kv: the arguments are not [MiB] [--json], with 0 to 4096 MiB\n");
        return 1;
    }
    if (kvq_isa_choose(&isa) != KVQ_OK) {
        fprintf(stderr, "bench_kv: %s\n", kvq_error());
        return 1;
    }
    print_head(isa, mebibytes, json);
    for (int width = 0, printed = 0; width < N_WIDTHS; width++) {
        for (int row = 0; row <= KVQ_CODECS; row++) {
            static work w;
            const bool wide = row == KVQ_CODECS;
            const kvq_codec_id id = wide ? KVQ_CODEC_mixed : (kvq_codec_id)row;
            const bool score = isa->score[id] != NULL, accum = isa->accum[id] != NULL;
            const int d = widths[width];
            if (!score && !accum) continue;
            open_work(&w, isa, id, wide, d, mebibytes << 20);
            const double bits = 8.0 * (double)w.block_bytes / (KVQ_BLOCK * d);
            if (json) {
                printf("%s\n{\"codec\":\"%s\",\"d\":%d,\"bits\":%.4f", printed++ ? "," : "",
                       kvq_codecs[id].name, d, bits);
            } else {
                printf("%-6s %4d %6.2f |", kvq_codecs[id].name, d, bits);
            }
            print_times(&w, run_score, score, json, "score");
            print_times(&w, run_accum, accum, json, "accum");
            const double encode = time_of(run_encode, &w, ENCODED);
            printf(json ? ",\"encode\":%.2f}" : "%7.1f\n", encode);
            fflush(stdout);
            kvq_free(w.rows);
            kvq_free(w.blocks);
        }
    }
    if (json) printf("\n]}\n");
    return 0;
}
