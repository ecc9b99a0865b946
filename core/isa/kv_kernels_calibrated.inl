/* kv_kernels_calibrated.inl: scores over keys of mixed widths, sums over trellis-coded values.
 * Included by isa_*.c after kv_kernels.inl, whose conventions it follows.
 */

/* ---- mixed: keys of 8, 4, 2, 1 or no bits by channel -------------------------------------- */

enum { MIXED_PLANES = 5 }; /* 8 bits are two planes of 4 */

/* The queries of a group meet a block as integers, plane by plane:
 *     x . key[t] = x . mean + sum over planes of unit * (q . code[t] - middle * sum of q)
 * q has 8 bits and a unit of its own in each run, so a run of small products keeps its precision.
 */
typedef struct mixed_query {
    int8_t q[2 * KVQ_D_MAX + VF_LANES]; /* by unit: two channels of a 16-bit lane side by side */
    float unit[MIXED_PLANES], at_mean;
} mixed_query;

typedef struct mixed_plane {
    int bits, units;
} mixed_plane;

static inline void mixed_prepare(mixed_query *m, const mixed_plane *planes, const float *x,
                                 const uint8_t *block, const kvq_kv_shape *sh) {
    const int8_t *const means = (const int8_t *)block + KVQ_MIXED_HEADER;
    static const float middle[KVQ_RUNS] = {127.5f, 7.5f, 1.5f, 0.5f};
    const uint8_t *scales = block + KVQ_MIXED_HEADER + sh->d;
    vf at_mean = vf_zero();
    for (int c = 0; c < sh->d; c += VF_LANES) {
        at_mean = vf_fma(vf_load(x + c), vf_load_i8(means + c), at_mean);
    }
    m->at_mean = kvq_load_f16(block) * vf_sum(at_mean);
    int8_t *q = m->q;
    for (int run = 0, plane = 0; run < KVQ_RUNS; run++, plane++) {
        const int n = sh->run[run];
        const int length = planes[plane].units * 16 / planes[plane].bits;
        const float scale = kvq_load_f16(block + 2 + 2 * run);
        if (n == 0) { /* the other planes have their place */
            plane += run == 0;
            continue;
        }
        float padded[KVQ_D_MAX + VF_LANES]; /* with zeros, to whole units and vectors */
        memcpy(padded, x, (size_t)n * sizeof *x);
        memset(padded + n, 0, (size_t)(length - n + VF_LANES) * sizeof *x);
        vf lowest = vf_zero();
        for (int c = 0; c < length; c += VF_LANES) { /* behind the scales are units: times 0 */
            const vf scaled = vf_mul(vf_load(padded + c), vf_load_u8(scales + c));
            vf_store(padded + c, scaled);
            lowest = vf_min(lowest, vf_neg_abs(scaled));
        }
        const float largest = vf_largest(vf_neg(lowest));
        const vf inverse = vf_set(largest > 0 ? 127.0f / largest : 0.0f);
        vi sums = vi_zero();
        for (int c = 0; c < length;
             c += VF_LANES) { /* what it writes too much, the next run mends */
            const vi rounded = vi_from_vf(vf_mul(vf_load(padded + c), inverse));
            sums = vi_add(sums, rounded);
            vi_store_i8(q + c, rounded);
        }
        const float sum = vf_sum(vf_from_vi(sums));
        m->unit[plane] = scale * largest / 127.0f;
        m->at_mean -= m->unit[plane] * middle[run] * sum;
        q += length;
        x += n;
        scales += n;
        if (run == 0) { /* the low halves see the same query */
            memcpy(q, q - length, (size_t)length);
            q += length;
            m->unit[1] = m->unit[0];
            m->unit[0] *= 16.0f;
            plane = 1;
        }
    }
}

/* Adds to `dot`, for 16 tokens, the products with `units` units of `bits`-bit codes. A 16-bit lane
 * grows by at most 2 * 127 * (2^bits - 1) per pair of channels, so it is widened in time. */
