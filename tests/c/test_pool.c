/* test_pool.c: every task runs exactly once, on any number of threads, and results are the same. */
#include <stdatomic.h>
#include <time.h>

#include "cpu.h"
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

enum { MIXED = 96, ROUNDS = 200, STALL_NS = 400000, REST_NS = 1000000 };

/* A chain of jobs, each of which reads all that the one before it wrote. */
typedef struct chain {
    float now[MIXED], next[MIXED];
    int round;
    bool alone;              /* on one thread */
    atomic_int ran, stalled; /* tasks */
} chain;

/* Once in a job a thread is held up for much longer than the job takes, as when the system takes
 * its processor away, unless it is the caller's: the pool then leaves threads out, and calls them
 * again later. The caller's rests now and then, so that others surely come to run tasks. */
static void mix(void *context, int task, int worker) {
    chain *const c = context;
    float sum = 0;
    for (int i = 0; i < MIXED; i++) {
        sum += c->now[i] / (1.0f + (float)((i * 7 + task * 3 + c->round) % 11));
    }
    if (worker > 0 && task == c->round % MIXED) {
        nanosleep(&(struct timespec){.tv_nsec = STALL_NS}, NULL);
        atomic_fetch_add(&c->stalled, 1);
    }
    if (worker == 0 && task == 0 && c->round % 10 == 5 && !c->alone) {
        nanosleep(&(struct timespec){.tv_nsec = REST_NS}, NULL);
    }
    c->next[task] = sum - truncf(sum);
    atomic_fetch_add(&c->ran, 1);
}

/* Returns whether each job ran as many tasks as it has. */
static bool run_chain(chain *c, kvq_pool *pool) {
    *c = (chain){.alone = kvq_pool_threads(pool) == 1};
    for (int i = 0; i < MIXED; i++) c->now[i] = 1.0f / (float)(i + 1);
    for (c->round = 0; c->round < ROUNDS; c->round++) {
        kvq_pool_run(pool, MIXED, mix, c);
        if (atomic_load(&c->ran) != (c->round + 1) * MIXED) return false;
        memcpy(c->now, c->next, sizeof c->now);
    }
    return true;
}

static const char *stalls_change_nothing(void) {
    static chain one, many;
    const int more[] = {2, 2 * kvq_cpu_count() + 1, 61};
    kvq_pool *pool;
    if (kvq_pool_open(&pool, 1, false) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
    const bool all = run_chain(&one, pool);
    kvq_pool_close(pool);
    TEST_CHECK(all && atomic_load(&one.stalled) == 0);
    for (size_t k = 0; k < sizeof more / sizeof *more; k++) {
        if (kvq_pool_open(&pool, more[k], false) != KVQ_OK) return TEST_FAIL("%s", kvq_error());
        const bool ran = run_chain(&many, pool);
        kvq_pool_close(pool);
        if (!ran) {
            return TEST_FAIL("%d threads: %d tasks ran in %d jobs of %d", more[k],
                             atomic_load(&many.ran), many.round + 1, MIXED);
        }
        if (memcmp(one.now, many.now, sizeof one.now) != 0) {
            return TEST_FAIL("%d threads: other results than on one thread", more[k]);
        }
        if (atomic_load(&many.stalled) == 0) {
            return TEST_FAIL("%d threads: none was held up, expected some", more[k]);
        }
    }
    return NULL;
}

const kvq_test tests_pool[] = {
    {"pool: every task runs exactly once", tasks_run_once},
    {"pool: stalls and more threads than processors change no bit of a result",
     stalls_change_nothing},
    {NULL, NULL},
};
