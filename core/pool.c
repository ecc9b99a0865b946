/* pool.c: threads that spin briefly for the next job, then sleep.
 *
 * A step is some hundred jobs of a few dozen microseconds, so a worker that slept at once would
 * spend the step waking up; one that spun on would burn a core between steps. Both sides therefore
 * watch the state for SPINS turns (tens of microseconds) before they wait on a condition. Now and
 * then they offer their processor to others: where there are fewer of them than threads, the very
 * thread that is waited for may need it.
 *
 * Each thread has a share of a job's tasks, neighbours, and takes them in order, so that it can
 * fetch what comes next; when they are done, it takes the last ones of others. One 64-bit word says
 * all there is to know about taking a task of a share: the job's number (24 bits), the end of the
 * share (20), its next task (20). A thread takes one by changing the very word that it read, so a
 * late one can take nothing of a job that it did not read; and a job's function and context change
 * only after its last task is done.
 *
 * Where other programs leave a worker no processor, the system may take it off in the middle of a
 * task, for milliseconds in which all others wait. When that happens, some threads are left out for
 * a while, twice as long each time that it happens again. (A page fault that waits for the disk
 * looks alike; nothing is lost by it but a few milliseconds of a thread.)
 */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "clock.h"
#include "cpu.h"

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
    SPINS_BETWEEN_OFFERS = 256,
    STACK_BYTES = 2 << 20, /* the reference decodes a block on the stack */
    MOST_IN_JOB = (1 << 20) - 1,
    JOBS = 1 << 24,
    STALL_NS = 100000,        /* a wait of so many nanoseconds, and */
    STALL_RATIO = 2,          /* so many times what came before it, is a stall */
    LEAST_PAUSE_NS = 8000000, /* of threads that are left out */
    MOST_PAUSE_NS = 256000000,
};

/* The i-th turn of waiting for another thread. */
static void spin(int i) {
    if ((i + 1) % SPINS_BETWEEN_OFFERS == 0) sched_yield();
    cpu_relax();
}

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

    atomic_int active; /* threads that take part: those of the lowest numbers */
    /* When all were called last, when they may be again, and how long the next ones are left out:
     * the caller's. */
    uint64_t called_at, call_at, pause;

    _Alignas(KVQ_ALIGN) pthread_mutex_t lock; /* for sleeping only */
    pthread_cond_t job_posted, job_done, called;
    atomic_bool closing;
    bool pin;
    int n_pinned; /* workers that have been, or -1 if one cannot be; under the lock */
    int n_threads, n_started;
    worker workers[];
};

static uint64_t share_of(uint32_t job, uint32_t next, uint32_t end) {
    return (uint64_t)job << 40 | (uint64_t)end << 20 | next;
}
static uint32_t end_of(uint64_t share) { return (uint32_t)(share >> 20) & MOST_IN_JOB; }
static uint32_t next_of(uint64_t share) { return (uint32_t)share & MOST_IN_JOB; }

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

static bool is_active(kvq_pool *pool, int number) {
    return number < atomic_load_explicit(&pool->active, memory_order_relaxed);
}

/* Runs tasks until there are none left. */
static void work(kvq_pool *pool, int number) {
    const int n = atomic_load(&pool->active);
    for (int i = 0; i < n; i++) {
        worker *const from = &pool->workers[(number + i) % n];
        for (uint32_t task; is_active(pool, number) && take(from, i > 0, &task);) {
            pool->run(pool->context, (int)task, number);
            if (atomic_fetch_sub(&pool->unfinished, 1) == 1 && number > 0) { /* 0 waits for it */
                pthread_mutex_lock(&pool->lock);
                pthread_cond_signal(&pool->job_done);
                pthread_mutex_unlock(&pool->lock);
            }
        }
    }
}

/* Sleeps until there is a job for this thread, or none any more; returns the job's number. */
static uint32_t sleep_until_called(kvq_pool *pool, int number, uint32_t seen) {
    uint32_t job;
    pthread_mutex_lock(&pool->lock);
    while (!atomic_load(&pool->closing)) {
        const bool active = is_active(pool, number);
        if (active && atomic_load(&pool->job) != seen) break;
        pthread_cond_wait(active ? &pool->job_posted : &pool->called, &pool->lock);
    }
    job = atomic_load(&pool->job);
    pthread_mutex_unlock(&pool->lock);
    return job;
}

static void pin_worker(kvq_pool *pool, int number) {
    const bool pinned = kvq_cpu_pin(number);
    pthread_mutex_lock(&pool->lock);
    pool->n_pinned = pinned && pool->n_pinned >= 0 ? pool->n_pinned + 1 : -1;
    pthread_cond_signal(&pool->job_done);
    pthread_mutex_unlock(&pool->lock);
}

/* Waits until all workers are pinned, or one cannot be. */
static kvq_status wait_for_pins(kvq_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    while (pool->n_pinned >= 0 && pool->n_pinned < pool->n_threads - 1) {
        pthread_cond_wait(&pool->job_done, &pool->lock);
    }
    const bool all = pool->n_pinned >= 0;
    pthread_mutex_unlock(&pool->lock);
    if (all) return KVQ_OK;
    return kvq_fail(KVQ_ERR_UNSUPPORTED, "Threads cannot be pinned to processors on this system.");
}

