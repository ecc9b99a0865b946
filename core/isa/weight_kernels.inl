/* weight_kernels.inl: products of weights with activations, in vector words (vec_*.h). Included by
 * isa_*.c with the target switched on, for its table: `quantize`, and a matmul_NAME for each row of
 * weights.def.
 *
 * Quantized weights. VF_LANES rows make a panel, a row to a lane. A tile is up to TILE_BLOCKS
 * blocks of 32 columns of a panel, unpacked to bytes on the stack so that any number of tokens can
 * share the unpacking: code vector i of a block holds, in lane r, columns 4i to 4i + 3 of row r.
 * Multiplied by the same four columns of a token in all lanes, eight such vectors give the integer
 * dot products of the block for all the rows at once, with no sum across lanes, and
 *     sum[r] += scale_of_x * (scale[r] * (codes[r] . q) + minimum[r] * (sum of q)).
 * Each sum is one chain over the blocks from first to last, however many tokens and rows come
 * together: their number changes no bit of a result.
 *
 * Float weights are multiplied with the f32 activations, columns in lanes.
 */
#define WEIGHT_INLINE static inline __attribute__((always_inline))

#define TILE_BLOCKS 8   /* a super-block of 256 columns */
#define TILE_TOKENS 4   /* that share each load of codes */
#define CHUNK_TOKENS 64 /* whose q should stay in L2 while the rows pass by */

typedef struct weight_tile {
    vb codes[TILE_BLOCKS][8];    /* [block][4 columns] */
    vf scale[TILE_BLOCKS];       /* of each row */
    vf minimum[TILE_BLOCKS];     /* not for Q8_0, Q6_K */
    vi half_scales[TILE_BLOCKS]; /* Q6_K: two i16 per lane, for the halves of the block */
} weight_tile;

/* ---- unpacking: `n` blocks from `p`, which points at the panel's first row ------------------- */

typedef void unpack_fn(weight_tile *tile, const uint8_t *p, size_t stride, int n);

/* 16 bytes of nibbles per row: low halves are columns 0 to 15, high halves columns 16 to 31. */
WEIGHT_INLINE void unpack_nibbles(vb codes[8], const uint8_t *p, size_t stride) {
    const vb low = vb_set(15);
    vb raw[4];
    vb_load_quads(raw, p, stride);
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        codes[i] = vb_and(raw[i], low);
        codes[4 + i] = vb_shr(raw[i], 4, low);
    }
}

WEIGHT_INLINE void add_fifth_bits(vb codes[8], vi bits) {
    vb sixteens[8];
    vb_spread_bits(sixteens, bits);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) codes[i] = vi_or(codes[i], sixteens[i]);
}

WEIGHT_INLINE void unpack_Q4_0(weight_tile *tile, const uint8_t *p, size_t stride, int n) {
    for (int b = 0; b < n; b++, p += 18) {
        tile->scale[b] = vf_from_f16_low(vi_load_rows(p, stride));
        tile->minimum[b] = vf_mul(tile->scale[b], vf_set(-8));
        unpack_nibbles(tile->codes[b], p + 2, stride);
    }
}

WEIGHT_INLINE void unpack_Q4_1(weight_tile *tile, const uint8_t *p, size_t stride, int n) {
    for (int b = 0; b < n; b++, p += 20) {
        const vi pair = vi_load_rows(p, stride);
        tile->scale[b] = vf_from_f16_low(pair);
        tile->minimum[b] = vf_from_f16_low(vi_shr(pair, 16));
        unpack_nibbles(tile->codes[b], p + 4, stride);
    }
}

WEIGHT_INLINE void unpack_Q5_0(weight_tile *tile, const uint8_t *p, size_t stride, int n) {
    for (int b = 0; b < n; b++, p += 22) {
        tile->scale[b] = vf_from_f16_low(vi_load_rows(p, stride));
        tile->minimum[b] = vf_mul(tile->scale[b], vf_set(-16));
        unpack_nibbles(tile->codes[b], p + 6, stride);
        add_fifth_bits(tile->codes[b], vi_load_rows(p + 2, stride));
    }
}

