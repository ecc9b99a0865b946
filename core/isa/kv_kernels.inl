/* kv_kernels.inl: scores and sums over blocks and rows, in vector words (vec_*.h). Included by
 * isa_*.c with the target switched on. Every function matches its reference in kv_ref.c within the
 * tolerance of its row in tests/c/test_kv_codec.c.
 *
 * Queries go in groups of up to KV_QUERIES, which share one unpacking of the codes; the group's
 * size is a compile-time constant in each instance, so that its sums stay in registers.
 */
#define KV_QUERIES 4 /* as many as vf_sums and vf_largests take */

/* Where numbers become integers, a largest magnitude below this counts as nothing or as this: its
 * inverse need not be finite. */
#define KV_NEGLIGIBLE 1e-30f

/* Over the queries of a group: unrolled, so that their sums stay in registers. */
#define KV_EACH(i, nq) _Pragma("GCC unroll 4") for (int i = 0; i < (nq); i++)

/* Over the vectors of tokens that share what is loaded of a query. */
#define KV_TOKENS(v) _Pragma("GCC unroll 4") for (int v = 0; v < VD_TOKENS; v++)

/* What is in memory is read again: gcc would read it once, before a loop, into more registers than
 * there are. */
#define KV_READ_AGAIN() __asm__ volatile("" ::: "memory")

#define KV_INLINE static inline __attribute__((always_inline))

/* Calls FUNCTION(count, first) with a constant count for queries first .. first + count - 1 of n.
 */
#define KV_IN_GROUPS(n, FUNCTION)                                                                  \
    do {                                                                                           \
        int first = 0;                                                                             \
        for (; first + KV_QUERIES <= (n); first += KV_QUERIES) FUNCTION(4, first);                 \
        if ((n) - first == 3) FUNCTION(3, first);                                                  \
        if ((n) - first == 2) FUNCTION(2, first);                                                  \
        if ((n) - first == 1) FUNCTION(1, first);                                                  \
    } while (0)

KV_INLINE void fetch_lines(const uint8_t *p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) prefetch_line(p + i);
}

/* From what is read of a block to the same of the one that is read next; 0, which fetches what is
 * there, where there is none or other queries of the call have fetched it. */
KV_INLINE ptrdiff_t to_ahead(const kvq_blocks *blocks, int b, bool first_queries) {
    return first_queries && blocks->ahead[b] ? blocks->ahead[b] - blocks->at[b] : 0;
}

/* ---- softmax ------------------------------------------------------------------------------- */

KV_INLINE void softmax_group(const int nq, float *s, size_t stride, float *largest, float *sum,
                             int n_blocks) {
    _Alignas(KVQ_ALIGN) float of_each[VF_LANES];
    vf top[KV_QUERIES], total[KV_QUERIES], offset[KV_QUERIES];
    for (int i = 0; i < KV_QUERIES; i++) {
        top[i] = vf_set(i < nq ? largest[i] : 0.0f);
        total[i] = vf_zero();
    }
    for (int b = 0; b < n_blocks; b++) {
        for (int t = 0; t < KVQ_BLOCK; t += VF_LANES) {
            KV_EACH(i, nq) {
                const float *const at = s + (size_t)b * stride + i * KVQ_BLOCK + t;
                top[i] = vf_max(top[i], vf_load(at));
            }
        }
    }
    vf_store(of_each, vf_largests(top));
    KV_EACH(i, nq) {
        largest[i] = of_each[i];
        /* With every score -inf the offset must be finite, or -inf - -inf would make NaN. */
        offset[i] = vf_set(largest[i] == -INFINITY ? 0.0f : largest[i]);
    }
    for (int b = 0; b < n_blocks; b++) {
        for (int t = 0; t < KVQ_BLOCK; t += VF_LANES) {
            KV_EACH(i, nq) {
                float *const at = s + (size_t)b * stride + i * KVQ_BLOCK + t;
                const vf weight = exp2_of(vf_sub(vf_load(at), offset[i]));
                vf_store(at, weight);
                total[i] = vf_add(total[i], weight);
            }
        }
    }
    vf_store(of_each, vf_sums(total));
    KV_EACH(i, nq) sum[i] = of_each[i];
}

static void softmax(float *s, float *largest, float *sum, int n, int n_blocks) {
    const size_t stride = (size_t)n * KVQ_BLOCK;
#define GROUP(NQ, FIRST)                                                                           \
    softmax_group(NQ, s + (FIRST) * KVQ_BLOCK, stride, largest + (FIRST), sum + (FIRST), n_blocks)
    KV_IN_GROUPS(n, GROUP);
#undef GROUP
}

