/* kv_kernels_calibrated.inl: scores over keys of mixed widths, sums over trellis-coded values.
 * Included by isa_*.c after kv_kernels.inl, whose conventions it follows.
 */

/* ---- mixed: keys of 8, 4, 2, 1 or no bits by channel -------------------------------------- */

enum {
    MIXED_PLANES = 5,           /* 1 + run; 0: the high halves of codes of 8 bits */
    MIXED_TOKENS = 2 * VF_LANES /* that are summed side by side: two vectors */
};

typedef struct mixed_plane {
    int bits, units, at; /* at: where its part of a query begins */
} mixed_plane;

/* The queries of a group meet a block as integers, plane by plane:
 *     x . key[t] = x . mean + sum over planes of unit * (q . code[t] - middle * sum of q)
 * q has 8 bits and a unit of its own in each run, so a run of small products keeps its precision.
 */
typedef struct mixed_queries {
    int8_t q[KV_QUERIES][KVQ_D_MAX + 32 * KVQ_RUNS]; /* by pairs of units (vi_store_units) */
    float unit[MIXED_PLANES][KV_QUERIES];
    float factor[MIXED_PLANES][KV_QUERIES]; /* q = x * scale of the channel * factor */
    float offset[KV_QUERIES];               /* what is not a product of q with codes */
} mixed_queries;

/* Returns the number of units of a token. */
static inline size_t mixed_find_planes(mixed_plane planes[MIXED_PLANES], const kvq_kv_shape *sh) {
    static const int bits[MIXED_PLANES] = {4, 4, 4, 2, 1};
    size_t n = 0;
    for (int i = 0, at = 0; i < MIXED_PLANES; i++) {
        const int run = i > 0 ? i - 1 : 0;
        planes[i] = (mixed_plane){.bits = bits[i], .at = at};
        planes[i].units = kvq_mixed_units(sh, run) >> (run == 0);
        if (i > 0) at += (planes[i].units + 1) / 2 * (32 / bits[i]); /* both halves: one */
        n += (size_t)planes[i].units;
    }
    return n;
}

/* The units of queries on a block, and their products with its mean. */
KV_INLINE void mixed_measure(const int nq, mixed_queries *m, const float *x, const uint8_t *block,
                             const kvq_kv_shape *sh) {
    const int d = sh->d;
    const int8_t *const means = (const int8_t *)block + KVQ_MIXED_HEADER;
    const uint8_t *scales = block + KVQ_MIXED_HEADER + d;
    vf sum[KV_QUERIES];
    for (int i = 0; i < KV_QUERIES; i++) sum[i] = vf_zero();
    for (int c = 0; c < d; c += VF_LANES) {
        const vf mean = vf_load_i8(means + c);
        KV_EACH(i, nq) sum[i] = vf_fma(vf_load(x + i * d + c), mean, sum[i]);
    }
    vf_store_four(m->offset, vf_mul(vf_sums(sum), vf_set_half(block)));
    for (int plane = 1; plane < MIXED_PLANES; plane++) {
        const int run = plane - 1, n = sh->run[run];
        vf top[KV_QUERIES];
        if (n == 0) continue;
        for (int i = 0; i < KV_QUERIES; i++) top[i] = vf_zero();
        for (int c = 0; c < n; c += VF_LANES) {
            const vf scale = vf_load_u8(scales + c); /* units lie behind the scales: times 0 */
            KV_EACH(i, nq) {
                const vf y = vf_mul(vf_load_first(x + i * d + c, n - c), scale);
                top[i] = vf_max_abs(top[i], y);
            }
        }
        const vf largest = vf_max(vf_largests(top), vf_set(KV_NEGLIGIBLE));
        const vf unit =
            vf_mul(largest, vf_mul(vf_set_half(block + 2 + 2 * run), vf_set(1.0f / 127)));
        vf_store_four(m->factor[plane], vf_div(vf_set(127), largest));
        vf_store_four(m->unit[plane], unit);
        if (run == 0) vf_store_four(m->unit[0], vf_mul(unit, vf_set(16)));
        x += n;
        scales += n;
    }
}

