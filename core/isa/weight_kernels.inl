/* weight_kernels.inl: products of weights with activations, in vector words (vec_*.h). Included by
 * isa_*.c with the target switched on, for its table: `quantize`, and a matmul_NAME for each row of
 * weights.def. How codes are held and multiplied is the matter of weight_codes_i16.inl or
 * weight_codes_i8.inl, one of which is included before.
 *
 * Quantized weights. VF_LANES rows are taken together, a row to a lane. A code vector of a block of
 * 32 columns holds, in lane r, a few columns of row r. Multiplied by the same columns of a token in
 * all lanes, such vectors give the integer dot products of the block for all the rows at once, with
 * no sum across lanes. A tile is up to TILE_BLOCKS blocks of these rows, whose activations share a
 * scale:
 *     sum[r] += scale_of_x * (the sum over blocks of
 *                             scale[r] * (codes[r] . q) + minimum[r] * (sum of q)).
 * For a token alone the codes are multiplied as they are unpacked, in registers; for more they are
 * kept on the stack, so that all share the unpacking, and PANEL_VECTORS tiles, a panel, share each
 * load of activations. Each sum is one chain over the tiles from first to last, and so is a tile's
 * over its blocks, however many tokens and rows come together: their number changes no bit of a
 * result.
 *
 * As |q| < 2^14, integers of a block stay inside i32:
 *     4 and 5 bits:  31 * 2^14 * 32 < 2^24, exact in f32 too
 *     Q8_0:         128 * 2^14 * 32 = 2^26
 *     Q6_K:    32 * 128 * KVQ_ACTIVATION_MAX * 32 = 2^31 - 2^17, its scales being integers
 *
 * Float weights are multiplied with the f32 activations, columns in lanes.
 */
#define TILE_BYTES 272   /* of a row, at most: 8 blocks of Q8_0 */
#define CHUNK_TOKENS 128 /* whose q should stay in L2 or L3 while the rows pass by */

/* ---- unpacking --------------------------------------------------------------------------- */

/* The bytes of a tile, transposed: lane r of word i is bytes 4 i to 4 i + 3 of row r. */
typedef vi tile_words[TILE_BYTES / 4 + 1];

/* Bytes byte to byte + 3 of the rows; `byte` is even. */
WEIGHT_INLINE vi word_at(const vi *words, int byte) {
    return byte % 4 == 0 ? words[byte / 4] : vi_join16(words[byte / 4], words[byte / 4 + 1]);
}

/* Loads `bytes` of each row, an even number of 16 or more; nothing beyond them is read. */
WEIGHT_INLINE void load_words(vi *words, const uint8_t *p, size_t stride, size_t bytes) {
    const int rest = (int)(bytes % 16);
    const size_t whole = bytes - (size_t)rest;
    vi_load_words(words, p, stride, whole);
    if (rest == 0) return;
    vi last[5]; /* the last 16 bytes, which overlap the others */
    vi_load_words(last, p + bytes - 16, stride, 16);
    last[4] = vi_zero();
    words += whole / 4;
    for (int byte = 16 - rest; byte < 16; byte += 4) *words++ = word_at(last, byte);
}

/* Unpacks `n` blocks: puts their codes and scales into a tile. Meanwhile as many bytes of the rows
 * that come next are fetched from `ahead` as n blocks of VF_LANES rows have. */
typedef void unpack_fn(weight_tile *tile, const vi *words, int n, const int16_t *q,
                       const uint8_t *ahead);

/* Fetches the next rows in the order of memory while others are multiplied: streams of a row each
 * are more than the hardware's prefetchers follow. A few lines at a time, or loads that find their
 * line in L2 wait behind all those that come from memory. NULL stays NULL. */
WEIGHT_INLINE const uint8_t *fetch(const uint8_t *ahead, size_t bytes) {
    if (!ahead) return NULL;
    for (size_t i = 0; i < bytes; i += 64) prefetch_line(ahead + i);
    return ahead + bytes;
}

/* The low halves of bytes, or the high ones. */
WEIGHT_INLINE vb nibbles_of(vb bytes, int high) {
    const vb low = vb_set(15);
    return high ? vb_shr(bytes, 4, low) : vb_and(bytes, low);
}

/* 16 bytes of nibbles per row: low halves are columns 0 to 15, high halves columns 16 to 31. */
WEIGHT_INLINE void put_4_bits(weight_tile *tile, int b, const vi *words, int byte, int zero,
                              const int16_t *q) {
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        put_nibbles(tile, b, i, b, 4 + i, word_at(words, byte + 4 * i), zero, q);
    }
}

