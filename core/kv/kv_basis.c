/* kv_basis.c: the bases by name: identity and Hadamard. */
#include "kv/kv_basis.h"

#include <math.h>

/* Widths that are no power of two split into equal blocks, each the largest power of two that
 * divides d. */
static void hadamard(float *x, int d) {
    const int block = d & -d;
    const float norm = 1.0f / sqrtf((float)block);
    for (int first = 0; first < d; first += block) {
        for (int half = 1; half < block; half *= 2) {
            for (int i = first; i < first + block; i += 2 * half) {
                for (int j = i; j < i + half; j++) {
                    const float a = x[j], b = x[j + half];
                    x[j] = a + b;
                    x[j + half] = a - b;
                }
            }
        }
    }
    for (int c = 0; c < d; c++) x[c] *= norm;
}

static void identity(float *x, int d) {
    (void)x;
    (void)d;
}

const kvq_basis kvq_basis_identity = {"identity", identity, identity};
const kvq_basis kvq_basis_hadamard = {"hadamard", hadamard, hadamard};
