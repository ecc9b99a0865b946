/* test_main.c: runs every table of tests on the instruction set that KVQ_ISA names, or the best; an
 * argument selects those whose name contains it. */
#include <stdbool.h>

#include "kvq.h"
#include "test.h"

char test_sentence[512];

/* Whether KVQ_ISA names an instruction set of ours that is not available here. */
static bool lacks_wanted_isa(void) {
    static const char *const optional[] = {"avx2", "avx512", "neon"};
    const char *const wanted = getenv("KVQ_ISA"), *name;
    for (size_t i = 0; i < sizeof optional / sizeof *optional; i++) {
        if (wanted && strcmp(wanted, optional[i]) == 0) return kvq_isa_selected(&name) != KVQ_OK;
    }
    return false;
}

int main(int argc, char **argv) {
    const kvq_test *const tables[] = {tests_gguf,    tests_weights, tests_kv_codec, tests_kv,
                                      tests_kv_plan, tests_pool,    tests_memory};
    const char *isa = "none";
    int passed = 0, failed = 0;
    if (lacks_wanted_isa()) {
        printf("skipped: %s\n", kvq_error());
        return 0;
    }
    if (kvq_isa_selected(&isa) != KVQ_OK) printf("%s\n", kvq_error());
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        for (const kvq_test *test = tables[i]; test->name; test++) {
            if (argc > 1 && !strstr(test->name, argv[1])) continue;
            const char *const broken = test->run();
            if (broken) printf("FAILED %s\n       %s\n", test->name, broken);
            *(broken ? &failed : &passed) += 1;
        }
    }
    printf("%s: %d passed, %d failed\n", isa, passed, failed);
    fflush(stdout); /* before a leak checker ends the process */
    return failed != 0;
}