/* The same after 4 bytes of fifth bits. */
WEIGHT_INLINE void put_5_bits(weight_tile *tile, int b, const vi *words, int byte, int zero,
                              const int16_t *q) {
    vb sixteens[8];
    vb_spread_bits(sixteens, word_at(words, byte));
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        const vb raw = word_at(words, byte + 4 + 4 * i);
        put_quad(tile, b, i, vi_or(nibbles_of(raw, 0), sixteens[i]), zero, q);
        put_quad(tile, b, 4 + i, vi_or(nibbles_of(raw, 1), sixteens[4 + i]), zero, q);
    }
}

/* The f16 at `byte`. */
WEIGHT_INLINE vf half_at(const vi *words, int byte) {
    const vi word = words[byte / 4];
    return vf_from_f16_low(byte % 4 == 0 ? word : vi_shr(word, 16));
}

/* Block b of a tile, whose bytes start at `byte` of the words. */
typedef void unpack_block_fn(weight_tile *tile, int b, const vi *words, int byte, const int16_t *q);

/* n blocks of `bytes` each, two of which are whole words. */
WEIGHT_INLINE void unpack_blocks(weight_tile *tile, const vi *words, int n, const int16_t *q,
                                 const uint8_t *ahead, int bytes, unpack_block_fn *unpack) {
    for (int b = 0; b < n; b += 2, words += bytes / 2) {
        ahead = fetch(ahead, (size_t)bytes * VF_LANES);
        unpack(tile, b, words, 0, q);
        if (b + 1 == n) break;
        ahead = fetch(ahead, (size_t)bytes * VF_LANES);
        unpack(tile, b + 1, words, bytes, q);
    }
}

WEIGHT_INLINE void block_Q4_0(weight_tile *tile, int b, const vi *words, int byte,
                              const int16_t *q) {
    tile->scale[b] = half_at(words, byte);
    put_4_bits(tile, b, words, byte + 2, 8, q);
}

WEIGHT_INLINE void block_Q4_1(weight_tile *tile, int b, const vi *words, int byte,
                              const int16_t *q) {
    tile->scale[b] = half_at(words, byte);
    tile->minimum[b] = half_at(words, byte + 2);
    put_4_bits(tile, b, words, byte + 4, 0, q);
}

WEIGHT_INLINE void block_Q5_0(weight_tile *tile, int b, const vi *words, int byte,
                              const int16_t *q) {
    tile->scale[b] = half_at(words, byte);
    put_5_bits(tile, b, words, byte + 2, 16, q);
}

WEIGHT_INLINE void block_Q5_1(weight_tile *tile, int b, const vi *words, int byte,
                              const int16_t *q) {
    tile->scale[b] = half_at(words, byte);
    tile->minimum[b] = half_at(words, byte + 2);
    put_5_bits(tile, b, words, byte + 4, 0, q);
}

WEIGHT_INLINE void block_Q8_0(weight_tile *tile, int b, const vi *words, int byte,
                              const int16_t *q) {
    tile->scale[b] = half_at(words, byte);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) put_signed_quad(tile, b, i, word_at(words, byte + 2 + 4 * i), q);
}

