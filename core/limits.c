/* limits.c: what the machine can do at most: reading memory, multiplying integers. */
#include "clock.h"
#include "cpu.h"
#include "isa/isa.h"
#include "pool.h"

enum {
    LEAST_RUNS = 5,
    CHUNK = 1 << 20,     /* bytes per task */
    PEAK_TASKS = 64,     /* many, so that a thread that comes late does less */
    PEAK_ROUNDS = 10000, /* per task: less than 0.1 ms */
};
static const uint64_t measured_ns = 300000000; /* per limit, if LEAST_RUNS do not take longer */

/* What the tasks of a measurement share; `seen` keeps results from being optimized away. */
typedef struct work {
    const uint64_t *words;
    uint64_t (*peak)(uint64_t rounds);
    volatile uint64_t seen;
} work;

static void read_chunk(void *context, int task, int worker) {
    enum { WORDS = CHUNK / sizeof(uint64_t), SUMS = 8 };
    work *const w = context;
    const uint64_t *const p = w->words + (size_t)task * WORDS;
    uint64_t sum[SUMS] = {0}, all = 0;
    (void)worker;
    for (size_t i = 0; i < WORDS; i += SUMS) {
        for (size_t j = 0; j < SUMS; j++) sum[j] += p[i + j];
    }
    for (size_t j = 0; j < SUMS; j++) all += sum[j];
    w->seen = all;
}

/* Untouched pages would all be the same page of zeros. */
static void write_chunk(void *context, int task, int worker) {
    uint8_t *const bytes = context;
    (void)worker;
    memset(bytes + (size_t)task * CHUNK, 1, CHUNK);
}

static void compute(void *context, int task, int worker) {
    work *const w = context;
    (void)task;
    (void)worker;
    w->seen = w->peak(PEAK_ROUNDS);
}

/* Units per second, the best of several runs: what disturbs a run only makes it slower. */
static double most_per_second(kvq_pool *pool, int n_tasks, kvq_task_fn *run, work *w,
                              double units) {
    uint64_t best = UINT64_MAX, spent = 0;
    for (int i = 0; i < LEAST_RUNS || spent < measured_ns; i++) {
        const uint64_t start = kvq_now_ns();
        kvq_pool_run(pool, n_tasks, run, w);
        const uint64_t taken = kvq_now_ns() - start + 1; /* never 0 */
        if (taken < best) best = taken;
        spent += taken;
    }
    return units * 1e9 / (double)best;
}

static double peak_per_second(kvq_pool *pool, work *w, uint64_t (*peak)(uint64_t rounds)) {
    if (!peak) return 0;
    w->peak = peak;
    return most_per_second(pool, PEAK_TASKS, compute, w, (double)PEAK_TASKS * peak(PEAK_ROUNDS));
}

static kvq_status check_buffer(uint64_t n_bytes) {
    const uint64_t least = CHUNK, most = (uint64_t)1 << 36;
    if (n_bytes < least || n_bytes > most) {
        return kvq_fail(
            KVQ_ERR_ARGUMENT, "A buffer of %llu bytes was to be read, expected %llu to %llu.",
            (unsigned long long)n_bytes, (unsigned long long)least, (unsigned long long)most);
    }
    if (n_bytes > kvq_memory_available()) {
        return kvq_fail(KVQ_ERR_MEMORY,
                        "A buffer of %.2f GB was to be read, but only %.2f GB of memory are "
                        "available.",
                        (double)n_bytes / 1e9, (double)kvq_memory_available() / 1e9);
    }
    return KVQ_OK;
}

kvq_status kvq_machine_measure(kvq_machine_limits *out, int32_t n_threads, uint64_t n_bytes) {
    const kvq_isa *isa;
    kvq_pool *pool = NULL;
    if (n_threads == 0) n_threads = kvq_cpu_count();
    if (n_bytes == 0) n_bytes = (uint64_t)512 << 20;
    if (n_threads < 1 || n_threads > 1024) {
        return kvq_fail(KVQ_ERR_ARGUMENT, "n_threads is %d, expected 1 to 1024.", n_threads);
    }
    if (n_threads > kvq_cpu_count()) n_threads = kvq_cpu_count(); /* as of sessions */
    kvq_status status = check_buffer(n_bytes);
    if (status == KVQ_OK) status = kvq_isa_choose(&isa);
    if (status == KVQ_OK) status = kvq_pool_open(&pool, n_threads, false);
    if (status != KVQ_OK) return status;
    const int n_chunks = (int)(n_bytes / CHUNK);
    uint8_t *const buffer = kvq_alloc((size_t)n_chunks * CHUNK);
    if (buffer) {
        work w = {.words = (const uint64_t *)(const void *)buffer};
        kvq_pool_run(pool, n_chunks, write_chunk, buffer);
        *out = (kvq_machine_limits){.isa = isa->name, .n_threads = n_threads};
        out->read_bytes = most_per_second(pool, n_chunks, read_chunk, &w, (double)n_chunks * CHUNK);
        out->int8_operations = peak_per_second(pool, &w, isa->peak_int8);
        out->int16_operations = peak_per_second(pool, &w, isa->peak_int16);
    } else {
        status = kvq_fail(KVQ_ERR_MEMORY, "There is no memory for a buffer of %.2f GB.",
                          (double)n_bytes / 1e9);
    }
    kvq_free(buffer);
    kvq_pool_close(pool);
    return status;
}