KV_INLINE void mixed_add(const int nq, const int bits, vi low[], vi high[], const uint8_t *codes,
                         int units, const mixed_query *m, int at) {
    const int most_units = bits == 4 ? 4 : bits == 2 ? 8 : 16;
    const int fields = 8 / bits; /* of a byte */
    const vb mask = vb_set((char)((1 << bits) - 1));
    while (units > 0) {
        const int n = units < most_units ? units : most_units;
        vi dot[KV_QUERIES];
        KV_EACH(i, nq) dot[i] = vi_zero();
        for (int u = 0; u < n; u++, codes += VB_LANES) {
            const vb packed = vb_load(codes);
            _Pragma("GCC unroll 8") for (int j = 0; j < fields; j++, at += 2) {
                const vb code = vb_shr(packed, bits * j, mask);
                KV_EACH(i, nq) {
                    dot[i] = vi_add16(dot[i], vi_madd_u8s8(code, vi_set_pairs(m[i].q + at)));
                }
            }
        }
        KV_EACH(i, nq) {
            low[i] = vi_add(low[i], vi_first16(dot[i]));
            high[i] = vi_add(high[i], vi_last16(dot[i]));
        }
        units -= n;
    }
}

KV_INLINE void score_mixed_group(const int nq, float *s, const float *x, const uint8_t *block,
                                 const kvq_kv_shape *sh) {
    const int d = sh->d, n8 = kvq_mixed_units(sh, 0) / 2;
    const mixed_plane planes[MIXED_PLANES] = {{4, n8},
                                              {4, n8},
                                              {4, kvq_mixed_units(sh, 1)},
                                              {2, kvq_mixed_units(sh, 2)},
                                              {1, kvq_mixed_units(sh, 3)}};
    const uint8_t *codes = block + kvq_mixed_units_at(sh);
    mixed_query m[KV_QUERIES];
    KV_EACH(i, nq) mixed_prepare(&m[i], planes, x + i * d, block, sh);
    for (int t = 0; t < KVQ_BLOCK; t += 16) {
        vf low[KV_QUERIES], high[KV_QUERIES];
        KV_EACH(i, nq) low[i] = high[i] = vf_set(m[i].at_mean);
        for (int plane = 0, at = 0; plane < MIXED_PLANES; plane++) {
            const int bits = planes[plane].bits, units = planes[plane].units;
            if (units == 0) continue;
            vi dot_low[KV_QUERIES], dot_high[KV_QUERIES];
            KV_EACH(i, nq) dot_low[i] = dot_high[i] = vi_zero();
            if (bits == 4) mixed_add(nq, 4, dot_low, dot_high, codes, units, m, at);
            if (bits == 2) mixed_add(nq, 2, dot_low, dot_high, codes, units, m, at);
            if (bits == 1) mixed_add(nq, 1, dot_low, dot_high, codes, units, m, at);
            KV_EACH(i, nq) {
                const vf unit = vf_set(m[i].unit[plane]);
                low[i] = vf_fma(vf_from_vi(dot_low[i]), unit, low[i]);
                high[i] = vf_fma(vf_from_vi(dot_high[i]), unit, high[i]);
            }
            codes += units * VB_LANES;
            at += units * 16 / bits;
        }
        KV_EACH(i, nq) {
            vf_store(s + i * KVQ_BLOCK + t, low[i]);
            vf_store(s + i * KVQ_BLOCK + t + VF_LANES, high[i]);
        }
    }
}

static void score_mixed(float *s, const kvq_query *query, const uint8_t *block,
                        const kvq_kv_shape *sh) {
#define GROUP(NQ, FIRST)                                                                           \
    score_mixed_group(NQ, s + (FIRST) * KVQ_BLOCK, query->x + (FIRST) * sh->d, block, sh)
    KV_IN_GROUPS(query->n, GROUP);
#undef GROUP
}

/* ---- waves ------------------------------------------------------------------------------- */