/* ---- rows: halves, q8_0, q4_0 ------------------------------------------------------------- */

/* Channels c + k .. of a row, a vector of them; c is a multiple of the codec's span of channels, so
 * that all of a span find the scale that they share in the same place. */
typedef vf load_fn(const uint8_t *row, int c, int k);

KV_INLINE vf load_f16(const uint8_t *row, int c, int k) {
    return vf_load_f16((const uint16_t *)(const void *)(row + 2 * (c + k)));
}

KV_INLINE vf load_q8_0(const uint8_t *row, int c, int k) {
    const uint8_t *const group = row + c / 32 * 34;
    return vf_mul(vf_set_half(group), vf_load_i8((const int8_t *)group + 2 + k));
}

KV_INLINE vf load_q4_0(const uint8_t *row, int c, int k) {
    const uint8_t *const group = row + c / 32 * 18;
    const vi bytes = vi_load_u8(group + 2 + k % 16);
    const vi code = vi_and(k < 16 ? bytes : vi_shr(bytes, 4), vi_set(15));
    return vf_mul(vf_set_half(group), vf_from_vi(vi_add(code, vi_set(-8))));
}

enum { F16_SPAN = KVQ_D_UNIT, Q8_0_SPAN = 32, Q4_0_SPAN = 32 };
enum { ROWS_AHEAD = 16 }; /* that are fetched meanwhile: hardware stops where a page ends */

/* A few tokens side by side share what is loaded of the queries, and their sums are taken together.
 */
KV_INLINE void score_rows_part(const int nq, const int tokens, load_fn *load, const int span,
                               float *s, const float *q, const uint8_t *rows, size_t row_bytes,
                               int d) {
    vf sum[KV_QUERIES * 4];
    float total[KV_QUERIES * 4];
    for (int j = 0; j < KV_QUERIES * 4; j++) sum[j] = vf_zero();
    for (int c = 0; c < d; c += span) {
        _Pragma("GCC unroll 4") for (int k = 0; k < span; k += VF_LANES) {
            vf key[4];
            for (int t = 0; t < tokens; t++) key[t] = load(rows + (size_t)t * row_bytes, c, k);
            KV_EACH(i, nq) {
                const vf x = vf_load(q + i * d + c + k);
                for (int t = 0; t < tokens; t++) {
                    sum[i * tokens + t] = vf_fma(x, key[t], sum[i * tokens + t]);
                }
            }
        }
    }
    for (int j = 0; j < nq * tokens; j += 4) vf_store_four(total + j, vf_sums(sum + j));
    KV_EACH(i, nq) {
        for (int t = 0; t < tokens; t++) s[i * KVQ_BLOCK + t] = total[i * tokens + t];
    }
}

KV_INLINE void score_rows_group(const int nq, load_fn *load, const int span, float *s,
                                const float *q, const uint8_t *rows, size_t row_bytes, int n_rows,
                                int d) {
    const int tokens = nq * 4 <= VF_REGISTERS / 2 ? 4 : 2;
    int t = 0;
    for (; t + tokens <= n_rows; t += tokens, rows += (size_t)tokens * row_bytes) {
        fetch_lines(rows + ROWS_AHEAD * row_bytes, (size_t)tokens * row_bytes);
        score_rows_part(nq, tokens, load, span, s + t, q, rows, row_bytes, d);
    }
    for (; t < n_rows; t++, rows += row_bytes) {
        score_rows_part(nq, 1, load, span, s + t, q, rows, row_bytes, d);
    }
}

KV_INLINE void score_rows_any(load_fn *load, const int span, float *s, const kvq_query *query,
                              const uint8_t *rows, size_t row_bytes, int n_rows, int d) {
#define GROUP(NQ, FIRST)                                                                           \
    score_rows_group(NQ, load, span, s + (FIRST) * KVQ_BLOCK, query->x + (FIRST) * d, rows,        \
                     row_bytes, n_rows, d)
    KV_IN_GROUPS(query->n, GROUP);
#undef GROUP
}

