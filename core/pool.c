/* pool.c: threads that spin briefly for the next job, then sleep.
 *
 * A step is some hundred jobs of a few dozen microseconds, so a worker that slept at once would
 * spend the step waking up; one that spun on would burn a core between steps. Both sides therefore
 * watch the state for SPINS turns (tens of microseconds) before they wait on a condition.
 *
 * Each thread has a share of a job's tasks, neighbours, and takes them in order, so that it can
 * fetch what comes next; when they are done, it takes the last ones of others. One 64-bit word says
 * all there is to know about taking a task of a share: the job's number (24 bits), the end of the
 * share (20), its next task (20). A thread takes one by changing the very word that it read, so a
 * late one can take nothing of a job that it did not read; and a job's function and context change
 * only after its last task is done.
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

/* One thread; the caller's is the first. */
typedef struct worker {
    _Alignas(KVQ_ALIGN) atomic_uint_fast64_t share; /* job << 40 | end << 20 | next task */
    kvq_pool *pool;
    int number;
    pthread_t thread;
} worker;

struct kvq_pool {
    _Alignas(KVQ_ALIGN) atomic_uint job;       /* its number, 24 bits: what workers wait for */
    _Alignas(KVQ_ALIGN) atomic_int unfinished; /* tasks of the job */
    /* Written by the caller before the shares. */
    _Alignas(KVQ_ALIGN) kvq_task_fn *run;
    void *context;

    pthread_mutex_t lock; /* for sleeping only */
    pthread_cond_t job_posted, job_done;
    atomic_bool closing;
    int n_threads, n_started;
    worker workers[];
};

enum { MOST_TASKS = (1 << 20) - 1, JOBS = 1 << 24 };

static uint64_t share_of(uint32_t job, uint32_t next, uint32_t end) {
    return (uint64_t)job << 40 | (uint64_t)end << 20 | next;
}
static uint32_t end_of(uint64_t share) { return (uint32_t)(share >> 20) & MOST_TASKS; }
static uint32_t next_of(uint64_t share) { return (uint32_t)share & MOST_TASKS; }

/* Takes the next task of a share, or its last one; false if none is left. */
static bool take(worker *from, bool last, uint32_t *task) {
    uint64_t share = atomic_load(&from->share);
    while (next_of(share) < end_of(share)) {
        *task = last ? end_of(share) - 1 : next_of(share);
        const uint64_t left = last ? share - (1u << 20) : share + 1;
        if (atomic_compare_exchange_weak(&from->share, &share, left)) return true;
    }
    return false;
}

/* Runs tasks until there are none left. */
static void work(kvq_pool *pool, int number) {
    for (int i = 0; i < pool->n_threads; i++) {
        worker *const from = &pool->workers[(number + i) % pool->n_threads];
        for (uint32_t task; take(from, i > 0, &task);) {
            pool->run(pool->context, (int)task, number);
            if (atomic_fetch_sub(&pool->unfinished, 1) == 1) {
                pthread_mutex_lock(&pool->lock);
                pthread_cond_signal(&pool->job_done);
                pthread_mutex_unlock(&pool->lock);
            }
        }
    }
}

static void *worker_main(void *argument) {
    const worker *const self = argument;
    kvq_pool *const pool = self->pool;
    uint32_t seen = 0;
    for (;;) {
        uint32_t job = atomic_load(&pool->job);
        for (int i = 0; i < SPINS && job == seen; i++) {
            cpu_relax();
            job = atomic_load_explicit(&pool->job, memory_order_relaxed);
        }
        if (job == seen) {
            pthread_mutex_lock(&pool->lock);
            while ((job = atomic_load(&pool->job)) == seen && !atomic_load(&pool->closing)) {
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
    const uint32_t job = (atomic_load(&pool->job) + 1) % JOBS;
    const uint64_t n = (uint64_t)n_tasks, n_threads = (uint64_t)pool->n_threads;
    pool->run = run;
    pool->context = context;
    atomic_store(&pool->unfinished, n_tasks);
    for (uint64_t i = 0; i < n_threads; i++) {
        const uint32_t first = (uint32_t)(i * n / n_threads);
        const uint32_t end = (uint32_t)((i + 1) * n / n_threads);
        atomic_store(&pool->workers[i].share, share_of(job, first, end));
    }
    pthread_mutex_lock(&pool->lock); /* or a worker about to sleep could miss the job */
    atomic_store(&pool->job, job);
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
        w->pool = pool;
        w->number = pool->n_started;
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