static void add_waves(float *s, const float *factor, int n, const float *const *wave, int n_waves) {
    for (int i = 0; i < n; i++, s += KVQ_BLOCK, factor += 2 * KVQ_WAVES) {
        vf sum[KVQ_BLOCK / VF_LANES];
        for (int t = 0; t < KVQ_BLOCK / VF_LANES; t++) sum[t] = vf_load(s + t * VF_LANES);
        for (int j = 0; j < n_waves; j++) {
            const vf f = vf_set(factor[j]);
            _Pragma("GCC unroll 8") for (int t = 0; t < KVQ_BLOCK / VF_LANES; t++) {
                sum[t] = vf_fma(f, vf_load(wave[j] + t * VF_LANES), sum[t]);
            }
        }
        for (int t = 0; t < KVQ_BLOCK / VF_LANES; t++) vf_store(s + t * VF_LANES, sum[t]);
    }
}

/* ---- t1, t2: trellis-coded values -------------------------------------------------------- */

/* A channel to a lane: the windows of four tokens in a row stand in its four bytes, at each shift
 * of a word. A look-up ignores the bits above a window. */
KV_INLINE void accum_trellis_group(const int nq, const int bits, const int8_t *level, float *o,
                                   const float *p, const uint8_t *block, int d) {
    const int n_words = 2 * bits, fields = 8 / bits; /* fields: of a byte */
    const vb levels = vb_set16(level);
    token_weights weights[KV_QUERIES];
    weigh_tokens(nq, weights, p, block + 4, kvq_load_f16(block) * KVQ_LEVEL_UNIT);
    for (int c = 0; c < d; c += VF_LANES) {
        const uint8_t *words = block + KVQ_T_HEADER + (c / 16 * n_words * 16 + c % 16) * 4;
        vw sum[KV_QUERIES];
        KV_EACH(i, nq) sum[i] = vw_zero();
        vi before = vi_zero();
        for (int t = 0; t < KVQ_BLOCK; words += 64) {
            const vi word = vi_load(words);
            /* the windows that begin in the byte before theirs */
            const vi entry = vi_or(vi_shl(word, 4 - bits), vi_shr(before, 28 + bits));
            vb y[8];
            _Pragma("GCC unroll 8") for (int k = 0; k < fields; k++) {
                const vi window = k * bits < 4 - bits ? vi_shr(entry, k * bits)
                                                      : vi_shr(word, k * bits - (4 - bits));
                y[k] = vb_lookup16(levels, window);
            }
            _Pragma("GCC unroll 4") for (int k = 0; k < fields; k += 2, t += 8) {
                KV_EACH(i, nq) {
                    const uint8_t *const high = weights[i].high + t, *const low =
                                                                         weights[i].low + t;
                    sum[i] = vw_add(sum[i], vi_set_lanes(high), vi_set_lanes(low), y[k],
                                    vi_set_lanes(high + 4), vi_set_lanes(low + 4), y[k + 1]);
                }
            }
            before = word;
        }
        KV_EACH(i, nq) {
            const vf total = vf_from_vi(vw_total(sum[i]));
            float *const to = o + i * d + c;
            vf_store(to, vf_fma(total, vf_set(weights[i].unit), vf_load(to)));
        }
    }
}

#define TRELLIS_CODEC(NAME, BITS)                                                                  \
    static void accum_##NAME(float *o, const float *p, int n, const uint8_t *block,                \
                             const kvq_kv_shape *sh) {                                             \
        const int d = sh->d;                                                                       \
        KV_IN_GROUPS(n, TRELLIS_GROUP_##BITS);                                                     \
    }
#define TRELLIS_GROUP_1(NQ, FIRST)                                                                 \
    accum_trellis_group(NQ, 1, kvq_t1_level, o + (FIRST) * d, p + (FIRST) * KVQ_BLOCK, block, d)
#define TRELLIS_GROUP_2(NQ, FIRST)                                                                 \
    accum_trellis_group(NQ, 2, kvq_t2_level, o + (FIRST) * d, p + (FIRST) * KVQ_BLOCK, block, d)
TRELLIS_CODEC(t1, 1)
TRELLIS_CODEC(t2, 2)
