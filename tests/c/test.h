/* test.h: a table of named tests per file, run by test_main.c. A test returns NULL when its claim
 * holds, else a sentence that says what broke (TEST_FAIL formats one). */
#ifndef KVQ_TEST_H
#define KVQ_TEST_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct kvq_test {
    const char *name; /* what is claimed: "weights: row dots match the reference" */
    const char *(*run)(void);
} kvq_test;

extern char test_sentence[512];

#define TEST_FAIL(...) (snprintf(test_sentence, sizeof test_sentence, __VA_ARGS__), test_sentence)
#define TEST_CHECK(condition)                                                                      \
    do {                                                                                           \
        if (!(condition)) return TEST_FAIL("%s:%d: not true: %s", __FILE__, __LINE__, #condition); \
    } while (0)

/* xorshift64*: the same numbers on every machine. */
static inline unsigned test_random(unsigned long long *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (unsigned)((*state * 2685821657736338717ull) >> 33);
}
static inline float test_uniform(unsigned long long *state) { /* [-1, 1) */
    return (float)test_random(state) / 1073741824.0f - 1.0f;
}
static inline float test_normal(unsigned long long *state) { /* sum of 12 uniforms */
    float s = 0;
    for (int i = 0; i < 12; i++) s += test_uniform(state);
    return s * 0.5f;
}

static inline void test_normals(float *x, size_t n, unsigned long long seed) {
    unsigned long long state = seed * 2 + 1;
    for (size_t i = 0; i < n; i++) x[i] = test_normal(&state);
}

/* One table per file, ended by {NULL, NULL}. */
extern const kvq_test tests_gguf[], tests_weights[], tests_kv_codec[], tests_kv[], tests_kv_plan[],
    tests_pool[], tests_memory[];

#endif