WEIGHT_INLINE void unpack_Q5_1(weight_tile *tile, const uint8_t *p, size_t stride, int n) {
    for (int b = 0; b < n; b++, p += 24) {
        const vi pair = vi_load_rows(p, stride);
        tile->scale[b] = vf_from_f16_low(pair);
        tile->minimum[b] = vf_from_f16_low(vi_shr(pair, 16));
        unpack_nibbles(tile->codes[b], p + 8, stride);
        add_fifth_bits(tile->codes[b], vi_load_rows(p + 4, stride));
    }
}

WEIGHT_INLINE void unpack_Q8_0(weight_tile *tile, const uint8_t *p, size_t stride, int n) {
    for (int b = 0; b < n; b++, p += 34) {
        tile->scale[b] = vf_from_f16_low(vi_load_rows(p, stride));
        vb_load_quads(tile->codes[b], p + 2, stride);
        vb_load_quads(tile->codes[b] + 4, p + 18, stride);
    }
}

/* The first 16 bytes of Q4_K and Q5_K: two f16 and the 6-bit scales and minima (see weights.c). */
WEIGHT_INLINE void unpack_scales_and_minima(weight_tile *tile, const uint8_t *p, size_t stride) {
    const vb six = vb_set(63), low = vb_set(15), high = vb_set(48);
    vb head[4];
    vb_load_quads(head, p, stride);
    const vf unit = vf_from_f16_low(head[0]), unit_minimum = vf_from_f16_low(vi_shr(head[0], 16));
    const vb scales[2] = {vb_and(head[1], six),
                          vi_or(vb_and(head[3], low), vb_shr(head[1], 2, high))};
    const vb minima[2] = {vb_and(head[2], six),
                          vi_or(vb_shr(head[3], 4, low), vb_shr(head[2], 2, high))};
#pragma GCC unroll 8
    for (int b = 0; b < 8; b++) {
        const vi byte = vi_set(255);
        const vi scale = vi_and(vi_shr(scales[b / 4], b % 4 * 8), byte);
        const vi minimum = vi_and(vi_shr(minima[b / 4], b % 4 * 8), byte);
        tile->scale[b] = vf_mul(unit, vf_from_vi(scale));
        tile->minimum[b] = vf_mul(vf_mul(unit_minimum, vf_set(-1)), vf_from_vi(minimum));
    }
}

/* 32 bytes of nibbles per row: low halves are block b, high halves block b + 1. */
WEIGHT_INLINE void unpack_nibbles_of_two(weight_tile *tile, int b, const uint8_t *p,
                                         size_t stride) {
    const vb low = vb_set(15);
    vb raw[8];
    vb_load_quads(raw, p, stride);
    vb_load_quads(raw + 4, p + 16, stride);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        tile->codes[b][i] = vb_and(raw[i], low);
        tile->codes[b + 1][i] = vb_shr(raw[i], 4, low);
    }
}

WEIGHT_INLINE void unpack_Q4_K(weight_tile *tile, const uint8_t *p, size_t stride, int n) {
    (void)n; /* always a whole super-block */
    unpack_scales_and_minima(tile, p, stride);
#pragma GCC unroll 8
    for (int b = 0; b < 8; b += 2) unpack_nibbles_of_two(tile, b, p + 16 + b * 16, stride);
}

