/* kv_kernels_basis.inl: the maps of kv_basis.h in vector words (vec_*.h). Included by isa_*.c with
 * the target switched on. Every result is that of the reference to the bit: products and sums are
 * the same ones in the same order, and not fused. So what a cache holds depends on no instruction
 * set.
 */
#define BASIS_INLINE static inline __attribute__((always_inline))

/* ---- Hadamard ---------------------------------------------------------------------------- */

/* The steps between lanes of a vector. */
BASIS_INLINE vf hadamard_lanes(vf a) {
    a = vf_butterfly(a, 1);
    a = vf_butterfly(a, 2);
    if (VF_LANES > 4) a = vf_butterfly(a, 4);
    if (VF_LANES > 8) a = vf_butterfly(a, 8);
    return a;
}

static void hadamard(float *x, int n, int d) {
    const int block = d & -d; /* at least KVQ_D_UNIT, which is a vector or more */
    const vf norm = vf_set(1.0f / sqrtf((float)block));
    for (float *const end = x + (size_t)n * (size_t)d; x < end; x += block) {
        for (int c = 0; c < block; c += VF_LANES) {
            vf_store(x + c, hadamard_lanes(vf_load(x + c)));
        }
        for (int half = VF_LANES; half < block; half *= 2) {
            for (int first = 0; first < block; first += 2 * half) {
                for (int c = first; c < first + half; c += VF_LANES) {
                    const vf a = vf_load(x + c), b = vf_load(x + c + half);
                    vf_store(x + c, vf_add(a, b));
                    vf_store(x + c + half, vf_sub(a, b));
                }
            }
        }
        for (int c = 0; c < block; c += VF_LANES) vf_store(x + c, vf_mul(vf_load(x + c), norm));
    }
}

/* ---- any matrix -------------------------------------------------------------------------- */

/* Channels c .. c + vectors * VF_LANES - 1 of y. */
BASIS_INLINE void multiply_part(float *y, const float *x, const float *columns, const int vectors,
                                int c, int d) {
    vf sum[4];
    for (int v = 0; v < vectors; v++) sum[v] = vf_zero();
    for (int j = 0; j < d; j++, columns += d) {
        const vf xj = vf_set(x[j]);
        for (int v = 0; v < vectors; v++) {
            sum[v] = vf_add(sum[v], vf_mul(xj, vf_load(columns + c + v * VF_LANES)));
        }
    }
    for (int v = 0; v < vectors; v++) vf_store(y + c + v * VF_LANES, sum[v]);
}

static void multiply_basis(float *x, const float *columns, int n, int d) {
    float y[KVQ_D_MAX];
    for (int i = 0; i < n; i++, x += d) {
        int c = 0;
        for (; c + 4 * VF_LANES <= d; c += 4 * VF_LANES) multiply_part(y, x, columns, 4, c, d);
        for (; c < d; c += VF_LANES) multiply_part(y, x, columns, 1, c, d);
        memcpy(x, y, (size_t)d * sizeof *x);
    }
}