/* Queries in 8 bits, once they are measured. */
KV_INLINE void mixed_round(const int nq, mixed_queries *m, const mixed_plane *planes,
                           const float *x, const uint8_t *block, const kvq_kv_shape *sh) {
    static const float middle[KVQ_RUNS] = {127.5f, 7.5f, 1.5f, 0.5f};
    enum { VECTORS = 32 / VF_LANES };
    const uint8_t *scales = block + KVQ_MIXED_HEADER + sh->d;
    for (int plane = 1; plane < MIXED_PLANES; plane++) {
        const int run = plane - 1, n = sh->run[run];
        vf sum[KV_QUERIES];
        vi q_sum[KV_QUERIES];
        if (n == 0) continue;
        for (int i = 0; i < KV_QUERIES; i++) q_sum[i] = vi_zero();
        for (int c = 0; c < n; c += 32) { /* what it writes too much, the next run mends */
            vf scale[VECTORS];
            for (int v = 0; v < VECTORS; v++) scale[v] = vf_load_u8(scales + c + v * VF_LANES);
            KV_EACH(i, nq) {
                const vf factor = vf_set(m->factor[plane][i]);
                vi rounded[VECTORS];
                for (int v = 0; v < VECTORS; v++) {
                    const int at = c + v * VF_LANES;
                    const vf y = vf_mul(vf_load_first(x + i * sh->d + at, n - at), scale[v]);
                    rounded[v] = vi_from_vf(vf_mul(y, factor));
                    q_sum[i] = vi_add(q_sum[i], rounded[v]);
                }
                vi_store_units(m->q[i] + planes[plane].at + c, rounded, planes[plane].bits);
            }
        }
        for (int i = 0; i < KV_QUERIES; i++) sum[i] = vf_from_vi(q_sum[i]);
        const vf unit = vf_load_first(m->unit[plane], KV_QUERIES);
        const vf middles = vf_mul(vf_mul(unit, vf_set(middle[run])), vf_sums(sum));
        vf_store_four(m->offset, vf_sub(vf_load_first(m->offset, KV_QUERIES), middles));
        x += n;
        scales += n;
    }
}

/* Adds to `dot`, for MIXED_TOKENS tokens, the products with `units` units of `bits`-bit codes, two
 * at a time: four channels of a token to a lane. */
KV_INLINE void mixed_add(const int nq, const int bits, vi dot[KV_QUERIES][2], const uint8_t *codes,
                         size_t stride, int units, const mixed_queries *m, int at) {
    const int fields = 8 / bits, top = (1 << bits) - 1;           /* fields: of a byte */
    const int most_units = vd_most(127 * top) / (2 * fields) * 2; /* that a sum can take */
    const bool at_once = most_units >= KVQ_D_MAX / 4;             /* known: one sum for all */
    const vb low = vb_set(top), next = vb_set(top << bits);
    do {
        const int left = at_once ? 0 : units - most_units;
        vd sum[KV_QUERIES][2];
        KV_EACH(i, nq) sum[i][0] = sum[i][1] = vd_zero();
        for (; units > 0 && units > left; units -= 2, codes += 64) {
            vb packed[2];
            vb_load_units(packed, codes, stride, units);
            _Pragma("GCC unroll 4") for (int j = 0; j < fields; j += 2, at += 8) {
                vb code[2][2];
                vd_fields(code[0], packed[0], j, bits, low, next);
                vd_fields(code[1], packed[1], j, bits, low, next);
                KV_EACH(i, nq) {
                    const v8 q = v8_load(m->q[i] + at);
                    sum[i][0] = vd_add(sum[i][0], code[0][0], code[0][1], q);
                    sum[i][1] = vd_add(sum[i][1], code[1][0], code[1][1], q);
                }
            }
        }
        KV_EACH(i, nq) {
            dot[i][0] = vi_add(dot[i][0], vd_total(sum[i][0], bits));
            dot[i][1] = vi_add(dot[i][1], vd_total(sum[i][1], bits));
        }
    } while (!at_once && units > 0);
}

