/* test_weights.c: sizes and values of the weight formats against what the gguf package says of them
 * (vectors/weights.bin), and the products of every instruction set against the reference. */
#include <sys/mman.h>
#include <unistd.h>

#include "isa/isa.h"
#include "test.h"

/* ---- frozen vectors ---------------------------------------------------------------------- */

/* The bytes of vectors/weights.bin; NULL if it cannot be read. The directory of the tests is
 * `tests` from the root of the repository, or what KVQ_TEST_DIR names. */
static uint8_t *load_vectors(size_t *bytes) {
    const char *const directory = getenv("KVQ_TEST_DIR");
    char path[4096];
    snprintf(path, sizeof path, "%s/vectors/weights.bin", directory ? directory : "tests");
    FILE *const file = fopen(path, "rb");
    if (!file) return NULL;
    uint8_t *const data = malloc(1 << 20);
    *bytes = data ? fread(data, 1, 1 << 20, file) : 0;
    fclose(file);
    return data;
}
#define NO_VECTORS "vectors/weights.bin cannot be read from the directory `tests` or KVQ_TEST_DIR"

static const char *check_sizes(const uint8_t *vectors) {
    const char *name;
    uint32_t block, bytes;
    bool listed[64] = {[9] = true, [42] = true}; /* checked below */
    const uint32_t n = kvq_load_u32(vectors);
    const uint8_t *entry = vectors + 4;
    TEST_CHECK(n > 30);
    for (uint32_t i = 0; i < n; i++, entry += 28) {
        const uint32_t id = kvq_load_u32(entry);
        TEST_CHECK(id < 64);
        listed[id] = true;
        const bool known = kvq_ggml_type_size(id, &name, &block, &bytes);
        if (!known) return TEST_FAIL("type %u is unknown", id);
        if (strncmp(name, (const char *)entry + 12, 16) != 0 || block != kvq_load_u32(entry + 4) ||
            bytes != kvq_load_u32(entry + 8)) {
            return TEST_FAIL("type %u is %s with %u bytes for %u, expected %.16s with %u for %u",
                             id, name, bytes, block, (const char *)entry + 12,
                             kvq_load_u32(entry + 8), kvq_load_u32(entry + 4));
        }
    }
    /* Two that gguf 0.19 does not have right: sizes from ggml 0.9 (block_q8_1, block_q2_0). */
    TEST_CHECK(kvq_ggml_type_size(9, &name, &block, &bytes) && block == 32 && bytes == 36);
    TEST_CHECK(kvq_ggml_type_size(42, &name, &block, &bytes) && block == 64 && bytes == 18);
    for (uint32_t id = 0; id < 64; id++) {
        if (!listed[id] && kvq_ggml_type_size(id, &name, &block, &bytes)) {
            return TEST_FAIL("type %u, which ggml has removed or never had, is known as %s", id,
                             name);
        }
    }
    TEST_CHECK(!kvq_ggml_type_size(UINT32_MAX, &name, &block, &bytes));
    for (int kind = 0; kind < KVQ_WEIGHT_KINDS; kind++) {
        const kvq_weight_format *const format = &kvq_weight_formats[kind];
        TEST_CHECK(kvq_ggml_type_size(format->ggml_id, &name, &block, &bytes));
        TEST_CHECK(!strcmp(name, format->name) && block == format->block && bytes == format->bytes);
        TEST_CHECK(kvq_weight_find(format->ggml_id) == kind);
    }
    TEST_CHECK(kvq_weight_find(4) == -1 && kvq_weight_find(10) == -1);
    return NULL;
}

static const char *test_sizes(void) {
    size_t bytes;
    uint8_t *const vectors = load_vectors(&bytes);
    const char *const broken = vectors ? check_sizes(vectors) : NO_VECTORS;
    free(vectors);
    return broken;
}