#define UNPACK_BLOCKS(NAME, BYTES)                                                                 \
    WEIGHT_INLINE void unpack_##NAME(weight_tile *tile, const vi *words, int n, const int16_t *q,  \
                                     const uint8_t *ahead) {                                       \
        unpack_blocks(tile, words, n, q, ahead, BYTES, block_##NAME);                              \
    }
UNPACK_BLOCKS(Q4_0, 18)
UNPACK_BLOCKS(Q4_1, 20)
UNPACK_BLOCKS(Q5_0, 22)
UNPACK_BLOCKS(Q5_1, 24)
UNPACK_BLOCKS(Q8_0, 34)
#undef UNPACK_BLOCKS

/* The first 16 bytes of Q4_K and Q5_K: two f16 and the 6-bit scales and minima (see weights.c). */
WEIGHT_INLINE void unpack_scales_and_minima(weight_tile *tile, const vi *head) {
    const vb six = vb_set(63), low = vb_set(15), high = vb_set(48);
    const vf unit = half_at(head, 0), unit_minimum = half_at(head, 2);
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
WEIGHT_INLINE void unpack_Q4_K(weight_tile *tile, const vi *words, int n, const int16_t *q,
                               const uint8_t *ahead) {
    (void)n; /* always a whole super-block */
    unpack_scales_and_minima(tile, words);
#pragma GCC unroll 8
    for (int b = 0; b < 8; b += 2) {
        ahead = fetch(ahead, 144 * VF_LANES / 4);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            put_nibbles(tile, b, i, b + 1, i, words[4 + b * 4 + i], 0, q);
        }
    }
}

/* 16 in each byte whose bit b is set. */
WEIGHT_INLINE vb fifth_bit(vb bytes, int b) {
    const vb sixteen = vb_set(16);
    return b < 4 ? vb_shl(bytes, 4 - b, sixteen) : vb_shr(bytes, b - 4, sixteen);
}

/* After the scales 32 bytes of fifth bits, bit b of each for block b. */
WEIGHT_INLINE void unpack_Q5_K(weight_tile *tile, const vi *words, int n, const int16_t *q,
                               const uint8_t *ahead) {
    (void)n;
    unpack_scales_and_minima(tile, words);
#pragma GCC unroll 8
    for (int b = 0; b < 8; b += 2) {
        ahead = fetch(ahead, 176 * VF_LANES / 4);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const vb raw = words[12 + b * 4 + i], fifth = words[4 + i];
#pragma GCC unroll 8
            for (int high = 0; high < 2; high++) {
                const vb codes = vi_or(nibbles_of(raw, high), fifth_bit(fifth, b + high));
                put_quad(tile, b + high, i, codes, 0, q);
            }
        }
    }
}

/* Two bits of each byte, those of run 0 lowest, moved to 16 and 32. */
WEIGHT_INLINE vb top_bits(vb bytes, int run) {
    const vb both = vb_set(48);
    return run < 2 ? vb_shl(bytes, 4 - 2 * run, both) : vb_shr(bytes, 2 * run - 4, both);
}

/* Four blocks, the runs of a half, share bytes of top bits, and two of them bytes of low bits: each
 * `i` is the first or second 16 columns of four blocks. */
WEIGHT_INLINE void unpack_Q6_K(weight_tile *tile, const vi *words, int n, const int16_t *q,
                               const uint8_t *ahead) {
    (void)n;
    const vi *const low = words, *const top = words + 32, *const scales = words + 48;
    const vf unit = half_at(words, 208);
#pragma GCC unroll 8
    for (int b = 0; b < 8; b++) tile->scale[b] = unit;
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        ahead = fetch(ahead, 210 * VF_LANES / 4);
#pragma GCC unroll 8
        for (int run = 0; run < 4; run++) {
            const int b = i / 2 * 4 + run, half = i % 2;
            vb codes[4];
#pragma GCC unroll 8
            for (int j = 0; j < 4; j++) {
                const vb raw = low[i / 2 * 16 + run % 2 * 8 + half * 4 + j];
                codes[j] = vi_or(nibbles_of(raw, run / 2), top_bits(top[i * 4 + j], run));
            }
            put_scaled(tile, b, half, codes, vi_byte(scales[b / 2], b % 2 * 2 + half), q);
        }
    }
}

/* ---- the product of quantized weights ---------------------------------------------------- */

_Static_assert(TILE_BLOCKS * 32 == KVQ_ACTIVATION_RUN, "the activations of a tile share a scale");
_Static_assert(KVQ_PANEL_ROWS % (PANEL_VECTORS * VF_LANES) == 0, "whole panels");

/* The activations of the first of some tokens, at the first column of a tile; those of the others
 * follow, each in its row. */
typedef struct token_cursor {
    const int16_t *q;
    const float *scale, *sums;
    size_t n_cols;
} token_cursor;

/* `block` is the first of a tile. */
WEIGHT_INLINE token_cursor cursor_at(const token_cursor *x, size_t token, size_t block) {
    const size_t at = token * (x->n_cols / 32) + block;
    const size_t run = token * kvq_activation_runs(x->n_cols) + block / TILE_BLOCKS;
    return (token_cursor){x->q + at * 32, x->scale + run, x->sums + at, x->n_cols};
}

/* `part`, which is in units of the activations' scale, plus block b of a tile, whose codes . q are
 * `dot` for token t. Of codes that were not reduced by `zero` the product is: it is an integer
 * below 2^24, so exact. */
