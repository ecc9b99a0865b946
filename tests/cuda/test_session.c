/* test_session.c: sessions of kvq.h on a CUDA device, here the stand-in for the driver, against
 * those on the CPU; with nothing but the core.
 *
 *     KVQ_LIBCUDA=STAND_IN test_session MODEL
 *
 * MODEL is where a model of random weights is written.
 */
#include <dlfcn.h>

#include "kvq.h"
#include "test.h"

char test_sentence[512];

enum { D_MODEL = 128, D_FF = 160, N_LAYERS = 2, N_HEADS = 2, N_VOCAB = 96, D_HEAD = 64 };
enum { PROMPT = 150, STEPS = 3, KEPT = 120 };

/* ---- a model of random weights -------------------------------------------------------------- */

enum { GGUF_U32 = 4, GGUF_F32 = 6, GGUF_STRING = 8, GGUF_ALIGNMENT = 32 };

typedef struct tensor {
    const char *name;
    uint64_t columns, rows; /* a vector has 1 row */
} tensor;

static const tensor of_model[] = {
    {"token_embd.weight", D_MODEL, N_VOCAB},
    {"output_norm.weight", D_MODEL, 1},
};
static const tensor of_layer[] = {
    {"attn_norm.weight", D_MODEL, 1},
    {"attn_q.weight", D_MODEL, N_HEADS * D_HEAD},
    {"attn_k.weight", D_MODEL, D_HEAD},
    {"attn_v.weight", D_MODEL, D_HEAD},
    {"attn_output.weight", N_HEADS * D_HEAD, D_MODEL},
    {"ffn_norm.weight", D_MODEL, 1},
    {"ffn_gate.weight", D_MODEL, D_FF},
    {"ffn_up.weight", D_MODEL, D_FF},
    {"ffn_down.weight", D_FF, D_MODEL},
};
enum {
    OF_MODEL = sizeof of_model / sizeof *of_model,
    OF_LAYER = sizeof of_layer / sizeof *of_layer
};

static void put(FILE *file, const void *data, size_t bytes) { fwrite(data, 1, bytes, file); }
static void put_u32(FILE *file, uint32_t value) { put(file, &value, sizeof value); }
static void put_u64(FILE *file, uint64_t value) { put(file, &value, sizeof value); }
static void put_string(FILE *file, const char *text) {
    put_u64(file, strlen(text));
    put(file, text, strlen(text));
}

static void put_number(FILE *file, const char *key, uint32_t type, const void *value) {
    put_string(file, key);
    put_u32(file, type);
    put(file, value, 4);
}

static void put_tensor(FILE *file, const char *name, const tensor *t, uint64_t *offset) {
    put_string(file, name);
    put_u32(file, t->rows > 1 ? 2 : 1);
    put_u64(file, t->columns);
    if (t->rows > 1) put_u64(file, t->rows);
    put_u32(file, 0); /* f32 */
    put_u64(file, *offset);
    *offset += t->columns * t->rows * sizeof(float); /* all are multiples of the alignment */
}

static void put_weights(FILE *file, const tensor *t, uint64_t seed) {
    unsigned long long state = 2 * seed + 1;
    const float scale = t->rows > 1 ? 1.0f / sqrtf((float)t->columns) : 0.0f;
    for (uint64_t i = 0; i < t->columns * t->rows; i++) {
        const float value = scale > 0 ? scale * test_normal(&state) : 1.0f;
        put(file, &value, sizeof value);
    }
}

static const char *write_model(const char *path) {
    const struct {
        const char *key;
        uint32_t value;
    } counts[] = {
        {"llama.block_count", N_LAYERS},         {"llama.context_length", 512},
        {"llama.embedding_length", D_MODEL},     {"llama.feed_forward_length", D_FF},
        {"llama.attention.head_count", N_HEADS}, {"llama.attention.head_count_kv", 1},
    };
    enum { N_COUNTS = sizeof counts / sizeof *counts };
    const float epsilon = 1e-5f;
    uint64_t offset = 0;
    char name[64];
    FILE *const file = fopen(path, "wb");
    if (!file) return TEST_FAIL("%s cannot be written", path);
    put(file, "GGUF", 4);
    put_u32(file, 3);
    put_u64(file, OF_MODEL + N_LAYERS * OF_LAYER);
    put_u64(file, 2 + N_COUNTS);
    put_string(file, "general.architecture");
    put_u32(file, GGUF_STRING);
    put_string(file, "llama");
    for (size_t i = 0; i < N_COUNTS; i++) {
        put_number(file, counts[i].key, GGUF_U32, &counts[i].value);
    }
    put_number(file, "llama.attention.layer_norm_rms_epsilon", GGUF_F32, &epsilon);
    for (size_t i = 0; i < OF_MODEL; i++) put_tensor(file, of_model[i].name, &of_model[i], &offset);
    for (int layer = 0; layer < N_LAYERS; layer++) {
        for (size_t i = 0; i < OF_LAYER; i++) {
            snprintf(name, sizeof name, "blk.%d.%s", layer, of_layer[i].name);
            put_tensor(file, name, &of_layer[i], &offset);
        }
    }
    while (ftell(file) % GGUF_ALIGNMENT) put(file, "", 1);
    for (size_t i = 0; i < OF_MODEL; i++) put_weights(file, &of_model[i], i);
    for (size_t i = 0; i < N_LAYERS * OF_LAYER; i++) {
        put_weights(file, &of_layer[i % OF_LAYER], OF_MODEL + i);
    }
    const int failed = ferror(file);
    return fclose(file) || failed ? TEST_FAIL("%s cannot be written", path) : NULL;
}