WEIGHT_INLINE void unpack_Q5_K(weight_tile *tile, const uint8_t *p, size_t stride, int n) {
    (void)n;
    const vb sixteen = vb_set(16);
    vb fifth[8]; /* [4 columns], bit b of each byte for block b */
    unpack_scales_and_minima(tile, p, stride);
    vb_load_quads(fifth, p + 16, stride);
    vb_load_quads(fifth + 4, p + 32, stride);
#pragma GCC unroll 8
    for (int b = 0; b < 8; b += 2) unpack_nibbles_of_two(tile, b, p + 48 + b * 16, stride);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
#pragma GCC unroll 8
        for (int b = 0; b < 8; b++) {
            const vb bit =
                b < 4 ? vb_shl(fifth[i], 4 - b, sixteen) : vb_shr(fifth[i], b - 4, sixteen);
            tile->codes[b][i] = vi_or(tile->codes[b][i], bit);
        }
    }
}

WEIGHT_INLINE void unpack_Q6_K(weight_tile *tile, const uint8_t *p, size_t stride, int n) {
    (void)n;
    const vb low = vb_set(15), high = vb_set(48);
    const vf unit = vf_from_f16_low(vi_shr(vi_load_rows(p + 206, stride), 16));
    vb scales[4]; /* [2 blocks], 4 scales per lane */
    vb_load_quads(scales, p + 192, stride);
#pragma GCC unroll 8
    for (int b = 0; b < 8; b++) {
        tile->scale[b] = unit;
        tile->half_scales[b] = vi_pair_i8(scales[b / 2], b % 2);
    }
#pragma GCC unroll 8
    for (int half = 0; half < 2; half++) {
        vb top[8];
        vb_load_quads(top, p + 128 + half * 32, stride);
        vb_load_quads(top + 4, p + 144 + half * 32, stride);
#pragma GCC unroll 8
        for (int run = 0; run < 2; run++) { /* blocks `run` and `run` + 2 of the half share bytes */
            vb raw[8];
            vb_load_quads(raw, p + half * 64 + run * 32, stride);
            vb_load_quads(raw + 4, p + half * 64 + run * 32 + 16, stride);
            vb *const first = tile->codes[half * 4 + run];
            vb *const second = tile->codes[half * 4 + run + 2];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const vb of_first = run == 0 ? vb_shl(top[i], 4, high) : vb_shl(top[i], 2, high);
                const vb of_second = run == 0 ? vb_and(top[i], high) : vb_shr(top[i], 2, high);
                first[i] = vi_or(vb_and(raw[i], low), of_first);
                second[i] = vi_or(vb_shr(raw[i], 4, low), of_second);
            }
        }
    }
}

/* ---- dot products: a block times `n_tok` tokens, a constant in each instance ----------------- */

/* The activations of the first token, at the tile's first column; rows follow at their strides. */
typedef struct token_cursor {
    const int8_t *q;
    const float *scale;
    const int16_t *sums;
    size_t n_cols;
} token_cursor;

/* value[n_tok]: sums over block b of a tile, lanes are rows, to be multiplied by load_scale yet. */
typedef void dot_fn(vf *value, const weight_tile *tile, int b, const token_cursor *x,
                    const int n_tok);

WEIGHT_INLINE vi load_quad(const token_cursor *x, int t, int b, int i) {
    return vi_set_lanes(x->q + (size_t)t * x->n_cols + b * 32 + i * 4);
}
WEIGHT_INLINE vf load_scale(const token_cursor *x, int t, int b) {
    return vf_set(x->scale[(size_t)t * (x->n_cols / 32) + (size_t)b]);
}
WEIGHT_INLINE vi load_sums(const token_cursor *x, int t, int b) {
    return vi_set_lanes(x->sums + (size_t)t * (x->n_cols / 16) + b * 2);
}

/* Unsigned codes with a scale and a minimum. Pairs of products are summed in i16 over `chain` code
 * vectors, then widened. As |q| <= 127, no sum can leave i16:
 *     4 bits, chain 8:  15 * 127 * 2 * 8 = 30480
 *     5 bits, chain 4:  31 * 127 * 2 * 4 = 31496 */
