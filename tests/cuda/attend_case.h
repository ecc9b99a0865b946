/* attend_case.h: one layer's cache with random contents, as the CPU has it and as kernels see it,
 * and what attention over it gives on the CPU.
 *
 * In C, since the headers of the core are. Every array that a kernel reads is a block of memory of
 * its exact size, so that sanitizers see what lies beyond.
 */
#ifndef ATTEND_CASE_H
#define ATTEND_CASE_H

#include "cuda/kernels/attend_args.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attend_options {
    kvq_codec_id keys, values;
    int d_head, n_heads, group; /* KV heads, query heads for each */
    int sinks, window;
    int held, n; /* tokens in the cache, tokens of the pass */
    int n_waves; /* of keys */
    int chunk_blocks;
    int channel_group; /* channels that share a token's scale; 0: all */
    const int *runs;   /* of mixed keys: channels of 8, 4, 2, 1 bits; NULL: some of each */
} attend_options;

typedef struct attend_case {
    kvq_cuda_cache cache;
    float *q;        /* [n_heads][n_batch * group][d], as kvq_cuda_attend takes them */
    float *expected; /* [n][n_heads * group][d_head] */
    void *owned;
} attend_case;

/* NULL where a codec does not take the width. The caller closes it. */
attend_case *attend_case_open(const attend_options *options);
void attend_case_close(attend_case *c);

#ifdef __cplusplus
}
#endif

#endif
