/* clock.h: how long the stages of an evaluation take.
 *
 * Only the thread that evaluates looks at the clock, at the ends of stages: a few hundred times per
 * pass, 20 to 30 ns each. A clock that does not run costs the test of a flag. Leaf. Used by
 * forward.c and kv_attend.c; session.c starts it and reads it.
 */
#ifndef KVQ_CLOCK_H
#define KVQ_CLOCK_H

#include <time.h>

#include "base.h"

typedef enum kvq_stage {
    KVQ_STAGE_WEIGHTS,   /* products with weights */
    KVQ_STAGE_ATTENTION, /* scores, softmax, sums of values, bases of the cache */
    KVQ_STAGE_APPEND,    /* new rows into the cache; blocks sealed */
    KVQ_STAGE_OTHER,     /* embedding, norms, RoPE, activations */
    KVQ_STAGES
} kvq_stage;

typedef struct kvq_clock {
    bool runs;
    uint64_t last; /* when the stage before this one ended */
    uint64_t ns[KVQ_STAGES];
} kvq_clock;

static inline uint64_t kvq_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* A pass begins. */
static inline void kvq_clock_begin(kvq_clock *clock) {
    if (clock->runs) clock->last = kvq_now_ns();
}

/* What was done since the last call was this stage. NULL: nobody counts. */
static inline void kvq_clock_end(kvq_clock *clock, kvq_stage stage) {
    if (!clock || !clock->runs) return;
    const uint64_t now = kvq_now_ns();
    clock->ns[stage] += now - clock->last;
    clock->last = now;
}

#endif