static void *worker_main(void *argument) {
    const worker *const self = argument;
    kvq_pool *const pool = self->pool;
    if (pool->pin) pin_worker(pool, self->number);
    uint32_t seen = 0;
    for (;;) {
        uint32_t job = atomic_load(&pool->job);
        for (int i = 0; i < SPINS && job == seen && is_active(pool, self->number); i++) {
            spin(i);
            job = atomic_load_explicit(&pool->job, memory_order_acquire);
        }
        if (job == seen || !is_active(pool, self->number)) {
            job = sleep_until_called(pool, self->number, seen);
        }
        if (atomic_load(&pool->closing)) return NULL;
        seen = job;
        work(pool, self->number);
    }
}

/* Before a job: calls those who have been left out for long enough. */
static void call_all(kvq_pool *pool, uint64_t now) {
    if (atomic_load(&pool->active) == pool->n_threads || now < pool->call_at) return;
    pthread_mutex_lock(&pool->lock); /* or a worker about to sleep could miss it */
    atomic_store(&pool->active, pool->n_threads);
    pthread_cond_broadcast(&pool->called);
    pthread_mutex_unlock(&pool->lock);
    pool->called_at = now;
}

/* After a stall: an eighth of those who take part. */
static void leave_out(kvq_pool *pool, uint64_t now) {
    const int active = atomic_load(&pool->active), fewer = active / 8 > 0 ? active / 8 : 1;
    const bool again = now - pool->called_at < MOST_PAUSE_NS;
    const uint64_t longer = 2 * pool->pause < MOST_PAUSE_NS ? 2 * pool->pause : MOST_PAUSE_NS;
    if (active == 1) return;
    pool->pause = again ? longer : LEAST_PAUSE_NS;
    pool->call_at = now + pool->pause;
    atomic_store(&pool->active, active - fewer);
}

/* Waits for tasks that others have taken; returns for how many nanoseconds, 0 if they were done
 * soon. */
static uint64_t wait_for_others(kvq_pool *pool) {
    for (int i = 0; i < SPINS && atomic_load(&pool->unfinished) > 0; i++) spin(i);
    if (atomic_load(&pool->unfinished) == 0) return 0;
    const uint64_t slept = kvq_now_ns();
    pthread_mutex_lock(&pool->lock);
    while (atomic_load(&pool->unfinished) > 0) pthread_cond_wait(&pool->job_done, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
    return kvq_now_ns() - slept;
}

void kvq_pool_run(kvq_pool *pool, int n_tasks, kvq_task_fn *run, void *context) {
    if (n_tasks <= 0) return;
    if (n_tasks == 1 || pool->n_threads == 1 || n_tasks > MOST_IN_JOB) {
        for (int task = 0; task < n_tasks; task++) run(context, task, 0);
        return;
    }
    const uint64_t begun = kvq_now_ns();
    call_all(pool, begun);
    const uint32_t job = (atomic_load(&pool->job) + 1) % JOBS;
    const uint64_t n = (uint64_t)n_tasks, active = (uint64_t)atomic_load(&pool->active);
    pool->run = run;
    pool->context = context;
    atomic_store(&pool->unfinished, n_tasks);
    for (uint64_t i = 0; i < active; i++) {
        const uint32_t first = (uint32_t)(i * n / active), end = (uint32_t)((i + 1) * n / active);
        atomic_store(&pool->workers[i].share, share_of(job, first, end));
    }
    pthread_mutex_lock(&pool->lock); /* or a worker about to sleep could miss the job */
    atomic_store(&pool->job, job);
    pthread_cond_broadcast(&pool->job_posted);
    pthread_mutex_unlock(&pool->lock);
    work(pool, 0);
    const uint64_t waited = wait_for_others(pool);
    /* With few tasks a thread may have had none, and waited for good reason. */
    if (waited > STALL_NS && n >= 2 * active) {
        const uint64_t end = kvq_now_ns();
        if (waited > STALL_RATIO * (end - waited - begun)) leave_out(pool, end);
    }
}

int kvq_pool_threads(const kvq_pool *pool) { return pool->n_threads; }

kvq_status kvq_pool_open(kvq_pool **out, int n_threads, bool pin) {
    kvq_pool *const pool = kvq_alloc(sizeof *pool + (size_t)n_threads * sizeof(worker));
    if (!pool) return kvq_fail(KVQ_ERR_MEMORY, "There is no memory for %d threads.", n_threads);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->job_posted, NULL);
    pthread_cond_init(&pool->job_done, NULL);
    pthread_cond_init(&pool->called, NULL);
    pool->n_threads = n_threads;
    pool->pin = pin;
    pool->pause = LEAST_PAUSE_NS;
    atomic_store(&pool->active, n_threads);
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
    if (pin && wait_for_pins(pool) != KVQ_OK) {
        kvq_pool_close(pool);
        return KVQ_ERR_UNSUPPORTED;
    }
    *out = pool;
    return KVQ_OK;
}

void kvq_pool_close(kvq_pool *pool) {
    if (!pool) return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->closing, true);
    pthread_cond_broadcast(&pool->job_posted);
    pthread_cond_broadcast(&pool->called);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 1; i < pool->n_started; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->called);
    pthread_cond_destroy(&pool->job_done);
    pthread_cond_destroy(&pool->job_posted);
    pthread_mutex_destroy(&pool->lock);
    kvq_free(pool);
}
