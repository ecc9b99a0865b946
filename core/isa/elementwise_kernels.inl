/* elementwise_kernels.inl: the softmax of a block and the gate of the feed-forward, in vector words
 * (vec_*.h). Included by isa_*.c with the target switched on.
 */

/* ---- softmax ----------------------------------------------------------------------------- */

static float softmax(float *s, float *largest) {
    vf most = vf_set(*largest), sum = vf_zero();
    for (int t = 0; t < KVQ_BLOCK; t += VF_LANES) most = vf_max(most, vf_load(s + t));
    *largest = vf_largest(most);
    /* With every score -inf the offset must be finite, or -inf - -inf would make NaN. */
    const vf offset = vf_set(*largest == -INFINITY ? 0.0f : -*largest);
    for (int t = 0; t < KVQ_BLOCK; t += VF_LANES) {
        const vf e = vf_exp(vf_add(vf_load(s + t), offset));
        vf_store(s + t, e);
        sum = vf_add(sum, e);
    }
    return vf_sum(sum);
}

/* ---- feed-forward gate ------------------------------------------------------------------- */

/* With e = exp(-|x|), which cannot overflow: silu(x) = x * (x < 0 ? e : 1) / (1 + e). */
static void swiglu(float *gate, const float *up, size_t n) {
    size_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) {
        const vf x = vf_load(gate + i), e = vf_exp(vf_neg_abs(x));
        const vf numerator = vf_mul(x, vf_where_negative(x, e, vf_set(1.0f)));
        const vf silu = vf_div(numerator, vf_add(vf_set(1.0f), e));
        vf_store(gate + i, vf_mul(silu, vf_load(up + i)));
    }
    for (; i < n; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}
