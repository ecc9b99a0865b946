/* test_pool.c: every task runs exactly once, on any number of threads. */
#include <stdatomic.h>

#include "pool.h"
#include "test.h"

enum {
    MOST = 3000,
#if defined(__linux__)
    PINS = 1 /* threads to processors */
#else
    PINS = 0
#endif
};

static atomic_int runs[MOST];
static atomic_int bad_workers;

static void count_run(void *context, int task, int worker) {
    atomic_fetch_add(&runs[task], 1);
    if (worker < 0 || worker >= kvq_pool_threads(context)) atomic_fetch_add(&bad_workers, 1);
}

static const char *tasks_run_once(void) {
    static const int threads[] = {1, 2, 3, 8};
    for (int k = 0; k < 8; k++) {
        kvq_pool *pool;
        const bool pin = PINS && k >= 4;
        if (kvq_pool_open(&pool, threads[k % 4], pin) != KVQ_OK)
            return TEST_FAIL("%s", kvq_error());
        for (int job = 0; job < 1000; job++) {
            const int n = job % 50 == 49 ? MOST : job % 17;
            for (int i = 0; i < MOST; i++) atomic_store(&runs[i], 0);
            kvq_pool_run(pool, n, count_run, pool);
            for (int i = 0; i < MOST; i++) {
                if (atomic_load(&runs[i]) != (i < n)) {
                    return TEST_FAIL("%d threads, job %d: task %d of %d ran %d times",
                                     threads[k % 4], job, i, n, atomic_load(&runs[i]));
                }
            }
        }
        kvq_pool_close(pool);
    }
    TEST_CHECK(atomic_load(&bad_workers) == 0);
    return NULL;
}

const kvq_test tests_pool[] = {
    {"pool: every task runs exactly once", tasks_run_once},
    {NULL, NULL},
};
