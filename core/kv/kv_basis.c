/* kv_basis.c: the bases by name. */
#include "kv/kv_basis.h"

#include <math.h>

#include "isa/isa.h"

void kvq_hadamard_reference(float *x, int n, int d) {
    const int block = d & -d;
    const float norm = 1.0f / sqrtf((float)block);
    for (float *const end = x + (size_t)n * (size_t)d; x < end; x += block) {
        for (int half = 1; half < block; half *= 2) {
            for (int i = 0; i < block; i += 2 * half) {
                for (int j = i; j < i + half; j++) {
                    const float a = x[j], b = x[j + half];
                    x[j] = a + b;
                    x[j + half] = a - b;
                }
            }
        }
        for (int c = 0; c < block; c++) x[c] *= norm;
    }
}

void kvq_multiply_reference(float *x, const float *columns, int n, int d) {
    for (int i = 0; i < n; i++, x += d) {
        float y[KVQ_D_MAX] = {0};
        for (int j = 0; j < d; j++) {
            const float *const column = columns + (size_t)j * (size_t)d;
            for (int c = 0; c < d; c++) y[c] += x[j] * column[c];
        }
        memcpy(x, y, (size_t)d * sizeof *x);
    }
}

static void gather(float *x, const uint16_t *order, int n, int d) {
    float y[KVQ_D_MAX];
    for (int i = 0; i < n; i++, x += d) {
        for (int c = 0; c < d; c++) y[c] = x[order[c]];
        memcpy(x, y, (size_t)d * sizeof *x);
    }
}

static void scatter(float *x, const uint16_t *order, int n, int d) {
    float y[KVQ_D_MAX];
    for (int i = 0; i < n; i++, x += d) {
        for (int c = 0; c < d; c++) y[order[c]] = x[c];
        memcpy(x, y, (size_t)d * sizeof *x);
    }
}

/* Adds `sign` times the mean to each vector. */
static void shift(float *x, const float *mean, float sign, int n, int d) {
    for (int i = 0; i < n; i++, x += d) {
        for (int c = 0; c < d; c++) x[c] += sign * mean[c];
    }
}

void kvq_basis_store(const kvq_basis *basis, const kvq_isa *isa, float *x, int n, int d) {
    switch (basis->kind) {
    case KVQ_BASIS_identity:
        return;
    case KVQ_BASIS_hadamard:
        kvq_run_hadamard(isa, x, n, d);
        return;
    case KVQ_BASIS_permuted:
        gather(x, basis->order, n, d);
        return;
    case KVQ_BASIS_calibrated:
        shift(x, basis->mean, -1.0f, n, d);
        kvq_run_multiply(isa, x, basis->store, n, d);
        return;
    }
}

void kvq_basis_query(const kvq_basis *basis, const kvq_isa *isa, float *x, int n, int d) {
    if (basis->kind == KVQ_BASIS_calibrated)
        kvq_run_multiply(isa, x, basis->query, n, d);
    else
        kvq_basis_store(basis, isa, x, n, d); /* orthogonal maps are their own duals */
}

void kvq_basis_restore(const kvq_basis *basis, const kvq_isa *isa, float *x, int n, int d) {
    switch (basis->kind) {
    case KVQ_BASIS_identity:
        return;
    case KVQ_BASIS_hadamard:
        kvq_run_hadamard(isa, x, n, d); /* its own inverse */
        return;
    case KVQ_BASIS_permuted:
        scatter(x, basis->order, n, d);
        return;
    case KVQ_BASIS_calibrated:
        kvq_run_multiply(isa, x, basis->restore, n, d);
        shift(x, basis->mean, 1.0f, n, d);
        return;
    }
}

const char *kvq_basis_name(kvq_basis_kind kind) {
    static const char *const names[] = {"identity", "hadamard", "permuted", "calibrated"};
    return names[kind];
}
