/* defects_args.h: the toy kernel of defects.cu as its test sees it. */
#ifndef CUSIM_DEFECTS_ARGS_H
#define CUSIM_DEFECTS_ARGS_H

#define KVQ_TOY_D 64    /* width of a head */
#define KVQ_TOY_TILE 32 /* tokens that a block holds at once */

/* Attention of one query over a part of the context for each block. */
typedef struct kvq_toy_args {
    const float *query;         /* [64] */
    const float *keys, *values; /* [n][64], on multiples of 16 bytes */
    float *sums;                /* [blocks][64], each weighted by exp(score - most) */
    float *most, *weight;       /* [blocks] */
    int n, n_part;              /* tokens; of a block, a multiple of 32 */
} kvq_toy_args;

#endif
