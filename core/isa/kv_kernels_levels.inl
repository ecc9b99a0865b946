/* kv_kernels_levels.inl: scores and sums over n2, n3 and nf4. Included by isa_*.c after
 * kv_kernels.inl, whose loops over rows it uses; the scale of a token goes into its score or its
 * weight, so that the loops see levels alone.
 */

/* Eight codes of `bits` bits, one to a lane, with whatever bits stand above them. Three bytes are
 * read with the byte before them, which is that of a scale or another code. */
KV_INLINE vi load_codes(const uint8_t *row, int c, const int bits) {
    static const int32_t shifts[2][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {8, 11, 14, 17, 20, 23, 26, 29}};
    const uint8_t *const at = row + c / 8 * bits;
    if (bits == 3) return vi_shr_lanes(vi_set((int32_t)kvq_load_u32(at - 1)), vi_load(shifts[1]));
    const vi shift = vi_load(shifts[0]);
    if (bits == 2) return vi_shr_lanes(vi_set(kvq_load_u16(at)), vi_shl(shift, 1));
    return vi_shr_lanes(vi_set((int32_t)kvq_load_u32(at)), vi_shl(shift, 2));
}

KV_INLINE vf load_n2(const uint8_t *row, int c, int k) {
    return vf_lookup8(vf_load(kvq_n2_level), load_codes(row, c + k, 2));
}
KV_INLINE vf load_n3(const uint8_t *row, int c, int k) {
    return vf_lookup8(vf_load(kvq_n3_level), load_codes(row, c + k, 3));
}
KV_INLINE vf load_nf4(const uint8_t *row, int c, int k) {
    return vf_lookup16(vf_load(kvq_nf4_level), vf_load(kvq_nf4_level + 8),
                       load_codes(row, c + k, 4));
}

/* out[i][t] = in[i][t] * scale of token t */
KV_INLINE void scale_tokens(const int nq, float *out, const float *in, const uint8_t *block) {
    for (int t = 0; t < KVQ_BLOCK; t += VF_LANES) {
        const vf scale = vf_load_f16((const uint16_t *)(const void *)(block + 2 * t));
        KV_EACH(i, nq) {
            vf_store(out + i * KVQ_BLOCK + t, vf_mul(vf_load(in + i * KVQ_BLOCK + t), scale));
        }
    }
}

KV_INLINE void score_levels_group(const int nq, load_fn *load, float *s, const float *q,
                                  const uint8_t *block, size_t row_bytes, int d) {
    score_rows_group(nq, load, KVQ_D_UNIT, s, q, block + KVQ_N_HEADER, row_bytes, KVQ_BLOCK, d);
    scale_tokens(nq, s, s, block);
}

KV_INLINE void accum_levels_group(const int nq, load_fn *load, float *o, const float *p,
                                  const uint8_t *block, size_t row_bytes, int d) {
    float weight[KV_QUERIES * KVQ_BLOCK];
    scale_tokens(nq, weight, p, block);
    accum_rows_group(nq, load, KVQ_D_UNIT, o, weight, block + KVQ_N_HEADER, row_bytes, KVQ_BLOCK,
                     d);
}

#define LEVELS_CODEC(NAME, BITS)                                                                   \
    static void score_##NAME(float *s, const kvq_query *query, const kvq_blocks *blocks,           \
                             const kvq_kv_shape *sh) {                                             \
        const int d = sh->d;                                                                       \
        load_fn *const load = load_##NAME;                                                         \
        const size_t row_bytes = (size_t)(d / 8 * (BITS));                                         \
        for (int b = 0; b < blocks->n; b++, s += query->n * KVQ_BLOCK) {                           \
            const uint8_t *const block = blocks->at[b];                                            \
            KV_IN_GROUPS(query->n, LEVELS_SCORE);                                                  \
        }                                                                                          \
    }                                                                                              \
    static void accum_##NAME(float *o, const kvq_weights *weights, const kvq_blocks *blocks,       \
                             const kvq_kv_shape *sh) {                                             \
        const int d = sh->d;                                                                       \
        load_fn *const load = load_##NAME;                                                         \
        const size_t row_bytes = (size_t)(d / 8 * (BITS));                                         \
        const float *p = weights->p;                                                               \
        for (int b = 0; b < blocks->n; b++, p += weights->n * KVQ_BLOCK) {                         \
            const uint8_t *const block = blocks->at[b];                                            \
            KV_IN_GROUPS(weights->n, LEVELS_ACCUM);                                                \
        }                                                                                          \
    }
#define LEVELS_SCORE(NQ, FIRST)                                                                    \
    score_levels_group(NQ, load, s + (FIRST) * KVQ_BLOCK, query->x + (FIRST) * d, block,           \
                       row_bytes, d)
#define LEVELS_ACCUM(NQ, FIRST)                                                                    \
    accum_levels_group(NQ, load, o + (FIRST) * d, p + (FIRST) * KVQ_BLOCK, block, row_bytes, d)
LEVELS_CODEC(n2, 2)
LEVELS_CODEC(n3, 3)
LEVELS_CODEC(nf4, 4)