static const char *check_values(const uint8_t *vectors, size_t bytes_vectors) {
    const uint8_t *at = vectors + 4 + 28 * kvq_load_u32(vectors);
    const uint32_t n = kvq_load_u32(at);
    at += 4;
    TEST_CHECK(n == KVQ_WEIGHT_KINDS);
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t bytes = kvq_load_u32(at + 4), values = kvq_load_u32(at + 8);
        const int kind = kvq_weight_find(kvq_load_u32(at));
        const uint8_t *const expected = at + 12 + bytes;
        float y[512];
        TEST_CHECK(kind >= 0 && values == 512 && expected + 4 * values <= vectors + bytes_vectors);
        kvq_weight_formats[kind].dequantize(y, at + 12, values);
        for (uint32_t c = 0; c < values; c++) {
            if (memcmp(&y[c], expected + 4 * c, 4) != 0) {
                float e;
                memcpy(&e, expected + 4 * c, 4);
                return TEST_FAIL("%s: value %u is %.9g, expected %.9g",
                                 kvq_weight_formats[kind].name, c, (double)y[c], (double)e);
            }
        }
        at = expected + 4 * values;
    }
    TEST_CHECK(at == vectors + bytes_vectors);
    return NULL;
}

static const char *test_values(void) {
    size_t bytes;
    uint8_t *const vectors = load_vectors(&bytes);
    const char *const broken = vectors ? check_values(vectors, bytes) : NO_VECTORS;
    free(vectors);
    return broken;
}

/* ---- a product and its operands ---------------------------------------------------------- */

/* Memory whose end is the end of what may be touched: the next byte faults, whatever the build. */
typedef struct guarded {
    uint8_t *data, *pages;
    size_t bytes_pages;
} guarded;

