/* fuzz_profile.c: opens any bytes as a KV profile, and checks what kv_profile.h promises of the
 * numbers of one that is taken. An entry point for libFuzzer and for fuzz_main.c. */
#include <math.h>

#include "arch.h"
#include "fuzz.h"
#include "kv/kv_profile.h"

unsigned long fuzz_accepted, fuzz_bound;

/* The sizes of make_corpus.py. A profile takes what its model says, however large its file is. */
enum { KV_HEADS = 2, D_HEAD = 20, D_ROPE = 18 };
const long long fuzz_heap_most = 1 << 16;

/* All numbers of [heads][d], those of padded channels zero. */
static void check_rows(const kvq_profile *p, const float *rows, float least, float most) {
    for (int i = 0; i < KV_HEADS * p->d; i++) {
        if (i % p->d >= D_HEAD)
            FUZZ_CHECK(rows[i] == 0);
        else
            FUZZ_CHECK(rows[i] >= least && rows[i] <= most);
    }
}

static void check_weights(const float *x, int n, float least, float most) {
    for (int i = 0; i < n; i++) FUZZ_CHECK(x[i] >= least && x[i] <= most);
}

/* Both [heads][d][d] in columns; the dual of T is the transpose of its inverse. */
static void check_inverse(const kvq_profile *p, const float *columns, const float *inverse,
                          bool dual) {
    const int d = p->d;
    for (int head = 0; head < KV_HEADS; head++, columns += d * d, inverse += d * d) {
        for (int i = 0; i < d * d; i++) {
            FUZZ_CHECK((i / d < D_HEAD && i % d < D_HEAD) || (columns[i] == 0 && inverse[i] == 0));
        }
        for (int i = 0; i < D_HEAD; i++) {
            for (int j = 0; j < D_HEAD; j++) {
                double sum = 0, size = 0;
                for (int c = 0; c < D_HEAD; c++) {
                    const double a = columns[c * d + i];
                    const double b = inverse[dual ? c * d + j : j * d + c];
                    sum += a * b;
                    size += fabs(a * b);
                }
                FUZZ_CHECK(fabs(sum - (i == j)) <= 1e-6 * (size + 1));
            }
        }
    }
}

static void check_order(const kvq_profile *p) {
    for (int head = 0; head < KV_HEADS; head++) {
        const uint16_t *const order = p->order + head * p->d;
        bool seen[KVQ_D_MAX] = {false};
        for (int c = 0; c < p->d; c++) {
            FUZZ_CHECK(order[c] < p->d && !seen[order[c]]);
            seen[order[c]] = true;
        }
    }
}

static void check_waves(const kvq_profile *p) {
    for (int head = 0; head < KV_HEADS; head++) {
        FUZZ_CHECK(p->n_waves[head] <= KVQ_WAVES);
        for (int i = head * KVQ_WAVES; i < head * KVQ_WAVES + p->n_waves[head]; i++) {
            FUZZ_CHECK(p->wave_pair[i] < D_ROPE / 2);
            for (int c = i * p->d; c < (i + 1) * p->d; c++) {
                FUZZ_CHECK(isfinite(p->wave_u[c]) && isfinite(p->wave_w[c]));
            }
        }
    }
}

static void check_profile(const kvq_profile *p) {
    FUZZ_CHECK(p->n_layers == 1 && p->n_heads == KV_HEADS && p->d_head == D_HEAD);
    check_inverse(p, p->k_store, p->k_query, true);
    check_inverse(p, p->v_store, p->v_restore, false);
    check_rows(p, p->k_mean, -65504, 65504);
    check_rows(p, p->v_mean, -65504, 65504);
    check_rows(p, p->importance, 0, 1e15f);
    check_weights(p->k_sensitivity, 1, 0, 1e15f);
    check_weights(p->v_sensitivity, KV_HEADS, 0, 1e15f);
    check_order(p);
    check_waves(p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    static const uint8_t no_tensors[24] = {'G', 'G', 'U', 'F', 3};
    kvq_layer layer = {0};
    kvq_model model = {
        .config = {.n_layers = 1, .n_kv_heads = KV_HEADS, .d_head = D_HEAD, .d_rope = D_ROPE},
        .layers = &layer};
    kvq_gguf *file = NULL;
    if (kvq_gguf_open_memory(&file, data, bytes) != KVQ_OK) return 0; /* of fuzz_gguf.c */
    FUZZ_CHECK(kvq_gguf_open_memory(&model.file, no_tensors, sizeof no_tensors) == KVQ_OK);
    fuzz_accepted++;
    for (int kind = KVQ_ROPE_INTERLEAVED; kind <= KVQ_ROPE_NEOX; kind++) {
        kvq_profile *profile = NULL;
        model.config.rope = (kvq_rope_kind)kind;
        if (kvq_profile_read(&profile, &model, file) != KVQ_OK) {
            FUZZ_CHECK(!profile);
            fuzz_check_sentence(kvq_error());
            continue;
        }
        check_profile(profile);
        fuzz_bound++;
        kvq_profile_close(profile);
    }
    kvq_gguf_close(model.file);
    kvq_gguf_close(file);
    return 0;
}