/* Several vectors of channels side by side: the sums of one alone would wait for each other. */
KV_INLINE void accum_rows_part(const int nq, const int vectors, load_fn *load, const int span,
                               float *o, const float *p, const uint8_t *row, size_t row_bytes,
                               int n_rows, int c, int d) {
    const int inside = vectors * VF_LANES < span ? c % span : 0; /* else c is a multiple of it */
    vf sum[KV_QUERIES][4];
    KV_EACH(i, nq) {
        for (int v = 0; v < vectors; v++) sum[i][v] = vf_load(o + i * d + c + v * VF_LANES);
    }
    const size_t at = ROWS_AHEAD * row_bytes + (size_t)c * row_bytes / (size_t)d;
    const size_t bytes = (size_t)(vectors * VF_LANES) * row_bytes / (size_t)d;
    for (int t = 0; t < n_rows; t++, row += row_bytes) {
        fetch_lines(row + at, bytes);
        vf value[4];
        for (int v = 0; v < vectors; v++) {
            const int k = v * VF_LANES;
            value[v] = load(row, c - inside + k / span * span, inside + k % span);
        }
        KV_EACH(i, nq) {
            const vf weight = vf_set(p[i * KVQ_BLOCK + t]);
            for (int v = 0; v < vectors; v++) sum[i][v] = vf_fma(weight, value[v], sum[i][v]);
        }
    }
    KV_EACH(i, nq) {
        for (int v = 0; v < vectors; v++) vf_store(o + i * d + c + v * VF_LANES, sum[i][v]);
    }
}

KV_INLINE void accum_rows_group(const int nq, load_fn *load, const int span, float *o,
                                const float *p, const uint8_t *rows, size_t row_bytes, int n_rows,
                                int d) {
    enum { FEW = 2 * VF_LANES, MANY = 4 * VF_LANES };
    int c = 0;
    for (; nq * 4 <= VF_REGISTERS / 2 && c + MANY <= d; c += MANY) {
        accum_rows_part(nq, 4, load, span, o, p, rows, row_bytes, n_rows, c, d);
    }
    for (; c + FEW <= d; c += FEW) {
        accum_rows_part(nq, 2, load, span, o, p, rows, row_bytes, n_rows, c, d);
    }
    if (c < d) accum_rows_part(nq, 1, load, span, o, p, rows, row_bytes, n_rows, c, d);
}

KV_INLINE void accum_rows_any(load_fn *load, const int span, float *o, const float *p, int n,
                              const uint8_t *rows, size_t row_bytes, int n_rows, int d) {
#define GROUP(NQ, FIRST)                                                                           \
    accum_rows_group(NQ, load, span, o + (FIRST) * d, p + (FIRST) * KVQ_BLOCK, rows, row_bytes,    \
                     n_rows, d)
    KV_IN_GROUPS(n, GROUP);
#undef GROUP
}

static void score_rows(float *s, const kvq_query *query, const uint16_t *rows, int n_rows, int d) {
    const uint8_t *const bytes = (const uint8_t *)(const void *)rows;
    score_rows_any(load_f16, F16_SPAN, s, query, bytes, (size_t)d * 2, n_rows, d);
}

static void accum_rows(float *o, const float *p, int n, const uint16_t *rows, int n_rows, int d) {
    const uint8_t *const bytes = (const uint8_t *)(const void *)rows;
    accum_rows_any(load_f16, F16_SPAN, o, p, n, bytes, (size_t)d * 2, n_rows, d);
}

