/* kv_basis.h: the coordinates that one KV head's vectors are stored in: an invertible map T, taken
 * once per vector and never per cached token.
 *
 * With x' = T x stored, q . x = (T^-T q) . x': a query goes into the keys' basis by the dual map,
 * and an attention output over values in a basis is mapped back once by T^-1. Knows no bits.
 * Called by kv_attend.c; made by kv_plan.c.
 */
#ifndef KVQ_KV_BASIS_H
#define KVQ_KV_BASIS_H

#include "bytes.h"
#include "kv/kv_ids.h"

struct kvq_isa;

typedef struct kvq_basis {
    kvq_basis_kind kind;
    const uint16_t *order; /* permuted: [d] stored channel c is channel order[c] */
    /* calibrated: matrices column by column, [d][d], y = sum of x[j] * column j. A mean [d] is
     * taken from every vector first: it shifts all scores of a query alike, which changes no
     * softmax, and comes back whole in a weighted mean of values. */
    const float *store;   /* T */
    const float *query;   /* T^-T, of keys */
    const float *restore; /* T^-1, of values */
    const float *mean;
} kvq_basis;

/* Each of n vectors x[n][d] by Hadamard's matrix over the square root of its size. Widths that are
 * no power of two split into equal blocks, each the largest power of two that divides d. */
typedef void kvq_hadamard_fn(float *x, int n, int d);
kvq_hadamard_fn kvq_hadamard_reference;

/* The same by any matrix, given column by column. */
typedef void kvq_multiply_fn(float *x, const float *columns, int n, int d);
kvq_multiply_fn kvq_multiply_reference;

/* n vectors x[n][d] in place, d the padded width of a head; the same to the bit on every
 * instruction set. Queries are those of keys in the basis; what is restored are values. */
void kvq_basis_store(const kvq_basis *basis, const struct kvq_isa *isa, float *x, int n, int d);
void kvq_basis_query(const kvq_basis *basis, const struct kvq_isa *isa, float *x, int n, int d);
void kvq_basis_restore(const kvq_basis *basis, const struct kvq_isa *isa, float *x, int n, int d);

const char *kvq_basis_name(kvq_basis_kind kind);

#endif