WEIGHT_INLINE void dot_affine(vf *value, const weight_tile *tile, int b, const token_cursor *x,
                              const int n_tok, const int chain) {
    vi dot[TILE_TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < n_tok; t++) dot[t] = vi_zero();
#pragma GCC unroll 8
    for (int first = 0; first < 8; first += chain) {
        vi dot16[TILE_TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < n_tok; t++) dot16[t] = vi_zero();
#pragma GCC unroll 8
        for (int i = first; i < first + chain; i++) {
            const vb codes = tile->codes[b][i];
#pragma GCC unroll 4
            for (int t = 0; t < n_tok; t++) {
                const vi pairs = vi_madd_u8s8(codes, load_quad(x, t, b, i));
                dot16[t] = vi_keep(vi_add16(dot16[t], pairs));
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < n_tok; t++) dot[t] = vi_add(dot[t], vi_widen16(dot16[t]));
    }
#pragma GCC unroll 4
    for (int t = 0; t < n_tok; t++) {
        const vf sum_q = vf_from_vi(vi_widen16(load_sums(x, t, b)));
        const vf scaled = vf_mul(vf_from_vi(dot[t]), tile->scale[b]);
        value[t] = vf_fma(sum_q, tile->minimum[b], scaled);
    }
}

WEIGHT_INLINE void dot_4_bits(vf *value, const weight_tile *tile, int b, const token_cursor *x,
                              const int n_tok) {
    dot_affine(value, tile, b, x, n_tok, 8);
}
WEIGHT_INLINE void dot_5_bits(vf *value, const weight_tile *tile, int b, const token_cursor *x,
                              const int n_tok) {
    dot_affine(value, tile, b, x, n_tok, 4);
}

/* Signed codes: w * q as |w| * (q with the sign of w). A pair of products, widened at once, is at
 * most 128 * 127 * 2 = 32512: inside i16. */
WEIGHT_INLINE void dot_signed(vf *value, const weight_tile *tile, int b, const token_cursor *x,
                              const int n_tok) {
    vi dot[TILE_TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < n_tok; t++) dot[t] = vi_zero();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const vb codes = tile->codes[b][i], magnitude = vb_abs(codes);
#pragma GCC unroll 4
        for (int t = 0; t < n_tok; t++) {
            const vb q = vb_sign(load_quad(x, t, b, i), codes);
            dot[t] = vi_keep(vi_dot4_u8s8(dot[t], magnitude, q));
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < n_tok; t++) value[t] = vf_mul(vf_from_vi(dot[t]), tile->scale[b]);
}

/* Q6_K: codes of 0 to 63 that stand for -32 to 31, and an integer scale for each half of a block.
 * Pairs of two code vectors fit i16, 63 * 127 * 2 * 2 = 32004; the scale is multiplied in as they
 * are widened. The integer of a block, the sum of scale * (code - 32) * q, is at most
 * 128 * 32 * 127 * 32 < 2^24: exact in f32. */
WEIGHT_INLINE void dot_Q6_K(vf *value, const weight_tile *tile, int b, const token_cursor *x,
                            const int n_tok) {
    const vi half_scales = tile->half_scales[b];
    vi dot[TILE_TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < n_tok; t++) dot[t] = vi_zero();
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        const vi scale = i < 4 ? vi_low16(half_scales) : vi_high16(half_scales);
        const vb codes = tile->codes[b][i], next = tile->codes[b][i + 1];
#pragma GCC unroll 4
        for (int t = 0; t < n_tok; t++) {
            const vi dot16 = vi_add16(vi_madd_u8s8(codes, load_quad(x, t, b, i)),
                                      vi_madd_u8s8(next, load_quad(x, t, b, i + 1)));
            dot[t] = vi_keep(vi_add(dot[t], vi_madd16(dot16, scale)));
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < n_tok; t++) {
        const vi zero_point = vi_shl(vi_madd16(load_sums(x, t, b), half_scales), 5);
        value[t] = vf_mul(vf_from_vi(vi_sub(dot[t], zero_point)), tile->scale[b]);
    }
}

/* ---- the product of quantized weights -------------------------------------------------------- */

/* Adds the n blocks of a tile to sum[n_tok], n_tok constant, or starts it with them. */
WEIGHT_INLINE void multiply_tile(vf *sum, bool start, const weight_tile *tile, int n,
                                 const token_cursor *x, const int n_tok, dot_fn *dot) {
    vf total[TILE_TOKENS], value[TILE_TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < n_tok; t++) total[t] = start ? vf_zero() : sum[t];
    for (int b = 0; b < n; b++) {
        dot(value, tile, b, x, n_tok);
#pragma GCC unroll 4
        for (int t = 0; t < n_tok; t++) total[t] = vf_fma(value[t], load_scale(x, t, b), total[t]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < n_tok; t++) sum[t] = total[t];
}

/* sum[n_tok], lanes are rows: the whole of a panel for a chunk of tokens. Meanwhile the next panel,
 * `ahead` unless NULL, is fetched in the order of memory: eight short streams, a row each, are more
 * than the hardware's prefetchers follow. */
WEIGHT_INLINE void multiply_panel(vf *sum, const uint8_t *w, size_t stride, const uint8_t *ahead,
                                  token_cursor x, int n_tok, size_t bytes_tile, unpack_fn *unpack,
                                  dot_fn *dot) {
    weight_tile tile;
    size_t n_blocks = x.n_cols / 32;
    bool start = true;
    while (n_blocks > 0) {
        const int n = n_blocks < TILE_BLOCKS ? (int)n_blocks : TILE_BLOCKS;
        if (ahead) {
            for (size_t i = 0; i < bytes_tile * VF_LANES; i += 64) prefetch_line(ahead + i);
            ahead += bytes_tile * VF_LANES;
        }
        unpack(&tile, w, stride, n);
        token_cursor at = x;
        for (int t = 0; t < n_tok;) {
            const int group = n_tok - t < TILE_TOKENS ? 1 : TILE_TOKENS;
            if (group == 1) {
                multiply_tile(sum + t, start, &tile, n, &at, 1, dot);
            } else {
                multiply_tile(sum + t, start, &tile, n, &at, TILE_TOKENS, dot);
            }
            at.q += (size_t)group * x.n_cols;
            at.scale += (size_t)group * (x.n_cols / 32);
            at.sums += (size_t)group * (x.n_cols / 16);
            t += group;
        }
        start = false;
        w += bytes_tile;
        x.q += n * 32;
        x.scale += n;
        x.sums += n * 2;
        n_blocks -= (size_t)n;
    }
}

/* bytes_tile: of TILE_BLOCKS blocks of a row. */
WEIGHT_INLINE void multiply(float *y, size_t y_stride, const uint8_t *w, size_t n_rows,
                            const kvq_activations *x, size_t bytes_tile, unpack_fn *unpack,
                            dot_fn *dot) {
    const size_t n_blocks = x->n_cols / 32, stride = n_blocks * bytes_tile / TILE_BLOCKS;
    vf sum[CHUNK_TOKENS];

    for (size_t first = 0; first < x->n_tok; first += CHUNK_TOKENS) {
        const size_t left = x->n_tok - first;
        const int n_tok = left < CHUNK_TOKENS ? (int)left : CHUNK_TOKENS;
        float *const out = y + first * y_stride;
        const token_cursor at = {x->q + first * x->n_cols, x->scale + first * n_blocks,
                                 x->sums + first * n_blocks * 2, x->n_cols};
        if (n_rows < VF_LANES) { /* one row in all lanes: a panel must not read past the last row */
            for (size_t r = 0; r < n_rows; r++) {
                multiply_panel(sum, w + r * stride, 0, NULL, at, n_tok, bytes_tile, unpack, dot);
                for (int t = 0; t < n_tok; t++) out[(size_t)t * y_stride + r] = vf_first(sum[t]);
            }
            continue;
        }
        for (size_t r = 0; r < n_rows; r += VF_LANES) {
            /* The last panel may overlap the one before; it gives the same values again. */
            const size_t row = r + VF_LANES <= n_rows ? r : n_rows - VF_LANES;
            const uint8_t *const ahead =
                row + 2 * VF_LANES <= n_rows ? w + (row + VF_LANES) * stride : NULL;
            multiply_panel(sum, w + row * stride, stride, ahead, at, n_tok, bytes_tile, unpack,
                           dot);
            for (int t = 0; t < n_tok; t++) vf_store(out + (size_t)t * y_stride + row, sum[t]);
        }
    }
}

#define QUANTIZED_PRODUCT(NAME, BYTES_TILE, DOT)                                                   \
    static void matmul_##NAME(float *y, size_t y_stride, const uint8_t *w, size_t n_rows,          \
                              const kvq_activations *x) {                                          \
        multiply(y, y_stride, w, n_rows, x, BYTES_TILE, unpack_##NAME, DOT);                       \
    }
QUANTIZED_PRODUCT(Q4_0, 18 * 8, dot_4_bits)
QUANTIZED_PRODUCT(Q4_1, 20 * 8, dot_4_bits)
QUANTIZED_PRODUCT(Q5_0, 22 * 8, dot_5_bits)
QUANTIZED_PRODUCT(Q5_1, 24 * 8, dot_5_bits)
QUANTIZED_PRODUCT(Q8_0, 34 * 8, dot_signed)
QUANTIZED_PRODUCT(Q4_K, 144, dot_4_bits)
QUANTIZED_PRODUCT(Q5_K, 176, dot_5_bits)
QUANTIZED_PRODUCT(Q6_K, 210, dot_Q6_K)
#undef QUANTIZED_PRODUCT

/* ---- the product of float weights ------------------------------------------------------------ */

#define FLOAT_ROWS 4   /* of one token: chains enough to hide the latency of fma */
#define FLOAT_TOKENS 4 /* of two rows */
#define FLOAT_BLOCK 32 /* rows that stay in cache while the tokens pass by */

typedef vf load_floats_fn(const uint8_t *p); /* VF_LANES weights */

/* y of n_rows by n_tok, constants in each instance; each is one chain of VF_LANES partial sums. The
 * rows that follow, `ahead` unless NULL, are fetched meanwhile. */
WEIGHT_INLINE void multiply_floats_tile(float *y, size_t y_stride, const uint8_t *w,
                                        const uint8_t *ahead, const int n_rows, const float *x,
                                        const int n_tok, size_t n_cols, const int bytes,
                                        load_floats_fn *load) {
    const size_t stride = n_cols * (size_t)bytes, whole = n_cols / VF_LANES * VF_LANES;
    vf sum[FLOAT_ROWS][FLOAT_TOKENS];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 4
        for (int t = 0; t < n_tok; t++) sum[r][t] = vf_zero();
    }
    for (size_t c = 0; c < whole; c += VF_LANES) {
        vf columns[FLOAT_TOKENS];
        if (ahead) {
            for (int i = 0; i < n_rows * VF_LANES * bytes; i += 64) prefetch_line(ahead + i);
            ahead += n_rows * VF_LANES * bytes;
        }
#pragma GCC unroll 4
        for (int t = 0; t < n_tok; t++) columns[t] = vf_load(x + (size_t)t * n_cols + c);
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++) {
            const vf weights = load(w + (size_t)r * stride + c * (size_t)bytes);
#pragma GCC unroll 4
            for (int t = 0; t < n_tok; t++) sum[r][t] = vf_fma(weights, columns[t], sum[r][t]);
        }
    }
    if (whole < n_cols) { /* the last columns, with zeros after them */
        const size_t rest = n_cols - whole;
        float columns[VF_LANES] = {0};
        uint8_t weights[VF_LANES * sizeof(float)] = {0};
        for (int r = 0; r < n_rows; r++) {
            memcpy(weights, w + (size_t)r * stride + whole * (size_t)bytes, rest * (size_t)bytes);
            for (int t = 0; t < n_tok; t++) {
                memcpy(columns, x + (size_t)t * n_cols + whole, rest * sizeof(float));
                sum[r][t] = vf_fma(load(weights), vf_load(columns), sum[r][t]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 4
        for (int t = 0; t < n_tok; t++) y[(size_t)t * y_stride + (size_t)r] = vf_sum(sum[r][t]);
    }
}

WEIGHT_INLINE void multiply_floats(float *y, size_t y_stride, const uint8_t *w, size_t n_rows,
                                   const kvq_activations *x, int bytes, load_floats_fn *load) {
    const size_t n_cols = x->n_cols, stride = n_cols * (size_t)bytes;
    for (size_t first = 0; first < n_rows; first += FLOAT_BLOCK) {
        const size_t end = n_rows - first < FLOAT_BLOCK ? n_rows : first + FLOAT_BLOCK;
        size_t t = 0;
#define TILE(ROWS, TOKENS)                                                                         \
    multiply_floats_tile(y + t * y_stride + r, y_stride, w + r * stride,                           \
                         r + 2 * (ROWS) <= n_rows ? w + (r + (ROWS)) * stride : NULL, ROWS,        \
                         x->x + t * n_cols, TOKENS, n_cols, bytes, load)
        for (; t + FLOAT_TOKENS <= x->n_tok; t += FLOAT_TOKENS) {
            size_t r = first;
            for (; r + 2 <= end; r += 2) TILE(2, FLOAT_TOKENS);
            for (; r < end; r++) TILE(1, FLOAT_TOKENS);
        }
        for (; t < x->n_tok; t++) {
            size_t r = first;
            for (; r + FLOAT_ROWS <= end; r += FLOAT_ROWS) TILE(FLOAT_ROWS, 1);
            for (; r < end; r++) TILE(1, 1);
        }
#undef TILE
    }
}

WEIGHT_INLINE vf load_F32(const uint8_t *p) { return vf_load((const float *)(const void *)p); }
WEIGHT_INLINE vf load_F16(const uint8_t *p) {
    return vf_load_f16((const uint16_t *)(const void *)p);
}
WEIGHT_INLINE vf load_BF16(const uint8_t *p) { return vf_load_bf16(p); }

#define FLOAT_PRODUCT(NAME, BYTES)                                                                 \
    static void matmul_##NAME(float *y, size_t y_stride, const uint8_t *w, size_t n_rows,          \
                              const kvq_activations *x) {                                          \
        multiply_floats(y, y_stride, w, n_rows, x, BYTES, load_##NAME);                            \
    }
FLOAT_PRODUCT(F32, 4)
FLOAT_PRODUCT(F16, 2)
FLOAT_PRODUCT(BF16, 2)
#undef FLOAT_PRODUCT

/* ---- activations ----------------------------------------------------------------------------- */

/* scale = the largest magnitude of 32 columns / 127, and q = x / scale to the nearest integer, ties
 * to even. Where the scale would be subnormal (magnitudes below 1.5e-36) the block is zero: its
 * inverse overflows. An infinity or NaN makes the scale one, and so every product with it infinite
 * or NaN. */
static void quantize(kvq_activations *x, size_t first, size_t n) {
    const size_t n_blocks = x->n_cols / 32;
    for (size_t b = first * n_blocks; b < (first + n) * n_blocks; b++) {
        const float *const columns = x->x + b * 32;
        const float scale = vf_abs_max32(columns) / 127.0f;
        const bool zero = scale < 0x1p-126f;
        x->scale[b] = zero ? 0.0f : scale;
        const vb q = vb_from_scaled_f32(columns, zero ? 0.0f : 1.0f / scale);
        vb_store(x->q + b * 32, q);
        vb_sum_halves(x->sums + b * 2, q);
    }
}