KV_INLINE void mixed_score(const int nq, float *s, const mixed_queries *m,
                           const mixed_plane *planes, size_t stride, const uint8_t *block,
                           ptrdiff_t ahead, const kvq_kv_shape *sh) {
    fetch_lines(block + ahead, kvq_mixed_units_at(sh));
    for (int t = 0; t < KVQ_BLOCK; t += MIXED_TOKENS) {
        const uint8_t *codes = block + kvq_mixed_units_at(sh) + (size_t)(t / 16) * stride;
        vf score[KV_QUERIES][2];
        fetch_lines(codes + ahead, MIXED_TOKENS / 16 * stride);
        KV_EACH(i, nq) score[i][0] = score[i][1] = vf_set(m->offset[i]);
        for (int plane = 0; plane < MIXED_PLANES; plane++) {
            const int bits = planes[plane].bits, units = planes[plane].units;
            const int at = planes[plane].at;
            if (units == 0) continue;
            vi dot[KV_QUERIES][2];
            KV_EACH(i, nq) dot[i][0] = dot[i][1] = vi_zero();
            if (bits == 4) mixed_add(nq, 4, dot, codes, stride, units, m, at);
            if (bits == 2) mixed_add(nq, 2, dot, codes, stride, units, m, at);
            if (bits == 1) mixed_add(nq, 1, dot, codes, stride, units, m, at);
            KV_EACH(i, nq) {
                const vf unit = vf_set(m->unit[plane][i]);
                score[i][0] = vf_fma(vf_from_vi(dot[i][0]), unit, score[i][0]);
                score[i][1] = vf_fma(vf_from_vi(dot[i][1]), unit, score[i][1]);
            }
            codes += units * 32;
        }
        KV_EACH(i, nq) vf_store_units(s + i * KVQ_BLOCK + t, score[i]);
    }
}

KV_INLINE void score_mixed_group(const int nq, float *s, size_t stride, const float *x,
                                 const kvq_blocks *blocks, bool first_queries,
                                 const kvq_kv_shape *sh) {
    mixed_plane planes[MIXED_PLANES];
    mixed_queries m[KVQ_BLOCKS_AT_ONCE];
    const size_t to_next_tokens = mixed_find_planes(planes, sh) * 32;
    for (int b = 0; b < blocks->n; b++) mixed_measure(nq, &m[b], x, blocks->at[b], sh);
    for (int b = 0; b < blocks->n; b++) mixed_round(nq, &m[b], planes, x, blocks->at[b], sh);
    for (int b = 0; b < blocks->n; b++, s += stride) {
        const ptrdiff_t ahead = to_ahead(blocks, b, first_queries);
        mixed_score(nq, s, &m[b], planes, to_next_tokens, blocks->at[b], ahead, sh);
    }
}

static void score_mixed(float *s, const kvq_query *query, const kvq_blocks *blocks,
                        const kvq_kv_shape *sh) {
    const size_t stride = (size_t)query->n * KVQ_BLOCK;
#define GROUP(NQ, FIRST)                                                                           \
    score_mixed_group(NQ, s + (FIRST) * KVQ_BLOCK, stride, query->x + (FIRST) * sh->d, blocks,     \
                      (FIRST) == 0, sh)
    KV_IN_GROUPS(query->n, GROUP);
#undef GROUP
}

/* ---- waves ------------------------------------------------------------------------------- */

/* To some vectors of tokens of a few queries, which share what is loaded of a wave. */
KV_INLINE void add_waves_group(const int nq, float *s, const float *factor,
                               const float *const *wave, int n_waves) {
    enum { VECTORS = VF_REGISTERS / 2 / KV_QUERIES };
    for (int t = 0; t < KVQ_BLOCK; t += VECTORS * VF_LANES, s += VECTORS * VF_LANES) {
        vf sum[KV_QUERIES][VECTORS], part[VECTORS];
        KV_EACH(i, nq) {
            for (int v = 0; v < VECTORS; v++) sum[i][v] = vf_load(s + i * KVQ_BLOCK + v * VF_LANES);
        }
        for (int j = 0; j < n_waves; j++) {
            for (int v = 0; v < VECTORS; v++) part[v] = vf_load(wave[j] + t + v * VF_LANES);
            KV_EACH(i, nq) {
                const vf f = vf_set(factor[i * KVQ_WAVE_FACTORS + j]);
                for (int v = 0; v < VECTORS; v++) sum[i][v] = vf_fma(f, part[v], sum[i][v]);
            }
        }
        KV_EACH(i, nq) {
            for (int v = 0; v < VECTORS; v++) vf_store(s + i * KVQ_BLOCK + v * VF_LANES, sum[i][v]);
        }
    }
}

static void add_waves(float *s, const float *factor, int n, const float *const *wave, int n_waves) {
#define GROUP(NQ, FIRST)                                                                           \
    add_waves_group(NQ, s + (FIRST) * KVQ_BLOCK, factor + (FIRST) * KVQ_WAVE_FACTORS, wave, n_waves)
    KV_IN_GROUPS(n, GROUP);
#undef GROUP
}

