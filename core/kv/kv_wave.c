/* kv_wave.c: see kv_wave.h. */
#include "kv/kv_wave.h"

static const float *first(const kvq_turns *turns, int block, int pair) {
    return turns->first + ((size_t)block * (size_t)turns->n_pairs + (size_t)pair) * 2;
}

void kvq_wave_add(float *x, const kvq_wave *wave, const kvq_turns *turns, int block, float sign,
                  int d) {
    for (int i = 0; i < wave->n; i++) {
        const float *const start = first(turns, block, wave->pair[i]);
        const float *const cosines = kvq_wave_within(turns, wave->pair[i], 0);
        const float *const sines = kvq_wave_within(turns, wave->pair[i], 1);
        const float *const u = wave->u + i * d, *const w = wave->w + i * d;
        for (int t = 0; t < KVQ_BLOCK; t++) {
            const float c = cosines[t], s = sines[t];
            const float cosine = sign * (start[0] * c - start[1] * s);
            const float sine = sign * (start[1] * c + start[0] * s);
            for (int j = 0; j < d; j++) x[t * d + j] += cosine * u[j] + sine * w[j];
        }
    }
}

/* In 16 partial sums, which compilers vectorize; d is a multiple of 16. */
static float product(const float *x, const float *y, int d) {
    float sum[16] = {0}, total = 0;
    for (int j = 0; j < d; j += 16) {
        for (int i = 0; i < 16; i++) sum[i] += x[j + i] * y[j + i];
    }
    for (int i = 0; i < 16; i++) total += sum[i];
    return total;
}

void kvq_wave_project(float *on, const kvq_wave *wave, const float *query, int d) {
    for (int i = 0; i < wave->n; i++) {
        on[i] = product(query, wave->u + i * d, d);
        on[wave->n + i] = product(query, wave->w + i * d, d);
    }
}

/* u cos(f + t) + w sin(f + t) = (u cos f + w sin f) cos t + (w cos f - u sin f) sin t */
void kvq_wave_turn(float *turned, const float *on, int n, const kvq_wave *wave,
                   const kvq_turns *turns, int block) {
    float cosine[KVQ_WAVES], sine[KVQ_WAVES];
    for (int i = 0; i < wave->n; i++) {
        const float *const start = first(turns, block, wave->pair[i]);
        cosine[i] = start[0];
        sine[i] = start[1];
    }
    for (; n > 0; n--, on += KVQ_WAVE_FACTORS, turned += KVQ_WAVE_FACTORS) {
        for (int i = 0; i < wave->n; i++) {
            const float u = on[i], w = on[wave->n + i];
            turned[i] = u * cosine[i] + w * sine[i];
            turned[wave->n + i] = w * cosine[i] - u * sine[i];
        }
    }
}

void kvq_add_waves_reference(float *s, const float *factor, int n, const float *const *wave,
                             int n_waves) {
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n_waves; j++) {
            for (int t = 0; t < KVQ_BLOCK; t++) {
                s[i * KVQ_BLOCK + t] += factor[i * KVQ_WAVE_FACTORS + j] * wave[j][t];
            }
        }
    }
}