static guarded guard(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), usable = kvq_round_up(bytes, page);
    guarded g = {.bytes_pages = usable + page};
    g.pages = mmap(NULL, g.bytes_pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.pages == MAP_FAILED || mprotect(g.pages + usable, page, PROT_NONE) != 0) {
        fprintf(stderr, "test_weights: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    g.data = g.pages + usable - bytes;
    return g;
}

enum { MAX_TOKENS = 140, MAX_ROWS = 64, MAX_COLUMNS = 2048 }; /* more than a chunk */

/* Operands of one product, each at the end of its pages. */
typedef struct operands {
    kvq_weight_kind kind;
    size_t n_rows;
    kvq_activations x;
    guarded w, columns, q, scale, sums;
} operands;

static operands make_operands(kvq_weight_kind kind, size_t n_rows, size_t n_tok, size_t n_cols) {
    const kvq_weight_format *const format = &kvq_weight_formats[kind];
    operands o = {.kind = kind, .n_rows = n_rows};
    o.w = guard(n_rows * n_cols / format->block * format->bytes);
    o.columns = guard(n_tok * n_cols * sizeof(float));
    o.q = guard(n_tok * n_cols * sizeof(int16_t));
    o.scale = guard(n_tok * kvq_activation_runs(n_cols) * sizeof(float));
    o.sums = guard(n_tok * (n_cols / 32) * sizeof(float));
    o.x = (kvq_activations){.x = (float *)(void *)o.columns.data,
                            .n_tok = n_tok,
                            .n_cols = n_cols,
                            .q = (int16_t *)(void *)o.q.data,
                            .scale = (float *)(void *)o.scale.data,
                            .sums = (float *)(void *)o.sums.data};
    return o;
}

static void release(operands *o) {
    guarded *const all[] = {&o->w, &o->columns, &o->q, &o->scale, &o->sums};
    for (size_t i = 0; i < 5; i++) munmap(all[i]->pages, all[i]->bytes_pages);
}

static float *columns_of(operands *o) { return (float *)(void *)o->columns.data; }

static bool is_float(kvq_weight_kind kind) { return kvq_weight_formats[kind].block == 1; }

/* Where the f16 of a block stand, and the largest normalized mean square error that rounding the
 * activations to 15 bits may cause: a step is 1/16383 of the largest of 256, about 1/5800 of a
 * standard deviation; its square over 12 is 2.5e-9. Float formats keep the activations; their own
 * sum is f32. */
static const struct {
    int halves[2]; /* -1: none */
    double nmse;
} properties[KVQ_WEIGHT_KINDS] = {
    [KVQ_WEIGHT_F32] = {{-1, -1}, 1e-12},  [KVQ_WEIGHT_F16] = {{-1, -1}, 1e-12},
    [KVQ_WEIGHT_BF16] = {{-1, -1}, 1e-12}, [KVQ_WEIGHT_Q4_0] = {{0, -1}, 5e-9},
    [KVQ_WEIGHT_Q4_1] = {{0, 2}, 5e-9},    [KVQ_WEIGHT_Q5_0] = {{0, -1}, 5e-9},
    [KVQ_WEIGHT_Q5_1] = {{0, 2}, 5e-9},    [KVQ_WEIGHT_Q8_0] = {{0, -1}, 5e-9},
    [KVQ_WEIGHT_Q4_K] = {{0, 2}, 5e-9},    [KVQ_WEIGHT_Q5_K] = {{0, 2}, 5e-9},
    [KVQ_WEIGHT_Q6_K] = {{208, -1}, 5e-9},
};

static void store_u16(uint8_t *p, uint16_t v) { memcpy(p, &v, 2); }

/* `pattern` in every byte of quantized weights, or random bytes if it is negative; the f16 among
 * them are random, of either sign. Float weights are normal whatever the pattern. */
static void fill_weights(operands *o, int pattern, unsigned long long *random) {
    const kvq_weight_format *const format = &kvq_weight_formats[o->kind];
    const size_t n_blocks = o->n_rows * o->x.n_cols / format->block;
    for (size_t b = 0; b < n_blocks; b++) {
        uint8_t *const block = o->w.data + b * format->bytes;
        const float value = test_normal(random);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        switch (o->kind) {
        case KVQ_WEIGHT_F32:
            memcpy(block, &value, 4);
            continue;
        case KVQ_WEIGHT_F16:
            store_u16(block, kvq_f32_to_f16(value));
            continue;
        case KVQ_WEIGHT_BF16:
            store_u16(block, (uint16_t)(bits >> 16));
            continue;
        default:
            break;
        }
        for (uint32_t i = 0; i < format->bytes; i++) {
            block[i] = (uint8_t)(pattern < 0 ? (int)test_random(random) : pattern);
        }
        for (int i = 0; i < 2 && properties[o->kind].halves[i] >= 0; i++) {
            store_u16(block + properties[o->kind].halves[i], kvq_f32_to_f16(test_uniform(random)));
        }
    }
}

/* Instruction sets that have kernels and run here. */
static const kvq_isa *const *fast_sets(void) {
    static const kvq_isa *sets[4];
    int n = 0;
#if defined(__x86_64__) || defined(_M_X64)
    if (kvq_isa_avx2.supported()) sets[n++] = &kvq_isa_avx2;
    if (kvq_isa_avx512.supported()) sets[n++] = &kvq_isa_avx512;
#elif defined(__aarch64__) || defined(_M_ARM64)
    if (kvq_isa_neon.supported()) sets[n++] = &kvq_isa_neon;
#endif
    sets[n] = NULL;
    return sets;
}

/* The number of columns to test a format with: 0 ends the list. */
static const size_t *widths_of(kvq_weight_kind kind) {
    static const size_t of_256[] = {256, 2048, 0}, of_32[] = {32, 256, 576, 2048, 0};
    static const size_t of_1[] = {1, 4, 64, 172, 576, 2047, 0};
    return is_float(kind) ? of_1 : kvq_weight_formats[kind].block == 32 ? of_32 : of_256;
}

/* A sentence if a product is further from the sum in f64 than 2e-6 of the sum of magnitudes. `x`
 * are the activations that the product has used, n_cols of them for each token. */
static const char *check_product(const operands *o, const float *y, size_t y_stride,
                                 const float *x) {
    const kvq_weight_format *const format = &kvq_weight_formats[o->kind];
    const size_t n_cols = o->x.n_cols, bytes_row = n_cols / format->block * format->bytes;
    float row[MAX_COLUMNS];
    for (size_t r = 0; r < o->n_rows; r++) {
        format->dequantize(row, o->w.data + r * bytes_row, n_cols);
        for (size_t t = 0; t < o->x.n_tok; t++) {
            double sum = 0, magnitude = 0;
            for (size_t c = 0; c < n_cols; c++) {
                const double product = (double)row[c] * (double)x[t * n_cols + c];
                sum += product;
                magnitude += fabs(product);
            }
            const double error = fabs((double)y[t * y_stride + r] - sum);
            if (!(error <= 2e-6 * magnitude)) {
                return TEST_FAIL("%s, %zu columns, row %zu, token %zu: %.9g, expected %.9g; "
                                 "the sum of magnitudes is %.3g",
                                 format->name, n_cols, r, t, (double)y[t * y_stride + r], sum,
                                 magnitude);
            }
        }
    }
    return NULL;
}

/* The quantized activation i, of n_tok * n_cols, in the form of its instruction set. */
static int quantized(const kvq_activations *x, size_t i) {
    const int16_t *const four = x->q + i / 4 * 4;
#if defined(__aarch64__) || defined(_M_ARM64)
    const int8_t *const parts = (const int8_t *)four;
    return 128 * parts[i % 4] + parts[4 + i % 4];
#else
    static const size_t place[4] = {0, 2, 1, 3};
    return four[place[i % 4]];
#endif
}

/* The activations as a product sees them: f32 [n_tok][n_cols], to be freed. */
static float *seen_by_product(const operands *o) {
    const size_t n_cols = o->x.n_cols, n = o->x.n_tok * n_cols;
    float *const x = malloc(n * sizeof *x);
    for (size_t i = 0; x && i < n; i++) {
        const size_t run =
            i / n_cols * kvq_activation_runs(n_cols) + i % n_cols / KVQ_ACTIVATION_RUN;
        x[i] = is_float(o->kind) ? o->x.x[i] : o->x.scale[run] * (float)quantized(&o->x, i);
    }
    return x;
}

/* Runs one product with rows of y_stride, and checks that nothing outside of them is written. */
static const char *multiply(const kvq_isa *isa, const operands *o, float *y, size_t y_stride) {
    const size_t n = o->x.n_tok * y_stride;
    for (size_t i = 0; i < n; i++) y[i] = -12345;
    isa->matmul[o->kind](y, y_stride, o->w.data, o->n_rows, NULL, &o->x);
    for (size_t i = 0; i < n; i++) {
        if (i % y_stride >= o->n_rows && y[i] != -12345) return TEST_FAIL("writes past its rows");
    }
    return NULL;
}

/* ---- products ---------------------------------------------------------------------------- */

/* Calls `check` for every instruction set that has a product for the kind. */
static const char *each_product(const char *(*check)(const kvq_isa *isa, kvq_weight_kind kind)) {
    for (const kvq_isa *const *isa = fast_sets(); *isa; isa++) {
        for (kvq_weight_kind kind = 0; kind < KVQ_WEIGHT_KINDS; kind++) {
            if (!(*isa)->matmul[kind]) continue;
            const char *const broken = check(*isa, kind);
            if (broken) return broken;
        }
    }
    return NULL;
}

static const char *test_reference(void) {
    const float w[2][3] = {{1, 2, 3}, {-1, 0.5f, 0}}, x[2][3] = {{1, 10, 100}, {0, -2, 1}};
    const kvq_activations a = {.x = &x[0][0], .n_tok = 2, .n_cols = 3};
    float y[2][4] = {{7, 7, 7, 7}, {7, 7, 7, 7}};
    kvq_matmul_reference(KVQ_WEIGHT_F32, &y[0][0], 4, (const uint8_t *)w, 2, &a);
    TEST_CHECK(y[0][0] == 321 && y[0][1] == 4 && y[1][0] == -1 && y[1][1] == -1);
    TEST_CHECK(y[0][2] == 7 && y[1][2] == 7);
    return NULL;
}

/* More tokens than the reference or a kernel takes at a time, a row more than a panel. */
static const char *check_against_reference(const kvq_isa *isa, kvq_weight_kind kind) {
    unsigned long long random = 1 + (unsigned long long)kind;
    const char *broken = NULL;
    for (const size_t *n_cols = widths_of(kind); *n_cols && !broken; n_cols++) {
        operands o = make_operands(kind, 9, MAX_TOKENS, *n_cols);
        float *const y = malloc(MAX_TOKENS * 9 * sizeof *y);
        float *const exact = malloc(MAX_TOKENS * 9 * sizeof *y);
        fill_weights(&o, -1, &random);
        for (size_t i = 0; i < MAX_TOKENS * *n_cols; i++) columns_of(&o)[i] = test_normal(&random);
        if (!is_float(kind)) isa->quantize(&o.x, 0, MAX_TOKENS);
        float *const seen = seen_by_product(&o);
        broken = multiply(isa, &o, y, 9);
        if (!broken) broken = check_product(&o, y, 9, seen);

        kvq_matmul_reference(kind, exact, 9, o.w.data, 9, &o.x);
        double error = 0, square = 0;
        for (size_t i = 0; i < MAX_TOKENS * 9; i++) {
            error += pow((double)y[i] - (double)exact[i], 2);
            square += pow((double)exact[i], 2);
        }
        if (!broken && !(error <= properties[kind].nmse * square)) {
            broken = TEST_FAIL("%s, %zu columns: error of %.3g, expected at most %.3g",
                               kvq_weight_formats[kind].name, *n_cols, error / square,
                               properties[kind].nmse);
        }
        free(seen);
        free(exact);
        free(y);
        release(&o);
    }
    return broken;
}

static const char *test_against_reference(void) { return each_product(check_against_reference); }

/* The largest codes times the largest activations: an integer that overflows would show. Of Q6_K
 * those are codes of -32 with scales of -128, which is no pattern of equal bytes. */
static const char *check_extremes(const kvq_isa *isa, kvq_weight_kind kind) {
    static const int patterns[] = {0x00, 0x0f, 0x7f, 0x80, 0x81, 0xf0, 0xff};
    unsigned long long random = 1;
    const char *broken = NULL;
    if (is_float(kind)) return NULL;
    for (size_t p = 0; p < sizeof patterns / sizeof *patterns && !broken; p++) {
        operands o = make_operands(kind, 8, 3, 512);
        float y[3 * 8], alone[8];
        fill_weights(&o, patterns[p], &random);
        if (kind == KVQ_WEIGHT_Q6_K && patterns[p] == 0) {
            for (size_t block = 0; block < 8 * 512 / 256; block++) {
                memset(o.w.data + block * 210 + 192, 0x80, 16);
            }
        }
        for (size_t c = 0; c < 512; c++) { /* all the largest, all the lowest, both in turn */
            columns_of(&o)[c] = 1;
            columns_of(&o)[512 + c] = -1;
            columns_of(&o)[1024 + c] = c & 1 ? 1 : -1;
        }
        isa->quantize(&o.x, 0, 3);
        float *const seen = seen_by_product(&o);
        broken = multiply(isa, &o, y, 8);
        if (!broken) broken = check_product(&o, y, 8, seen);
        o.x.n_tok = 1;
        if (!broken) broken = multiply(isa, &o, alone, 8);
        if (!broken) broken = check_product(&o, alone, 8, seen);
        free(seen);
        release(&o);
    }
    return broken;
}

static const char *test_extremes(void) { return each_product(check_extremes); }

/* The same bits for a token and a row, however many come together, at whatever address and stride.
 * Each combination has its operands at the end of their pages: nothing is read past them. */
static const char *check_company(const kvq_isa *isa, kvq_weight_kind kind) {
    static const size_t tokens[] = {1, 2, 3, 4, 5, 8, 33}, rows[] = {1, 7, 8, 13, 17, 45, 64};
    const kvq_weight_format *const format = &kvq_weight_formats[kind];
    unsigned long long random = 7;
    const char *broken = NULL;
    for (const size_t *n_cols = widths_of(kind); *n_cols && !broken; n_cols++) {
        operands all = make_operands(kind, MAX_ROWS, MAX_TOKENS, *n_cols);
        float *const expected = malloc(MAX_TOKENS * MAX_ROWS * sizeof *expected);
        float *const y = malloc(MAX_TOKENS * (MAX_ROWS + 3) * sizeof *y);
        const size_t bytes_row = *n_cols / format->block * format->bytes;
        fill_weights(&all, -1, &random);
        float *const columns = columns_of(&all);
        for (size_t i = 0; i < MAX_TOKENS * *n_cols; i++) columns[i] = test_normal(&random);
        if (!is_float(kind)) isa->quantize(&all.x, 0, MAX_TOKENS);
        broken = multiply(isa, &all, expected, MAX_ROWS);
        for (size_t i = 0; i < 7 * 7 && !broken; i++) {
            const size_t n_tok = tokens[i / 7], n_rows = rows[i % 7];
            const size_t token = MAX_TOKENS - n_tok, row = (MAX_ROWS - n_rows) / 2;
            operands o = make_operands(kind, n_rows, n_tok, *n_cols);
            memcpy(o.w.data, all.w.data + row * bytes_row, n_rows * bytes_row);
            memcpy(o.columns.data, all.x.x + token * *n_cols, n_tok * *n_cols * sizeof(float));
            if (!is_float(kind)) { /* in two parts, as two threads would */
                isa->quantize(&o.x, 0, n_tok / 2);
                isa->quantize(&o.x, n_tok / 2, n_tok - n_tok / 2);
            }
            broken = multiply(isa, &o, y, n_rows + 3);
            for (size_t t = 0; t < n_tok && !broken; t++) {
                const float *const same = expected + (token + t) * MAX_ROWS + row;
                if (memcmp(y + t * (n_rows + 3), same, n_rows * sizeof *y) != 0) {
                    broken = TEST_FAIL("%s, %zu columns: token %zu of %zu has other bits with %zu "
                                       "rows than with %d",
                                       format->name, *n_cols, t, n_tok, n_rows, MAX_ROWS);
                }
            }
            release(&o);
        }
        free(y);
        free(expected);
        release(&all);
    }
    return broken;
}

static const char *test_company(void) { return each_product(check_company); }

/* ---- activations ------------------------------------------------------------------------- */

enum { SHORT_RUN = 96, TWO_RUNS = KVQ_ACTIVATION_RUN + SHORT_RUN };

/* Of a row that is one whole run and a short one, whose magnitudes differ. */
static const char *check_quantize(const kvq_isa *isa, const float x[TWO_RUNS], const bool zero[2]) {
    int16_t q[TWO_RUNS];
    float scale[2], sums[TWO_RUNS / 32];
    kvq_activations a = {
        .x = x, .n_tok = 1, .n_cols = TWO_RUNS, .q = q, .scale = scale, .sums = sums};
    isa->quantize(&a, 0, 1);
    for (size_t run = 0; run < 2; run++) {
        const size_t first = run * KVQ_ACTIVATION_RUN, end = run ? TWO_RUNS : KVQ_ACTIVATION_RUN;
        float largest = 0;
        for (size_t c = first; c < end; c++) largest = fmaxf(largest, fabsf(x[c]));
        if (scale[run] != (zero[run] ? 0.0f : largest / KVQ_ACTIVATION_MAX)) {
            return TEST_FAIL("scale of magnitudes up to %g is %g", (double)largest,
                             (double)scale[run]);
        }
        for (size_t c = first; c < end; c++) {
            const int code = quantized(&a, c);
            /* half a step, and two roundings of x / scale, 2^-24 each of a magnitude below 2^14 */
            const double error = fabs((double)code * (double)scale[run] - (double)x[c]);
            const double bound = zero[run] ? 2e-34 : (0.5 + 0.002) * (double)scale[run];
            if (abs(code) > KVQ_ACTIVATION_MAX || (zero[run] && code != 0) || error > bound) {
                return TEST_FAIL("%g in steps of %g is %d", (double)x[c], (double)scale[run], code);
            }
        }
    }
    for (size_t b = 0; b < TWO_RUNS / 32; b++) {
        int sum = 0;
        for (size_t c = b * 32; c < b * 32 + 32; c++) sum += quantized(&a, c);
        TEST_CHECK(sums[b] == (float)sum);
    }
    return NULL;
}

static const char *test_quantize(void) {
    static const float magnitudes[] = {1, 1e-30f, 2e-34f, 1.9e-34f, 1e-40f, 0, 1e30f, 3.4e38f};
    unsigned long long random = 3;
    for (const kvq_isa *const *isa = fast_sets(); *isa; isa++) {
        for (size_t i = 0; i < 8 * KVQ_ACTIVATION_RUN; i++) {
            const float magnitude[2] = {magnitudes[i % 8], magnitudes[(i + i / 8) % 8]};
            const bool zero[2] = {magnitude[0] < 1.95e-34f, magnitude[1] < 1.95e-34f};
            float x[TWO_RUNS];
            for (size_t c = 0; c < TWO_RUNS; c++) {
                x[c] = magnitude[c / KVQ_ACTIVATION_RUN] * test_uniform(&random);
            }
            x[i / 8] = -magnitude[0];
            x[KVQ_ACTIVATION_RUN + i % SHORT_RUN] = -magnitude[1];
            const char *const broken = check_quantize(*isa, x, zero);
            if (broken) return broken;
        }
        /* scale 1, ties to even */
        static const float x[32] = {16383, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, -16383};
        static const int expected[8] = {16383, 0, 2, 2, 0, -2, -2, -16383};
        int16_t q[32];
        float scale, sum;
        kvq_activations a = {
            .x = x, .n_tok = 1, .n_cols = 32, .q = q, .scale = &scale, .sums = &sum};
        (*isa)->quantize(&a, 0, 1);
        for (size_t c = 0; c < 8; c++) TEST_CHECK(quantized(&a, c) == expected[c]);
    }
    return NULL;
}

/* An infinity or NaN among the activations must show in what is made of it. */
static const char *check_not_finite(const kvq_isa *isa, kvq_weight_kind kind) {
    unsigned long long random = 5;
    const char *broken = NULL;
    for (int i = 0; i < 2 && !broken; i++) {
        operands o = make_operands(kind, 8, 2, 512);
        float y[2 * 8];
        fill_weights(&o, -1, &random);
        for (size_t c = 0; c < 1024; c++) columns_of(&o)[c] = test_normal(&random);
        columns_of(&o)[i == 0 ? 100 : 511] = i == 0 ? (float)NAN : (float)INFINITY;
        if (!is_float(kind)) isa->quantize(&o.x, 0, 2);
        broken = multiply(isa, &o, y, 8);
        for (int r = 0; r < 8 && !broken; r++) {
            if (isfinite(y[r]) || !isfinite(y[8 + r])) {
                broken = TEST_FAIL("%s: row %d is %g with a %s, %g without",
                                   kvq_weight_formats[kind].name, r, (double)y[r],
                                   i == 0 ? "NaN" : "infinity", (double)y[8 + r]);
            }
        }
        release(&o);
    }
    return broken;
}

static const char *test_not_finite(void) { return each_product(check_not_finite); }

const kvq_test tests_weights[] = {
    {"weights: types have the sizes of ggml, removed and unknown ones are refused", test_sizes},
    {"weights: dequantizers give the values of gguf, bit for bit", test_values},
    {"weights: the reference product sums rows by columns", test_reference},
    {"weights: products match the reference", test_against_reference},
    {"weights: the largest codes and activations do not overflow", test_extremes},
    {"weights: company and address change no bit, and nothing past the operands is read",
     test_company},
    {"weights: quantized activations are the nearest, at any magnitude", test_quantize},
    {"weights: an activation that is not finite shows in its products only", test_not_finite},
    {NULL, NULL},
};
