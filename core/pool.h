/* pool.h: the threads of one session. They run numbered tasks; each thread begins with neighbours,
 * and helps the others when it is done. Which thread runs which task never changes a result: a task
 * writes only what belongs to its number, or, where the last of several puts their results together
 * (kv_attend.c), does so in an order that is fixed.
 */
#ifndef KVQ_POOL_H
#define KVQ_POOL_H

#include "base.h"

typedef struct kvq_pool kvq_pool;
typedef void kvq_task_fn(void *context, int task, int worker); /* worker: 0 .. n_threads - 1 */

/* The caller's thread is one of n_threads. pin: each of the others stays on one processor;
 * KVQ_ERR_UNSUPPORTED where they cannot. */
kvq_status kvq_pool_open(kvq_pool **out, int n_threads, bool pin);
void kvq_pool_close(kvq_pool *pool); /* takes NULL */
int kvq_pool_threads(const kvq_pool *pool);

/* Runs tasks 0 .. n_tasks - 1 and returns when all are done. One caller at a time.
 * (A job of 2^20 tasks or more runs on the caller's thread alone.) */
void kvq_pool_run(kvq_pool *pool, int n_tasks, kvq_task_fn *run, void *context);

#endif
