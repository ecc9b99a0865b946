/* isa.h: what an instruction set gives the rest of the core: one const struct of kernels each.
 *
 * A NULL entry is that of the set `inherits` names, and in the end the reference (the kvq_run_*
 * functions below choose); only products that no scheme uses come to the reference. The best
 * supported set serves a session; the environment variable KVQ_ISA=ref|avx2|avx512|neon forces one
 * when the session is opened, and naming one that this build or processor lacks is an error.
 */
#ifndef KVQ_ISA_H
#define KVQ_ISA_H

#include "base.h"
#include "kv/kv_basis.h"
#include "kv/kv_codec.h"
#include "kv/kv_wave.h"
#include "weights.h"

typedef struct kvq_isa {
    const char *name;
    bool (*supported)(void);        /* by this processor, and by the system that runs it */
    const struct kvq_isa *inherits; /* whose kernels of the KV cache serve where there are none */
    /* Fills q, scale and sums of tokens first .. first + n - 1 from x; NULL where products read x.
     */
    void (*quantize)(kvq_activations *a, size_t first, size_t n);
    kvq_matmul_fn *matmul[KVQ_WEIGHT_KINDS];
    kvq_score_fn *score[KVQ_CODECS];
    kvq_accum_fn *accum[KVQ_CODECS];
    kvq_score_rows_fn *score_rows;
    kvq_accum_rows_fn *accum_rows;
    kvq_add_waves_fn *add_waves;
    kvq_hadamard_fn *hadamard;
    kvq_multiply_fn *multiply;
    /* A step of an online softmax over the scores s[n_blocks][n][KVQ_BLOCK] of n queries: raises
     * largest[i] to the largest score of query i if that is larger, replaces each score by
     * 2^(score - largest[i]), sum[i] being their sum. A score of -inf gives exactly 0, also where
     * all are -inf; one that is no number makes the sum none. */
    void (*softmax)(float *s, float *largest, float *sum, int n, int n_blocks);
    /* gate[i] = silu(gate[i]) * up[i], silu(x) = x / (1 + exp(-x)) */
    void (*swiglu)(float *gate, const float *up, size_t n);
    /* Multiply and sum integers as fast as can be, so many rounds; return how many operations that
     * was, two for each product. NULL: there is no such measure. */
    uint64_t (*peak_int8)(uint64_t rounds);
    uint64_t (*peak_int16)(uint64_t rounds);
} kvq_isa;

extern const kvq_isa kvq_isa_ref; /* only softmax and swiglu, whose definitions it is */
extern const kvq_isa kvq_isa_avx2;
extern const kvq_isa kvq_isa_avx512;
extern const kvq_isa kvq_isa_neon;

/* The one that sessions use; KVQ_ERR_ARGUMENT if KVQ_ISA names none. */
kvq_status kvq_isa_choose(const kvq_isa **out);

static inline void kvq_run_score(const kvq_isa *isa, kvq_codec_id id, float *s,
                                 const kvq_query *query, const kvq_blocks *blocks,
                                 const kvq_kv_shape *sh) {
    while (!isa->score[id] && isa->inherits) isa = isa->inherits;
    if (isa->score[id])
        isa->score[id](s, query, blocks, sh);
    else
        kvq_score_reference(id, s, query, blocks, sh);
}

static inline void kvq_run_accum(const kvq_isa *isa, kvq_codec_id id, float *o,
                                 const kvq_weights *weights, const kvq_blocks *blocks,
                                 const kvq_kv_shape *sh) {
    while (!isa->accum[id] && isa->inherits) isa = isa->inherits;
    if (isa->accum[id])
        isa->accum[id](o, weights, blocks, sh);
    else
        kvq_accum_reference(id, o, weights, blocks, sh);
}

static inline void kvq_run_score_rows(const kvq_isa *isa, float *s, const kvq_query *query,
                                      const uint16_t *rows, int n_rows, int d) {
    while (!isa->score_rows && isa->inherits) isa = isa->inherits;
    (isa->score_rows ? isa->score_rows : kvq_score_rows_reference)(s, query, rows, n_rows, d);
}

static inline void kvq_run_accum_rows(const kvq_isa *isa, float *o, const float *p, int n,
                                      const uint16_t *rows, int n_rows, int d) {
    while (!isa->accum_rows && isa->inherits) isa = isa->inherits;
    (isa->accum_rows ? isa->accum_rows : kvq_accum_rows_reference)(o, p, n, rows, n_rows, d);
}

static inline void kvq_run_add_waves(const kvq_isa *isa, float *s, const float *factor, int n,
                                     const float *const *wave, int n_waves) {
    while (!isa->add_waves && isa->inherits) isa = isa->inherits;
    (isa->add_waves ? isa->add_waves : kvq_add_waves_reference)(s, factor, n, wave, n_waves);
}

static inline void kvq_run_hadamard(const kvq_isa *isa, float *x, int n, int d) {
    while (!isa->hadamard && isa->inherits) isa = isa->inherits;
    (isa->hadamard ? isa->hadamard : kvq_hadamard_reference)(x, n, d);
}

static inline void kvq_run_multiply(const kvq_isa *isa, float *x, const float *columns, int n,
                                    int d) {
    while (!isa->multiply && isa->inherits) isa = isa->inherits;
    (isa->multiply ? isa->multiply : kvq_multiply_reference)(x, columns, n, d);
}

static inline void kvq_run_matmul(const kvq_isa *isa, kvq_weight_kind kind, float *y,
                                  size_t y_stride, const uint8_t *w, size_t n_rows,
                                  const uint8_t *ahead, const kvq_activations *x) {
    if (isa->matmul[kind])
        isa->matmul[kind](y, y_stride, w, n_rows, ahead, x);
    else
        kvq_matmul_reference(kind, y, y_stride, w, n_rows, x);
}

#endif