/* ---- t1, t2: trellis-coded values -------------------------------------------------------- */

/* A channel to a lane: the windows of four tokens in a row stand in its four bytes, at each shift
 * of a word. A look-up ignores the bits above a window. */
KV_INLINE void trellis_weigh(const int nq, const bool all_low, const int bits, vb levels, float *o,
                             int d, const uint8_t *words, const token_weights *weights) {
    const int fields = 8 / bits; /* of a byte */
    vw sum[KV_QUERIES];
    KV_READ_AGAIN();
    KV_EACH(i, nq) sum[i] = vw_zero();
    vi before = vi_zero();
    for (int t = 0; t < KVQ_BLOCK; words += 64) {
        const vi word = vi_load(words);
        /* the windows that begin in the byte before theirs */
        const vi entry = vi_or(vi_shl(word, 4 - bits), vi_shr(before, 28 + bits));
        vb y[8];
        _Pragma("GCC unroll 8") for (int k = 0; k < fields; k++) {
            const vi window =
                k * bits < 4 - bits ? vi_shr(entry, k * bits) : vi_shr(word, k * bits - (4 - bits));
            y[k] = vb_lookup16(levels, window);
        }
        _Pragma("GCC unroll 4") for (int k = 0; k < fields; k += 2, t += 8) {
            KV_EACH(i, nq) { sum[i] = vw_weigh(all_low, sum[i], &weights[i], t, y[k], y[k + 1]); }
        }
        before = word;
    }
    KV_EACH(i, nq) {
        const vf total = vf_from_vi(vw_weighed(all_low, sum[i]));
        float *const to = o + i * d;
        vf_store(to, vf_fma(total, vf_set(weights[i].unit), vf_load(to)));
    }
}

KV_INLINE void accum_trellis_group(const int nq, const int bits, const int8_t *level, float *o,
                                   const float *p, size_t stride, const float *sum,
                                   const kvq_blocks *blocks, bool first_queries, int d) {
    const vb levels = vb_set16(level);
    token_weights weights[KVQ_BLOCKS_AT_ONCE][KV_QUERIES];
    const size_t scales_at = KVQ_T_HEADER - KVQ_BLOCK;
    const unsigned low = weigh_tokens(nq, weights, p, stride, sum, blocks, scales_at);
    for (int b = 0; b < blocks->n; b++) {
        const uint8_t *const words = blocks->at[b] + KVQ_T_HEADER;
        const ptrdiff_t ahead = to_ahead(blocks, b, first_queries);
        fetch_lines(blocks->at[b] + ahead, KVQ_T_HEADER);
        for (int c = 0; c < d; c += VF_LANES) {
            const uint8_t *const at = words + (c / 16 * 2 * bits * 16 + c % 16) * 4;
            if (c % 16 == 0) fetch_lines(at + ahead, (size_t)(8 * bits) * 16);
            if (VW_LOW_MOST && low >> b & 1)
                trellis_weigh(nq, true, bits, levels, o + c, d, at, weights[b]);
            else
                trellis_weigh(nq, false, bits, levels, o + c, d, at, weights[b]);
        }
    }
}

#define TRELLIS_CODEC(NAME, BITS)                                                                  \
    static void accum_##NAME(float *o, const kvq_weights *weights, const kvq_blocks *blocks,       \
                             const kvq_kv_shape *sh) {                                             \
        const size_t stride = (size_t)weights->n * KVQ_BLOCK;                                      \
        KV_IN_GROUPS(weights->n, TRELLIS_GROUP_##BITS);                                            \
    }
#define TRELLIS_GROUP(NQ, BITS, LEVEL, FIRST)                                                      \
    accum_trellis_group(NQ, BITS, LEVEL, o + (FIRST) * sh->d, weights->p + (FIRST) * KVQ_BLOCK,    \
                        stride, weights->sum + (FIRST), blocks, (FIRST) == 0, sh->d)
#define TRELLIS_GROUP_1(NQ, FIRST) TRELLIS_GROUP(NQ, 1, kvq_t1_level, FIRST)
#define TRELLIS_GROUP_2(NQ, FIRST) TRELLIS_GROUP(NQ, 2, kvq_t2_level, FIRST)
TRELLIS_CODEC(t1, 1)
TRELLIS_CODEC(t2, 2)
