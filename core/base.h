/* base.h: what every file of the core shares: statuses, the error sentence, sizes, memory.
 *
 * Owns the thread-local error sentence (error.c) and nothing else. Leaf: includes no sibling but
 * bytes.h and kvq.h.
 */
#ifndef KVQ_BASE_H
#define KVQ_BASE_H

#include <stdbool.h>

#include "bytes.h"
#include "kvq.h"

_Static_assert(sizeof(size_t) == 8, "sizes are computed in 64 bits");

/* Records one full sentence for kvq_error() on this thread and returns `code`, so that a failure
 * reads `return kvq_fail(KVQ_ERR_FORMAT, "tensor %s: ...", name);`. The sentence is cut at 512
 * bytes. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
kvq_status kvq_fail(kvq_status code, const char *format, ...);

/* Puts the file in front of the recorded sentence, where it does not begin with it. */
void kvq_fail_in(kvq_status status, const char *label);

/* Bytes of a file made fit for an error sentence: printable ASCII, the rest escaped, and not too
 * long. */
typedef struct kvq_shown {
    char text[84];
} kvq_shown;
kvq_shown kvq_show(const void *bytes, size_t n);

/* Products and sums of sizes that come from a file or a user: false when they overflow. */
static inline bool kvq_size_mul(size_t *out, size_t a, size_t b) {
    if (b != 0 && a > SIZE_MAX / b) return false;
    *out = a * b;
    return true;
}

static inline bool kvq_size_add(size_t *out, size_t a, size_t b) {
    if (a > SIZE_MAX - b) return false;
    *out = a + b;
    return true;
}

#define KVQ_LOG2_E 1.44269504f /* log2(e) */

#define KVQ_ALIGN 64 /* bytes: a cache line, and the widest vector of any instruction set */

/* Zeroed memory on a KVQ_ALIGN boundary; NULL when there is none. Every allocation of the core goes
 * through here, so that kvq_alloc_calls (kvq.h) counts them all. */
void *kvq_alloc(size_t bytes);
void kvq_free(void *p); /* takes NULL */

/* Parts laid out one after the other in one piece of memory. The same function lays out twice: with
 * base NULL it only counts the bytes, with memory of that size it hands out the parts. */
typedef struct kvq_arena {
    uint8_t *base;
    size_t used;
} kvq_arena;

static inline void *kvq_arena_take(kvq_arena *arena, size_t bytes) {
    uint8_t *const p = arena->base ? arena->base + arena->used : NULL;
    arena->used += kvq_round_up(bytes, KVQ_ALIGN);
    return p;
}

#endif
