/* bench_weights.c: speed of the products of every weight format, on one core.
 *
 *   1 token:          nanoseconds per row of 4096 columns and weight bytes per second, over a
 *                     matrix larger than the caches (512 MiB; an argument gives another number of
 *                     MiB)
 *   16, 512 tokens:   10^9 operations (2 per weight and token) per second, for shapes of small
 *                     models
 *
 * Time is that of the processor, since others may use it as well.
 *
 * Build and run: make bench-weights.  KVQ_ISA chooses the instruction set.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "isa/isa.h"

#define DECODE_COLUMNS 4096

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *allocate(size_t bytes) {
    void *const p = kvq_alloc(bytes);
    if (!p) {
        fprintf(stderr, "bench_weights: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return p;
}

/* Bytes below 0x30 make finite numbers in every format. */
static void fill(uint8_t *w, size_t bytes) {
    uint32_t state = 1;
    for (size_t i = 0; i < bytes; i++) {
        state = state * 1664525u + 1013904223u;
        w[i] = (uint8_t)((state >> 24) % 0x30);
    }
}

static kvq_activations activations(const kvq_isa *isa, size_t n_tok, size_t n_cols) {
    float *const x = allocate(n_tok * n_cols * sizeof *x);
    for (size_t i = 0; i < n_tok * n_cols; i++) x[i] = (float)(i * 7919 % 2001) * 1e-3f - 1.0f;
    kvq_activations a = {.x = x, .n_tok = n_tok, .n_cols = n_cols};
    a.q = allocate(n_tok * n_cols * sizeof *a.q);
    a.scale = allocate(n_tok * kvq_activation_runs(n_cols) * sizeof *a.scale);
    a.sums = allocate(n_tok * n_cols / 32 * sizeof *a.sums);
    if (isa->quantize) isa->quantize(&a, 0, n_tok);
    return a;
}

static void release(kvq_activations *a) {
    kvq_free((void *)a->x);
    kvq_free(a->q);
    kvq_free(a->scale);
    kvq_free(a->sums);
}

/* The best of several runs: the machine may be shared. */
static double time_product(const kvq_isa *isa, kvq_weight_kind kind, float *y, const uint8_t *w,
                           size_t n_rows, const kvq_activations *a) {
    double best = 1e30, spent = 0;
    for (int run = 0; run < 3 || (spent < 0.3 && run < 100); run++) {
        const double start = seconds();
        kvq_run_matmul(isa, kind, y, n_rows, w, n_rows, NULL, a);
        const double taken = seconds() - start;
        if (taken < best) best = taken;
        spent += taken;
    }
    return best;
}

/* 10^9 operations per second on a matrix of rows by columns. */
static double speed(const kvq_isa *isa, kvq_weight_kind kind, const uint8_t *w, size_t n_tok,
                    size_t rows, size_t columns) {
    kvq_activations a = activations(isa, n_tok, columns);
    float *const y = allocate(n_tok * rows * sizeof *y);
    const double taken = time_product(isa, kind, y, w, rows, &a);
    kvq_free(y);
    release(&a);
    return 2e-9 * (double)n_tok * (double)(rows * columns) / taken;
}

int main(int argc, char **argv) {
    static const size_t shapes[][2] = {{576, 576}, {576, 1536}, {4864, 896}, {896, 4864}};
    static const size_t tokens[] = {16, 512};
    enum { SHAPES = sizeof shapes / sizeof *shapes, COUNTS = sizeof tokens / sizeof *tokens };
    const size_t mebibytes = argc > 1 ? strtoul(argv[1], NULL, 10) : 512;
    const kvq_isa *isa;
    if (mebibytes == 0 || mebibytes > 65536) {
        fprintf(stderr, "bench_weights: size of the matrix is %s, expected 1 to 65536 MiB\n",
                argv[1]);
        return 1;
    }
    if (kvq_isa_choose(&isa) != KVQ_OK) {
        fprintf(stderr, "bench_weights: %s\n", kvq_error());
        return 1;
    }

    printf("isa %s\n%-6s %8s %7s |", isa->name, "", "1 token", "");
    for (int n = 0; n < COUNTS; n++) {
        printf(" %4zu tokens, GOP/s%*s|", tokens[n], SHAPES * 11 - 19, "");
    }
    printf("\n%-6s %8s %7s |", "", "ns/row", "GB/s");
    for (int n = 0; n < COUNTS; n++) {
        for (int s = 0; s < SHAPES; s++) printf("%5zux%-5zu", shapes[s][0], shapes[s][1]);
        printf("|");
    }
    printf("\n");
    const size_t bytes = mebibytes << 20;
    uint8_t *const w = allocate(bytes);
    fill(w, bytes);
    kvq_activations one = activations(isa, 1, DECODE_COLUMNS);
    for (kvq_weight_kind kind = 0; kind < KVQ_WEIGHT_KINDS; kind++) {
        const kvq_weight_format *const format = &kvq_weight_formats[kind];
        const size_t bytes_row = DECODE_COLUMNS / format->block * format->bytes;
        const size_t n_rows = bytes / bytes_row;
        float *const y = allocate(n_rows * sizeof *y);
        const double t = time_product(isa, kind, y, w, n_rows, &one);
        printf("%-6s %8.1f %7.2f |", format->name, t * 1e9 / (double)n_rows,
               (double)(n_rows * bytes_row) / t * 1e-9);
        kvq_free(y);
        for (int n = 0; n < COUNTS; n++) {
            for (int s = 0; s < SHAPES; s++) {
                const size_t rows = shapes[s][0], columns = shapes[s][1];
                if (columns % format->block != 0 ||
                    columns / format->block * format->bytes * rows > bytes) {
                    printf("%11s", "-");
                } else {
                    printf("%11.1f", speed(isa, kind, w, tokens[n], rows, columns));
                }
            }
            printf("|");
        }
        printf("\n");
        fflush(stdout);
    }
    release(&one);
    kvq_free(w);
    return 0;
}
