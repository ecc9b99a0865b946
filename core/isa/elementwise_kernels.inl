/* elementwise_kernels.inl: powers of 2, and the gate of the feed-forward, in vector words
 * (vec_*.h). Included by isa_*.c with the target switched on.
 */

/* 2^x for x <= 0, relative error below 2e-7 where the result is normal; 1 for 0, 0 for -inf. The
 * fraction's power is a polynomial with the least largest relative error, 8.3e-8, of those of
 * degree 5 that are 1 at 0. */
static inline vf exp2_of(vf x) {
    const vf r = vf_fraction(x);
    vf y = vf_set(0.00186713028f);
    y = vf_fma(y, r, vf_set(0.00901702988f));
    y = vf_fma(y, r, vf_set(0.0557999134f));
    y = vf_fma(y, r, vf_set(0.24016445f));
    y = vf_fma(y, r, vf_set(0.693151312f));
    y = vf_fma(y, r, vf_set(1.0f));
    return vf_times_exp2_floor(y, x);
}

/* With e = exp(-|x|), which cannot overflow: silu(x) = x * (x < 0 ? e : 1) / (1 + e). */
static void swiglu(float *gate, const float *up, size_t n) {
    size_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) {
        const vf x = vf_load(gate + i);
        const vf e = exp2_of(vf_mul(vf_neg_abs(x), vf_set(KVQ_LOG2_E)));
        const vf numerator = vf_mul(x, vf_where_negative(x, e, vf_set(1.0f)));
        const vf silu = vf_div(numerator, vf_add(vf_set(1.0f), e));
        vf_store(gate + i, vf_mul(silu, vf_load(up + i)));
    }
    for (; i < n; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}