/* score_NAME and accum_NAME of a codec whose block is 64 rows of ROW_BYTES. */
#define ROW_CODEC(NAME, SPAN, ROW_BYTES)                                                           \
    static void score_##NAME(float *s, const kvq_query *query, const kvq_blocks *blocks,           \
                             const kvq_kv_shape *sh) {                                             \
        const int d = sh->d;                                                                       \
        for (int b = 0; b < blocks->n; b++, s += query->n * KVQ_BLOCK) {                           \
            score_rows_any(load_##NAME, SPAN, s, query, blocks->at[b], ROW_BYTES, KVQ_BLOCK, d);   \
        }                                                                                          \
    }                                                                                              \
    static void accum_##NAME(float *o, const kvq_weights *weights, const kvq_blocks *blocks,       \
                             const kvq_kv_shape *sh) {                                             \
        const int d = sh->d, n = weights->n;                                                       \
        const float *p = weights->p;                                                               \
        for (int b = 0; b < blocks->n; b++, p += n * KVQ_BLOCK) {                                  \
            accum_rows_any(load_##NAME, SPAN, o, p, n, blocks->at[b], ROW_BYTES, KVQ_BLOCK, d);    \
        }                                                                                          \
    }

ROW_CODEC(f16, F16_SPAN, (size_t)d * 2)
ROW_CODEC(q8_0, Q8_0_SPAN, (size_t)d / 32 * 34)
ROW_CODEC(q4_0, Q4_0_SPAN, (size_t)d / 32 * 18)

/* ---- u1, u2, u4: keys in uniform levels --------------------------------------------------- */

enum { U_MOST_GROUPS = KVQ_D_MAX / 32 };
_Static_assert(VS_LANES <= KVQ_X16_UNIT, "a vector must not reach beyond a query in 16 bits");

/* A query, in 16 bits, meets the scales of a block's channels once, then works in 8 bits, group by
 * group:
 *     x . key[t] = x . mean + sum over groups of a[t] * unit * (q . code[t] - middle * sum of q),
 *     unit * q[c] ~ x[c] * b[c]
 * Rounding q to 8 bits adds an error some twenty times below that of 2-bit codes themselves. */
typedef struct u_query {
    _Alignas(KVQ_ALIGN) int8_t q[KVQ_D_MAX]; /* zeros beyond d */
    float at_mean;
    float unit[U_MOST_GROUPS], zero[U_MOST_GROUPS]; /* zero: unit * -middle * sum of q */
    int32_t factor[U_MOST_GROUPS]; /* q = x16 * b / 256 * factor / 32768, rounded twice */
} u_query;

/* kvq_u_means without its division where the head is one group: all else would wait for that. */
KV_INLINE size_t u_means(const kvq_kv_shape *sh) {
    const kvq_kv_shape one_group = kvq_plain_shape(KVQ_D_UNIT);
    return sh->group == sh->d ? kvq_u_means(&one_group) : kvq_u_means(sh);
}

/* The units of queries on a block, and their products with its mean. What is read beyond d is of
 * the block, and met by zeros. */
KV_INLINE void u_measure(const int nq, u_query *u, const kvq_query *query, const uint8_t *block,
                         const kvq_kv_shape *sh) {
    const int d = sh->d, group = sh->group, stride = kvq_x16_stride(d);
    const int8_t *const means = (const int8_t *)block + u_means(sh);
    const uint8_t *const channels = block + u_means(sh) + d;
    const vf x_unit = vf_load_first(query->unit, nq);
    const vf mean_unit = vf_mul(vf_set_half(block), x_unit);
    const vf channel_unit = vf_mul(vf_set_half(block + 4), x_unit);
    float of_mean[4];
    vi at_mean[KV_QUERIES];
    vf product[KV_QUERIES];
    for (int i = 0; i < KV_QUERIES; i++) at_mean[i] = vi_zero();
    for (int g = 0, first = 0; first < d; g++, first += group) {
        float unit[4];
        int32_t factor[VF_LANES];
        vi top[KV_QUERIES];
        vf larger[KV_QUERIES];
        for (int i = 0; i < KV_QUERIES; i++) top[i] = vi_zero();
        for (int c = first; c < first + group; c += VS_LANES) {
            const vi scale = vs_load_u8_times_128(channels + c), mean = vs_load_i8(means + c);
            KV_EACH(i, nq) {
                const vi x = vs_load(query->x16 + i * stride + c);
                top[i] = vs_max_abs(top[i], vs_mul(x, scale));
                at_mean[i] = vi_dot16(at_mean[i], x, mean);
            }
        }
        for (int i = 0; i < KV_QUERIES; i++) larger[i] = vs_top(top[i]);
        /* The largest becomes 127, unless it is so small that 16 bits are all that it has. */
        const vf largest = vf_max(vf_largests(larger), vf_set(128.0f));
        const vi rounded = vi_from_vf(vf_div(vf_set(127 * 32768.0f), largest));
        vi_store(factor, rounded);
        vf_store_four(unit,
                      vf_mul(vf_div(vf_set(256 * 32768.0f), vf_from_vi(rounded)), channel_unit));
        KV_EACH(i, nq) {
            u[i].factor[g] = factor[i];
            u[i].unit[g] = unit[i];
        }
    }
    for (int i = 0; i < KV_QUERIES; i++) product[i] = vf_from_vi(at_mean[i]);
    vf_store_four(of_mean, vf_mul(vf_sums(product), mean_unit));
    KV_EACH(i, nq) u[i].at_mean = of_mean[i];
}

/* Queries in 8 bits, once they are measured. */
KV_INLINE void u_round(const int nq, u_query *u, const kvq_query *query, const uint8_t *block,
                       float middle, const kvq_kv_shape *sh) {
    const int d = sh->d, group = sh->group, stride = kvq_x16_stride(d);
    const uint8_t *const channels = block + u_means(sh) + d;
    float sums[4];
    for (int g = 0, first = 0; first < d; g++, first += group) {
        vf sum[KV_QUERIES];
        vi q_sum[KV_QUERIES], factor[KV_QUERIES];
        for (int i = 0; i < KV_QUERIES; i++) q_sum[i] = vi_zero();
        KV_EACH(i, nq) factor[i] = vi_set16((int16_t)u[i].factor[g]);
        const int end = first + group < d ? first + group : stride; /* beyond d are zeros */
        for (int c = first; c < end; c += VS_LANES) {
            const vi scale = vs_load_u8_times_128(channels + c);
            KV_EACH(i, nq) {
                const vi product = vs_mul(vs_load(query->x16 + i * stride + c), scale);
                const vi rounded = vs_mul(product, factor[i]);
                q_sum[i] = vi_dot16(q_sum[i], rounded, vi_set16(1));
                vs_store_i8(u[i].q + c, rounded);
            }
        }
        for (int i = 0; i < KV_QUERIES; i++) sum[i] = vf_from_vi(q_sum[i]);
        vf_store_four(sums, vf_sums(sum));
        KV_EACH(i, nq) u[i].zero[g] = u[i].unit[g] * -middle * sums[i];
    }
}

KV_INLINE void u_score(const int nq, const int bits, float *s, const u_query *u,
                       const uint8_t *block, ptrdiff_t ahead, const kvq_kv_shape *sh) {
    const int n = 32 / bits, fields = 8 / bits, top = (1 << bits) - 1; /* n channels: a word */
    const int span = vd_most(127 * top) / (2 * fields) * n;   /* channels that a sum can take */
    const bool at_once = span >= KVQ_D_MAX;                   /* known: one sum for all of them */
    const size_t stride = (size_t)kvq_u_words(sh, bits) * 32; /* to the next 8 tokens */
    const uint8_t *const codes = block + u_means(sh) + 2 * sh->d;
    const vf token_unit = vf_set(load_half(block + 2));
    const vb low = vb_set(top), next = vb_set(top << bits);
    fetch_lines(block + ahead, (size_t)(codes - block));
    for (int t = 0; t < KVQ_BLOCK; t += VD_TOKENS * VF_LANES) {
        const uint8_t *word = codes + (size_t)(t / 8) * stride;
        for (int g = 0, c = 0; c < sh->d; g++) {
            const int end = (g + 1) * sh->group;
            vi dot[KV_QUERIES][VD_TOKENS];
            KV_EACH(i, nq) KV_TOKENS(v) dot[i][v] = vi_zero();
            do {
                const int stop = at_once || c + span >= end ? end : c + span;
                vd sum[KV_QUERIES][VD_TOKENS];
                KV_EACH(i, nq) KV_TOKENS(v) sum[i][v] = vd_zero();
                for (; c < stop; c += n, word += 32) {
                    vb packed[VD_TOKENS];
                    KV_TOKENS(v) {
                        const uint8_t *const at = word + (size_t)(v * VF_LANES / 8) * stride;
                        packed[v] = vb_load_tokens(at, stride);
                        if (c / n % 2) continue; /* two words to a line */
                        prefetch_line(at + ahead);
                        if (VF_LANES > 8) prefetch_line(at + stride + ahead);
                    }
                    _Pragma("GCC unroll 4") for (int j = 0; j < fields; j += 2) {
                        vb code[VD_TOKENS][2];
                        KV_TOKENS(v) { vd_fields(code[v], packed[v], j, bits, low, next); }
                        KV_EACH(i, nq) {
                            const v8 q = v8_load(u[i].q + c + 4 * j);
                            KV_TOKENS(v) {
                                sum[i][v] = vd_add(sum[i][v], code[v][0], code[v][1], q);
                            }
                        }
                    }
                }
                KV_EACH(i, nq)
                KV_TOKENS(v) dot[i][v] = vi_add(dot[i][v], vd_total(sum[i][v], bits));
            } while (!at_once && c < end);
            const uint8_t *const tokens = block + KVQ_U_SCALES + g * KVQ_BLOCK + t;
            KV_TOKENS(v) {
                const vf a = vf_mul(vf_load_u8(tokens + v * VF_LANES), token_unit);
                KV_EACH(i, nq) {
                    const vf product =
                        vf_fma(vf_from_vi(dot[i][v]), vf_set(u[i].unit[g]), vf_set(u[i].zero[g]));
                    float *const to = s + i * KVQ_BLOCK + t + v * VF_LANES;
                    const vf before = g == 0 ? vf_set(u[i].at_mean) : vf_load(to);
                    vf_store(to, vf_fma(product, a, before));
                }
            }
        }
    }
}

KV_INLINE void score_u_group(const int nq, const int bits, float *s, size_t stride,
                             const kvq_query *query, int first, const kvq_blocks *blocks,
                             const kvq_kv_shape *sh) {
    const kvq_query few = kvq_query_from(query, first, nq, sh->d);
    const float middle = 0.5f * (float)((1 << bits) - 1);
    u_query u[KVQ_BLOCKS_AT_ONCE][KV_QUERIES];
    for (int b = 0; b < blocks->n; b++) u_measure(nq, u[b], &few, blocks->at[b], sh);
    for (int b = 0; b < blocks->n; b++) u_round(nq, u[b], &few, blocks->at[b], middle, sh);
    for (int b = 0; b < blocks->n; b++, s += stride) {
        u_score(nq, bits, s, u[b], blocks->at[b], to_ahead(blocks, b, first == 0), sh);
    }
}

#define U_CODEC(NAME, BITS)                                                                        \
    static void score_##NAME(float *s, const kvq_query *query, const kvq_blocks *blocks,           \
                             const kvq_kv_shape *sh) {                                             \
        const size_t stride = (size_t)query->n * KVQ_BLOCK;                                        \
        KV_IN_GROUPS(query->n, U_GROUP_##BITS);                                                    \
    }
#define U_GROUP(NQ, BITS, FIRST)                                                                   \
    score_u_group(NQ, BITS, s + (FIRST) * KVQ_BLOCK, stride, query, FIRST, blocks, sh)
#define U_GROUP_1(NQ, FIRST) U_GROUP(NQ, 1, FIRST)
#define U_GROUP_2(NQ, FIRST) U_GROUP(NQ, 2, FIRST)
#define U_GROUP_4(NQ, FIRST) U_GROUP(NQ, 4, FIRST)
U_CODEC(u1, 1)
U_CODEC(u2, 2)
U_CODEC(u4, 4)

/* ---- values in integers: c8, t1, t2 ------------------------------------------------------- */

/* What the tokens of a block weigh for one query: p[t] times the scale of token t, as an integer in
 * units of `unit`. It is below 4096 and stands in two planes of six bits (vw in vec_*.h); or, where
 * that is enough, it is at most VW_LOW_MOST and stands in the low plane alone. The rounding is far
 * below the error of the values themselves. A weight of 0 stays 0. */
typedef struct token_weights {
    _Alignas(KVQ_ALIGN) uint8_t high[KVQ_BLOCK], low[KVQ_BLOCK];
    float unit, factor; /* factor: 1 / unit, of p times the code of the scale */
} token_weights;

/* The low plane is enough where the largest weight of the block is at most KV_LOW_ENOUGH of what
 * the result will be divided by (kvq_weights), with scales that are half of the block's largest:
 * 1/16 where the plane takes weights up to 255, 1/32 where up to 127, so rounding moves the result
 * alike. That is no more than rounding to 1 / 4095 does where one token has all the weight and
 * values are alike in size. On models, whose sinks have much weight and small values, it adds a
 * third to the KL of planes of twelve bits everywhere, bytes everywhere more than double it (the
 * table in docs/speed.md). The choice depends on what one query has met up to these blocks, not on
 * what else is computed. */
#define KV_LOW_ENOUGH (VW_LOW_MOST / 4080.0f)
#define KV_USUAL_SCALE 128.0f

/* The units of what the tokens weigh for the queries of a group; returns whether the low plane is
 * enough for all of them. */
KV_INLINE bool measure_weights(const int nq, token_weights *weights, const float *p,
                               const float *sum, const uint8_t *scales, float scale_unit) {
    float factor[4], unit[4];
    bool all_low = VW_LOW_MOST > 0;
    vf top[KV_QUERIES];
    for (int i = 0; i < KV_QUERIES; i++) top[i] = vf_zero();
    for (int t = 0; t < KVQ_BLOCK; t += VF_LANES) {
        const vf scale = vf_load_u8(scales + t);
        KV_EACH(i, nq) top[i] = vf_max(top[i], vf_mul(vf_load(p + i * KVQ_BLOCK + t), scale));
    }
    const vf largest = vf_max(vf_largests(top), vf_set(KV_NEGLIGIBLE));
    vf most = vf_set(4095);
#if VW_LOW_MOST
    const vf divisor = vf_max(vf_load_first(sum, nq), vf_set(1.0f));
    const vf enough = vf_mul(divisor, vf_set(KV_USUAL_SCALE * KV_LOW_ENOUGH));
    const vf spare = vf_sub(enough, largest);
    most = vf_where_negative(spare, most, vf_set(VW_LOW_MOST));
    all_low = (vf_negative(spare) & ((1u << nq) - 1)) == 0; /* other lanes have no query */
#else
    (void)sum;
#endif
    vf_store_four(factor, vf_div(most, largest));
    vf_store_four(unit, vf_mul(vf_div(largest, most), vf_set(scale_unit)));
    KV_EACH(i, nq) {
        weights[i].factor = factor[i];
        weights[i].unit = unit[i];
    }
    return all_low;
}

/* Weights in integers, once they are measured: in the low plane if all the group's queries need no
 * more, else in two. */
KV_INLINE void round_weights(const int nq, token_weights *weights, const float *p,
                             const uint8_t *scales, const bool all_low) {
    for (int t = 0; t < KVQ_BLOCK; t += 4 * VF_LANES) {
        vf scale[4];
        for (int j = 0; j < 4; j++) scale[j] = vf_load_u8(scales + t + j * VF_LANES);
        KV_EACH(i, nq) {
            uint8_t *const high = weights[i].high + t, *const low = weights[i].low + t;
            const vf factor = vf_set(weights[i].factor);
            vi rounded[4];
            for (int j = 0; j < 4; j++) {
                const vf weight = vf_load(p + i * KVQ_BLOCK + t + j * VF_LANES);
                rounded[j] = vi_from_vf(vf_mul(vf_mul(weight, scale[j]), factor));
            }
#if VW_LOW_MOST
            if (all_low) {
                vi_store_bytes(low, rounded);
                continue;
            }
#else
            (void)all_low;
#endif
            vi_store_sixes(high, low, rounded);
        }
    }
}

/* What the tokens of each block weigh; scales_at: where their scales stand in a block. Returns the
 * bits of the blocks whose low planes hold all of it. */
KV_INLINE unsigned weigh_tokens(const int nq, token_weights weights[][KV_QUERIES], const float *p,
                                size_t stride, const float *sum, const kvq_blocks *blocks,
                                size_t scales_at) {
    bool all_low[KVQ_BLOCKS_AT_ONCE];
    unsigned low = 0;
    for (int b = 0; b < blocks->n; b++) {
        const float unit = load_half(blocks->at[b]) * KVQ_LEVEL_UNIT;
        all_low[b] = measure_weights(nq, weights[b], p + (size_t)b * stride, sum,
                                     blocks->at[b] + scales_at, unit);
    }
    for (int b = 0; b < blocks->n; b++) {
        const float *const p_b = p + (size_t)b * stride;
        const uint8_t *const scales = blocks->at[b] + scales_at;
        if (VW_LOW_MOST && all_low[b]) { /* a constant, as it mostly is */
            round_weights(nq, weights[b], p_b, scales, true);
            low |= 1u << b;
        } else
            round_weights(nq, weights[b], p_b, scales, false);
    }
    return low;
}

/* s0 and s1 weighed by what the tokens from t on weigh for one query, and what such sums come to.
 */
#if VW_LOW_MOST
#define KV_LOW_PLANE(RESULT)                                                                       \
    if (all_low) return RESULT;
#else
#define KV_LOW_PLANE(RESULT) (void)all_low;
#endif
KV_INLINE vw vw_weigh(const bool all_low, vw sum, const token_weights *weights, int t, vb s0,
                      vb s1) {
    KV_LOW_PLANE(vw_add_low(true, sum, v8_load(weights->low + t), s0, s1))
    return vw_add(sum, v8_load(weights->high + t), v8_load(weights->low + t), s0, s1);
}
KV_INLINE vp vp_weigh(const int nq, const bool all_low, vp sum, const token_weights *weights, int t,
                      vb s0, vb s1) {
    (void)nq;
    KV_LOW_PLANE(vp_add_low(nq < KV_QUERIES, sum, v16_load(weights->low + t), s0, s1))
    return vp_add(sum, v16_load(weights->high + t), v16_load(weights->low + t), s0, s1);
}
KV_INLINE vi vw_weighed(const bool all_low, vw sum) {
    KV_LOW_PLANE(vw_total_low(sum))
    return vw_total(sum);
}
KV_INLINE vi vp_weighed(const bool all_low, vp x, vp y) {
    KV_LOW_PLANE(vp_total_low(x, y))
    return vp_total(x, y);
}
#undef KV_LOW_PLANE

/* The points of the pairs at tokens t .. t + 7 and t + 8 .. t + 15, weighed into the sums of every
 * query. */
KV_INLINE void c8_add(const int nq, const bool all_low, vp *x, vp *y, vb code0, vb code1,
                      const token_weights *weights, int t) {
    const vb x_of = vb_set8(kvq_c8_x), y_of = vb_set8(kvq_c8_y);
    const vb x0 = vb_lookup16(x_of, code0), x1 = vb_lookup16(x_of, code1);
    const vb y0 = vb_lookup16(y_of, code0), y1 = vb_lookup16(y_of, code1);
    KV_EACH(i, nq) {
        x[i] = vp_weigh(nq, all_low, x[i], &weights[i], t, x0, x1);
        y[i] = vp_weigh(nq, all_low, y[i], &weights[i], t, y0, y1);
    }
}

/* VF_LANES channels, half as many pairs. */
KV_INLINE void c8_weigh(const int nq, const bool all_low, float *o, int d, const uint8_t *words,
                        const token_weights *weights) {
    const vb two_bits = vb_set(3);
    vp x[KV_QUERIES], y[KV_QUERIES];
    vb word[3];
    KV_READ_AGAIN();
    KV_EACH(i, nq) x[i] = y[i] = vp_zero();
    _Pragma("GCC unroll 3") for (int w = 0; w < 3; w++) {
        word[w] = vb_load_pairs(words + 64 * w);
        c8_add(nq, all_low, x, y, word[w], vi_shr(word[w], 3), weights, 16 * w);
    }
    c8_add(nq, all_low, x, y, vb_select(two_bits, vi_shr(word[0], 6), vi_shr(word[2], 4)),
           vb_select(two_bits, vi_shr(word[1], 6), vi_shr(word[2], 5)), weights, 48);
    KV_EACH(i, nq) {
        const vf sum = vf_from_vi(vp_weighed(all_low, x[i], y[i]));
        float *const to = o + i * d;
        vf_store(to, vf_fma(sum, vf_set(weights[i].unit), vf_load(to)));
    }
}

KV_INLINE void accum_c8_group(const int nq, float *o, const float *p, size_t stride,
                              const float *sum, const kvq_blocks *blocks, bool first_queries,
                              const kvq_kv_shape *sh) {
    const int d = sh->d, group = sh->group;
    size_t scales_at = KVQ_C8_SCALES;
    for (int first = 0; first < d; first += group, scales_at += KVQ_BLOCK) {
        token_weights weights[KVQ_BLOCKS_AT_ONCE][KV_QUERIES];
        const unsigned low = weigh_tokens(nq, weights, p, stride, sum, blocks, scales_at);
        for (int b = 0; b < blocks->n; b++) {
            const uint8_t *const words = blocks->at[b] + kvq_c8_words(sh);
            const ptrdiff_t ahead = to_ahead(blocks, b, first_queries);
            fetch_lines(blocks->at[b] + scales_at + ahead, KVQ_BLOCK);
            for (int c = first; c < first + group; c += VF_LANES) {
                const uint8_t *const at = words + c / 16 * 192 + c % 16 * 4;
                if (c % 16 == 0) fetch_lines(at + ahead, 192);
                if (VW_LOW_MOST && low >> b & 1)
                    c8_weigh(nq, true, o + c, d, at, weights[b]);
                else
                    c8_weigh(nq, false, o + c, d, at, weights[b]);
            }
        }
    }
}

static void accum_c8(float *o, const kvq_weights *weights, const kvq_blocks *blocks,
                     const kvq_kv_shape *sh) {
    const size_t stride = (size_t)weights->n * KVQ_BLOCK;
#define GROUP(NQ, FIRST)                                                                           \
    accum_c8_group(NQ, o + (FIRST) * sh->d, weights->p + (FIRST) * KVQ_BLOCK, stride,              \
                   weights->sum + (FIRST), blocks, (FIRST) == 0, sh)
    KV_IN_GROUPS(weights->n, GROUP);
#undef GROUP
}