/* ---- the same on both devices --------------------------------------------------------------- */

static const kvq_model *model;

#define TEST_OK(call)                                                                              \
    do {                                                                                           \
        if ((call) != KVQ_OK) return TEST_FAIL("%s: %.400s", #call, kvq_error());                  \
    } while (0)

/* Logits after a prompt that seals blocks, after each of some tokens, and after half of the prompt
 * once the rest was cut off. */
typedef struct answers {
    float logits[STEPS + 2][N_VOCAB];
    kvq_session_stats stats; /* after the tokens */
} answers;

static const char *ask(answers *out, const char *device, const char *scheme) {
    const kvq_session_options options = {.scheme = scheme,
                                         .n_ctx = 256,
                                         .n_threads = 1,
                                         .sinks = -1,
                                         .window = 16,
                                         .l_k = -1,
                                         .l_v = -1,
                                         .device = device,
                                         .n_gpu_layers = -1};
    kvq_session *session;
    int32_t tokens[PROMPT];
    for (int i = 0; i < PROMPT; i++) tokens[i] = i * i % N_VOCAB;
    TEST_OK(kvq_session_open(&session, model, &options));
    TEST_OK(kvq_session_eval(session, tokens, PROMPT, KVQ_LOGITS_LAST, out->logits[0], NULL, NULL));
    for (int i = 0; i < STEPS; i++) { /* launches, their graph, its replay */
        TEST_OK(kvq_session_eval(session, &tokens[i], 1, KVQ_LOGITS_LAST, out->logits[1 + i], NULL,
                                 NULL));
    }
    kvq_session_describe(session, &out->stats);
    TEST_OK(kvq_session_truncate(session, KEPT));
    TEST_OK(
        kvq_session_eval(session, tokens, 1, KVQ_LOGITS_LAST, out->logits[1 + STEPS], NULL, NULL));
    kvq_session_close(session);
    return NULL;
}

/* The root mean square difference, in standard deviations of `expected`. */
static double distance(const float *found, const float *expected) {
    double mean = 0, variance = 0, difference = 0;
    for (int i = 0; i < N_VOCAB; i++) mean += expected[i] / (double)N_VOCAB;
    for (int i = 0; i < N_VOCAB; i++) {
        const double off = expected[i] - mean, apart = (double)found[i] - expected[i];
        variance += off * off;
        difference += apart * apart;
    }
    return sqrt(difference / variance);
}

/* Products round differently on the two, and then a code can be the one beside. */
static const char *same_answers(const char *scheme, double most) {
    answers cpu, cuda;
    const char *broke = ask(&cpu, "cpu", scheme);
    if (!broke) broke = ask(&cuda, "cuda", scheme);
    if (broke) return broke;
    TEST_CHECK(cpu.stats.gpu == -1 && cpu.stats.n_gpu_layers == 0);
    TEST_CHECK(cuda.stats.gpu == 0 && cuda.stats.n_gpu_layers == N_LAYERS && cuda.stats.gpu_head);
    TEST_CHECK(cuda.stats.n_tokens == PROMPT + STEPS);
    TEST_CHECK(cuda.stats.n_tokens_sealed == 128 && cpu.stats.n_tokens_sealed == 128);
    TEST_CHECK(0 < cuda.stats.bytes_gpu_now && cuda.stats.bytes_gpu_now <= cuda.stats.bytes_gpu);
    for (int i = 0; i < STEPS + 2; i++) {
        const double apart = distance(cuda.logits[i], cpu.logits[i]);
        if (!(apart < most)) return TEST_FAIL("%s, answer %d: %.3g apart", scheme, i, apart);
    }
    return NULL;
}

static const char *test_lossless(void) { return same_answers("f16", 0.005); }
static const char *test_lossy(void) { return same_answers("skvq", 0.05); }

static const char *test_nothing_is_left(void) {
    int (*count)(void);
    for (int i = 0; i < 2; i++) {
        const char *const name = i ? "fakecuda_violations" : "fakecuda_leaks";
        void *const library = dlopen(getenv("KVQ_LIBCUDA"), RTLD_NOW | RTLD_NOLOAD);
        void *const symbol = library ? dlsym(library, name) : NULL;
        TEST_CHECK(symbol);
        memcpy(&count, &symbol, sizeof count);
        if (count() != 0) return TEST_FAIL("%s: %d", name, count());
    }
    return NULL;
}

static const kvq_test tests[] = {
    {"session: f16 says on the device what it says on the CPU", test_lossless},
    {"session: skvq says on the device what it says on the CPU", test_lossy},
    {"session: closing leaves nothing on the device", test_nothing_is_left},
};

int main(int argc, char **argv) {
    const char *broke = argc == 2 ? write_model(argv[1]) : "usage: test_session MODEL";
    kvq_model *opened = NULL;
    if (!broke && kvq_model_open(&opened, argv[1]) != KVQ_OK) broke = kvq_error();
    if (broke) {
        fprintf(stderr, "%s\n", broke);
        return 2;
    }
    model = opened;
    int failed = 0;
    const int n = (int)(sizeof tests / sizeof *tests);
    for (int i = 0; i < n; i++) {
        broke = tests[i].run();
        if (broke) printf("FAILED %s\n       %s\n", tests[i].name, broke);
        failed += broke != NULL;
    }
    kvq_model_close(opened);
    printf("%d passed, %d failed\n", n - failed, failed);
    return failed != 0;
}
