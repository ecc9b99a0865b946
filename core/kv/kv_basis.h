/* kv_basis.h: the basis that one KV head's vectors are stored in. Both bases here are orthogonal,
 * so a query goes into the keys' basis by the same map and q . k is kept; an attention output over
 * values in a basis is mapped back once. Knows no bits.
 */
#ifndef KVQ_KV_BASIS_H
#define KVQ_KV_BASIS_H

#include "base.h"

typedef struct kvq_basis {
    const char *name;
    void (*into)(float *x,
                 int d); /* in place; d: padded width of a head, a multiple of KVQ_D_UNIT */
    void (*back)(float *x, int d);
} kvq_basis;

extern const kvq_basis kvq_basis_identity, kvq_basis_hadamard;

#endif