WEIGHT_INLINE vf add_block(vf part, const weight_tile *tile, int b, vi dot, const token_cursor *x,
                           int t, const code_kind kind, int zero) {
    const float sum = x->sums[(size_t)t * (x->n_cols / 32) + (size_t)b];
    vf product = vf_from_vi(dot);
    if (zero) product = vf_sub(product, vf_set((float)zero * sum));
    part = vf_fma(product, tile->scale[b], part);
    if (kind == CODES_AFFINE) part = vf_fma(vf_set(sum), tile->minimum[b], part);
    return part;
}

/* total plus a tile's sum for token t. */
WEIGHT_INLINE vf add_tile(vf total, vf part, const token_cursor *x, int t) {
    return vf_fma(part, vf_set(x->scale[(size_t)t * kvq_activation_runs(x->n_cols)]), total);
}

typedef vf panel_sum[PANEL_VECTORS]; /* of one token, lanes are rows */

/* Adds the n blocks of a panel's tiles to sum[n_tok]; n_tok and kind are constants in each
 * instance. */
WEIGHT_INLINE void multiply_tiles(panel_sum *sum, const weight_tile *tiles, int n,
                                  const token_cursor *x, const int n_tok, const code_kind kind) {
    vf part[TILE_TOKENS][PANEL_VECTORS];
#pragma GCC unroll 8
    for (int t = 0; t < n_tok; t++) {
#pragma GCC unroll 8
        for (int v = 0; v < PANEL_VECTORS; v++) part[t][v] = vf_zero();
    }
    for (int b = 0; b < n; b++) {
        vi dot[TILE_TOKENS][PANEL_VECTORS];
        multiply_codes(dot, tiles, b, x->q, x->n_cols, n_tok, kind);
#pragma GCC unroll 8
        for (int t = 0; t < n_tok; t++) {
#pragma GCC unroll 8
            for (int v = 0; v < PANEL_VECTORS; v++) {
                part[t][v] = add_block(part[t][v], &tiles[v], b, dot[t][v], x, t, kind, 0);
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < n_tok; t++) {
#pragma GCC unroll 8
        for (int v = 0; v < PANEL_VECTORS; v++) sum[t][v] = add_tile(sum[t][v], part[t][v], x, t);
    }
}

/* The same for the first of n_tok tokens, as many as have an instance; returns their number. */
static int multiply_tiles_some(panel_sum *sum, const weight_tile *tiles, int n,
                               const token_cursor *x, int n_tok, code_kind kind) {
#define INSTANCE(N_TOK)                                                                            \
    if (n_tok >= (N_TOK)) {                                                                        \
        if (kind == CODES_AFFINE)                                                                  \
            multiply_tiles(sum, tiles, n, x, N_TOK, CODES_AFFINE);                                 \
        else if (CODES_SCALED != CODES_PLAIN && kind == CODES_SCALED)                              \
            multiply_tiles(sum, tiles, n, x, N_TOK, CODES_SCALED);                                 \
        else                                                                                       \
            multiply_tiles(sum, tiles, n, x, N_TOK, CODES_PLAIN);                                  \
        return N_TOK;                                                                              \
    }
    INSTANCE(TILE_TOKENS)
    INSTANCE(4)
    INSTANCE(2)
    INSTANCE(1)
#undef INSTANCE
    return 0;
}

/* A panel for a chunk of tokens: sum[n_tok]; w[v] is the first row of a vector. `ahead` are the
 * rows that come next, or NULL. */
typedef void panel_fn(panel_sum *sum, const uint8_t *const w[PANEL_VECTORS], size_t stride,
                      const uint8_t *ahead, token_cursor x, int n_tok);

/* bytes_tile: of TILE_BLOCKS blocks of a row. */
WEIGHT_INLINE void multiply_panel(panel_sum *sum, const uint8_t *const w[PANEL_VECTORS],
                                  size_t stride, const uint8_t *ahead, token_cursor x, int n_tok,
                                  size_t bytes_tile, unpack_fn *unpack, const code_kind kind) {
    const size_t n_blocks = x.n_cols / 32;
    weight_tile tiles[PANEL_VECTORS];
    tile_words words;
    size_t at = 0; /* bytes from the start of a row */
    for (int t = 0; t < n_tok; t++) {
        for (int v = 0; v < PANEL_VECTORS; v++) sum[t][v] = vf_zero();
    }
    for (size_t b = 0; b < n_blocks; b += TILE_BLOCKS, at += bytes_tile) {
        const int n = n_blocks - b < TILE_BLOCKS ? (int)(n_blocks - b) : TILE_BLOCKS;
        for (int v = 0; v < PANEL_VECTORS; v++) {
            const size_t bytes = (size_t)n * bytes_tile / TILE_BLOCKS;
            load_words(words, w[v] + at, stride, bytes);
            unpack(&tiles[v], words, n, NULL, ahead);
            if (ahead) ahead += bytes * VF_LANES;
        }
        for (int t = 0; t < n_tok;) {
            const token_cursor first = cursor_at(&x, (size_t)t, b);
            t += multiply_tiles_some(sum + t, tiles, n, &first, n_tok - t, kind);
        }
    }
}

/* The rows of one vector for one token. */
WEIGHT_INLINE void multiply_panel_alone(vf *sum, const uint8_t *w, size_t stride,
                                        const uint8_t *ahead, token_cursor x, size_t bytes_tile,
                                        unpack_fn *unpack, const code_kind kind, const int zero) {
    const size_t n_blocks = x.n_cols / 32;
    weight_tile tile;
    tile_words words;
    vf total = vf_zero();
    for (size_t b = 0; b < n_blocks; b += TILE_BLOCKS, w += bytes_tile) {
        const int n = n_blocks - b < TILE_BLOCKS ? (int)(n_blocks - b) : TILE_BLOCKS;
        const token_cursor at = cursor_at(&x, 0, b);
        const size_t bytes = (size_t)n * bytes_tile / TILE_BLOCKS;
        load_words(words, w, stride, bytes);
        unpack(&tile, words, n, token_alone(at.q), ahead);
        if (ahead) ahead += bytes * VF_LANES;
        vf part = vf_zero();
        for (int i = 0; i < n; i++) {
            part = add_block(part, &tile, i, dot_of(&tile, i), &at, 0, kind, zero);
        }
        total = add_tile(total, part, &at, 0);
    }
    *sum = total;
}

static void multiply(float *y, size_t y_stride, const uint8_t *w, size_t n_rows,
                     const uint8_t *ahead, const kvq_activations *x, size_t stride, panel_fn *alone,
                     panel_fn *together) {
    const token_cursor first_token = {x->q, x->scale, x->sums, x->n_cols};
    /* Nothing may be read past the last row: of fewer than VF_LANES rows, one fills all lanes. */
    const bool few = n_rows < VF_LANES;
    const size_t lanes = few ? 1 : VF_LANES;
    panel_sum sum[CHUNK_TOKENS];

    for (size_t first = 0; first < x->n_tok; first += CHUNK_TOKENS) {
        const size_t left = x->n_tok - first;
        const int n_tok = left < CHUNK_TOKENS ? (int)left : CHUNK_TOKENS;
        const int n_vectors = n_tok == 1 ? 1 : PANEL_VECTORS;
        panel_fn *const panel = n_tok == 1 ? alone : together;
        float *const out = y + first * y_stride;
        for (size_t r = 0; r < n_rows; r += (size_t)n_vectors * lanes) {
            const size_t next = r + (size_t)n_vectors * lanes;
            const uint8_t *rows[PANEL_VECTORS];
            size_t row[PANEL_VECTORS];
            for (int v = 0; v < n_vectors; v++) {
                /* The last vector may overlap the one before; it gives the same values again. */
                row[v] = r + (size_t)v * lanes;
                if (row[v] + lanes > n_rows) row[v] = n_rows - lanes;
                rows[v] = w + row[v] * stride;
            }
            panel(sum, rows, few ? 0 : stride, next < n_rows ? w + next * stride : ahead,
                  cursor_at(&first_token, first, 0), n_tok);
            for (int t = 0; t < n_tok; t++) {
                for (int v = 0; v < n_vectors; v++) {
                    float *const at = out + (size_t)t * y_stride + row[v];
                    if (few)
                        *at = vf_first(sum[t][v]);
                    else
                        vf_store(at, sum[t][v]);
                }
            }
        }
    }
}

/* Two functions for the panel: in one, gcc would hoist what the two unpackings have in common. */
#define QUANTIZED_PRODUCT(NAME, BYTES_TILE, KIND, ZERO)                                            \
    static void together_##NAME(panel_sum *sum, const uint8_t *const w[PANEL_VECTORS],             \
                                size_t stride, const uint8_t *ahead, token_cursor x, int n_tok) {  \
        multiply_panel(sum, w, stride, ahead, x, n_tok, BYTES_TILE, unpack_##NAME, KIND);          \
    }                                                                                              \
    static void alone_##NAME(panel_sum *sum, const uint8_t *const w[PANEL_VECTORS], size_t stride, \
                             const uint8_t *ahead, token_cursor x, int n_tok) {                    \
        (void)n_tok;                                                                               \
        multiply_panel_alone(&sum[0][0], w[0], stride, ahead, x, BYTES_TILE, unpack_##NAME, KIND,  \
                             ZERO);                                                                \
    }                                                                                              \
    static void matmul_##NAME(float *y, size_t y_stride, const uint8_t *w, size_t n_rows,          \
                              const uint8_t *ahead, const kvq_activations *x) {                    \
        const size_t stride = x->n_cols / 32 * (BYTES_TILE) / TILE_BLOCKS;                         \
        multiply(y, y_stride, w, n_rows, ahead, x, stride, alone_##NAME, together_##NAME);         \
    }
QUANTIZED_PRODUCT(Q4_0, 18 * 8, CODES_PLAIN, 8)
QUANTIZED_PRODUCT(Q4_1, 20 * 8, CODES_AFFINE, 0)
QUANTIZED_PRODUCT(Q5_0, 22 * 8, CODES_PLAIN, 16)
QUANTIZED_PRODUCT(Q5_1, 24 * 8, CODES_AFFINE, 0)
QUANTIZED_PRODUCT(Q8_0, 34 * 8, CODES_PLAIN, 0)
QUANTIZED_PRODUCT(Q4_K, 144, CODES_AFFINE, 0)
QUANTIZED_PRODUCT(Q5_K, 176, CODES_AFFINE, 0)
QUANTIZED_PRODUCT(Q6_K, 210, CODES_SCALED, 0)
#undef QUANTIZED_PRODUCT

/* ---- the product of float weights -------------------------------------------------------- */

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
                                   const uint8_t *ahead, const kvq_activations *x, int bytes,
                                   load_floats_fn *load) {
    const size_t n_cols = x->n_cols, stride = n_cols * (size_t)bytes;
    for (size_t first = 0; first < n_rows; first += FLOAT_BLOCK) {
        const size_t end = n_rows - first < FLOAT_BLOCK ? n_rows : first + FLOAT_BLOCK;
        size_t t = 0;
#define TILE(ROWS, TOKENS)                                                                         \
    multiply_floats_tile(y + t * y_stride + r, y_stride, w + r * stride,                           \
                         r + (ROWS) < n_rows ? w + (r + (ROWS)) * stride : ahead, ROWS,            \
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
                              const uint8_t *ahead, const kvq_activations *x) {                    \
        multiply_floats(y, y_stride, w, n_rows, ahead, x, BYTES, load_##NAME);                     \
    }
FLOAT_PRODUCT(F32, 4)
FLOAT_PRODUCT(F16, 2)
FLOAT_PRODUCT(BF16, 2)
#undef FLOAT_PRODUCT

/* ---- activations ------------------------------------------------------------------------- */

/* scale = the largest magnitude of a run of columns / KVQ_ACTIVATION_MAX, and q = x / scale to the
 * nearest integer, ties to even. Where the scale would be subnormal (magnitudes below 2e-34) the
 * run is zero: its inverse overflows. An infinity or NaN makes the scale one, and so every product
 * with it infinite or NaN. */
static void quantize(kvq_activations *x, size_t first, size_t n) {
    const size_t n_runs = kvq_activation_runs(x->n_cols);
    for (size_t i = 0; i < n * n_runs; i++) {
        const size_t token = first + i / n_runs, run = i % n_runs;
        const size_t at = token * x->n_cols + run * KVQ_ACTIVATION_RUN;
        const size_t left = x->n_cols - run * KVQ_ACTIVATION_RUN;
        const int n_cols = left < KVQ_ACTIVATION_RUN ? (int)left : KVQ_ACTIVATION_RUN;
        const float scale = vf_abs_max(x->x + at, n_cols) / KVQ_ACTIVATION_MAX;
        const bool zero = scale < 0x1p-126f;
        const float inverse = zero ? 0.0f : 1.0f / scale;
        x->scale[token * n_runs + run] = zero ? 0.0f : scale;
        for (size_t c = at; c < at + (size_t)n_cols; c += 32) {
            x->sums[c / 32] = vf_quantize32(x->q + c, x->x + c, inverse);
        }
    }
}
