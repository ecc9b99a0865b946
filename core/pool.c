/* pool.c: threads that spin briefly for the next job, then sleep.
 *
 * A step is some hundred jobs of a few dozen microseconds, so a worker that slept at once would
 * spend the step waking up; one that spun on would burn a core between steps. Both sides therefore
 * watch the state for SPINS turns (tens of microseconds) before they wait on a condition.
 *
 * One 64-bit word says all there is to know about taking a task: the job's number (24 bits), how
 * many tasks it has (20), the next one (20). A thread takes a task by adding 1 to the very word it
 * read, so a late one can take nothing of a job that it did not read; and a job's function and
 * context change only after its last task is done.
 */
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define cpu_relax() _mm_pause()
#elif defined(__aarch64__)
#define cpu_relax() __asm__ volatile("yield")
#else
#define cpu_relax() ((void)0)
#endif

enum {
    SPINS = 4000,
    STACK_BYTES = 2
        << 20, /* the reference decodes a block on the stack; some systems give 128 KiB */
};

typedef struct worker {
    kvq_pool *pool;
    int number;
    pthread_t thread;
} worker;

struct kvq_pool {
    _Alignas(KVQ_ALIGN) atomic_uint_fast64_t next; /* job << 40 | tasks << 20 | next task */
    _Alignas(KVQ_ALIGN) atomic_int unfinished;     /* tasks of the job */
    /* Written by the caller before `next` announces the job. */
    _Alignas(KVQ_ALIGN) kvq_task_fn *run;
    void *context;

    pthread_mutex_t lock; /* for sleeping only */
    pthread_cond_t job_posted, job_done;
    atomic_bool closing;
    int n_threads, n_started;
    worker workers[];
};

enum { MOST_TASKS = (1 << 20) - 1 };

static uint32_t job_of(uint64_t next) { return (uint32_t)(next >> 40); }
static uint32_t tasks_of(uint64_t next) { return (uint32_t)(next >> 20) & MOST_TASKS; }
static uint32_t task_of(uint64_t next) { return (uint32_t)next & MOST_TASKS; }

/* Takes tasks until there are none left. */
static void work(kvq_pool *pool, int number) {
    uint64_t next = atomic_load(&pool->next);
    while (task_of(next) < tasks_of(next)) {
        if (!atomic_compare_exchange_weak(&pool->next, &next, next + 1)) continue;
        pool->run(pool->context, (int)task_of(next), number);
        if (atomic_fetch_sub(&pool->unfinished, 1) == 1) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->job_done);
            pthread_mutex_unlock(&pool->lock);
        }
        next = atomic_load(&pool->next);
    }
}

static void *worker_main(void *argument) {
    const worker *const self = argument;
    kvq_pool *const pool = self->pool;
    uint32_t seen = 0;
    for (;;) {
        uint32_t job = job_of(atomic_load(&pool->next));
        for (int i = 0; i < SPINS && job == seen; i++) {
            cpu_relax();
            job = job_of(atomic_load_explicit(&pool->next, memory_order_relaxed));
        }
        if (job == seen) {
            pthread_mutex_lock(&pool->lock);
            while ((job = job_of(atomic_load(&pool->next))) == seen &&
                   !atomic_load(&pool->closing)) {
                pthread_cond_wait(&pool->job_posted, &pool->lock);
            }
            pthread_mutex_unlock(&pool->lock);
        }
        if (atomic_load(&pool->closing)) return NULL;
        seen = job;
        work(pool, self->number);
    }
}

void kvq_pool_run(kvq_pool *pool, int n_tasks, kvq_task_fn *run, void *context) {
    if (n_tasks <= 0) return;
    if (n_tasks == 1 || pool->n_threads == 1 || n_tasks > MOST_TASKS) {
        for (int task = 0; task < n_tasks; task++) run(context, task, 0);
        return;
    }
    const uint64_t job = (job_of(atomic_load(&pool->next)) + 1) & 0xffffffu;
    pool->run = run;
    pool->context = context;
    atomic_store(&pool->unfinished, n_tasks);
    pthread_mutex_lock(&pool->lock); /* or a worker about to sleep could miss the job */
    atomic_store(&pool->next, job << 40 | (uint64_t)n_tasks << 20);
    pthread_cond_broadcast(&pool->job_posted);
    pthread_mutex_unlock(&pool->lock);
    work(pool, 0);
    for (int i = 0; i < SPINS && atomic_load(&pool->unfinished) > 0; i++) cpu_relax();
    if (atomic_load(&pool->unfinished) > 0) {
        pthread_mutex_lock(&pool->lock);
        while (atomic_load(&pool->unfinished) > 0) pthread_cond_wait(&pool->job_done, &pool->lock);
        pthread_mutex_unlock(&pool->lock);
    }
}

int kvq_pool_threads(const kvq_pool *pool) { return pool->n_threads; }

kvq_status kvq_pool_open(kvq_pool **out, int n_threads) {
    kvq_pool *const pool = kvq_alloc(sizeof *pool + (size_t)n_threads * sizeof(worker));
    if (!pool) return kvq_fail(KVQ_ERR_MEMORY, "There is no memory for %d threads.", n_threads);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->job_posted, NULL);
    pthread_cond_init(&pool->job_done, NULL);
    pool->n_threads = n_threads;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    for (pool->n_started = 1; pool->n_started < n_threads; pool->n_started++) {
        worker *const w = &pool->workers[pool->n_started];
        *w = (worker){.pool = pool, .number = pool->n_started};
        if (pthread_create(&w->thread, &attributes, worker_main, w) != 0) {
            kvq_fail(KVQ_ERR_MEMORY, "The system gave only %d of %d threads.", pool->n_started,
                     n_threads);
            pthread_attr_destroy(&attributes);
            kvq_pool_close(pool);
            return KVQ_ERR_MEMORY;
        }
    }
    pthread_attr_destroy(&attributes);
    *out = pool;
    return KVQ_OK;
}

void kvq_pool_close(kvq_pool *pool) {
    if (!pool) return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->closing, true);
    pthread_cond_broadcast(&pool->job_posted);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 1; i < pool->n_started; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->job_done);
    pthread_cond_destroy(&pool->job_posted);
    pthread_mutex_destroy(&pool->lock);
    kvq_free(pool);
}
