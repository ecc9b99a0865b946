/* ops.c: see ops.h. */
#include "ops.h"

#include <math.h>

void kvq_rms_norm(float *y, const float *x, const float *w, size_t n, float epsilon) {
    float part[8] = {0}, sum = 0; /* eight running sums: shorter chains, less rounding */
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (size_t j = 0; j < 8; j++) part[j] += x[i + j] * x[i + j];
    }
    for (; i < n; i++) sum += x[i] * x[i];
    for (size_t j = 0; j < 8; j++) sum += part[j];
    const float scale = 1.0f / sqrtf(sum / (float)n + epsilon);
    for (i = 0; i < n; i++) y[i] = x[i] * scale * w[i];
}

double kvq_rope_frequency(int i, int d_rope, float base, const float *factors) {
    return pow((double)base, -2.0 * i / d_rope) / (factors ? (double)factors[i] : 1.0);
}

void kvq_rope_angles(float *cos_sin, int position, int d_rope, float base, float scale,
                     const float *factors) {
    for (int i = 0; i < d_rope / 2; i++) {
        const double angle =
            position / (double)scale * kvq_rope_frequency(i, d_rope, base, factors);
        cos_sin[2 * i] = (float)cos(angle);
        cos_sin[2 * i + 1] = (float)sin(angle);
    }
}

void kvq_rope_rotate(float *x, int n_heads, int d_head, const float *cos_sin, int d_rope,
                     bool neox) {
    for (int h = 0; h < n_heads; h++, x += d_head) {
        for (int i = 0; i < d_rope / 2; i++) {
            float *const a = x + kvq_rope_first(i, neox);
            float *const b = x + kvq_rope_second(i, d_rope, neox);
            const float c = cos_sin[2 * i], s = cos_sin[2 * i + 1], a0 = *a, b0 = *b;
            *a = a0 * c - b0 * s;
            *b = a0 * s + b0 * c;
        }
    }
}
