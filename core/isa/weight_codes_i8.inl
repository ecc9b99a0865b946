/* weight_codes_i8.inl: how products of quantized weights (weight_kernels.inl) hold codes and
 * multiply them, on instruction sets that sum products of four signed bytes to a lane. Included by
 * isa_*.c before weight_kernels.inl.
 *
 * Codes stay bytes, four columns of a row to a lane, in eight vectors for a block. Activations of
 * 15 bits are two bytes each, whose products are summed apart (vq in vec_neon.h).
 */
#define WEIGHT_INLINE static inline __attribute__((always_inline))

#define TILE_BLOCKS 8 /* a super-block of 256 columns */

typedef enum code_kind {
    CODES_PLAIN,
    CODES_AFFINE, /* with a minimum for each block */
    CODES_SCALED  /* by integers, two to a block */
} code_kind;

typedef struct weight_tile {
    vf scale[TILE_BLOCKS];     /* of each row */
    vf minimum[TILE_BLOCKS];   /* of formats that have one */
    vb codes[TILE_BLOCKS][8];  /* [block][four columns] */
    vi factor[TILE_BLOCKS][2]; /* of each half of a block, where codes are scaled */
    vq dot[TILE_BLOCKS];       /* instead of codes, for a token alone */
} weight_tile;

/* ---- codes into a tile -------------------------------------------------------------------- */

/* In what follows q is NULL or not in each instance. NULL keeps the codes; else q is the
 * activations of a token alone, and the products become tile->dot. */

/* Four columns of a block, 4 quad to 4 quad + 3, a byte each; quad 0 comes first. Codes that are
 * kept are reduced by `zero`, the one that stands for 0. */
WEIGHT_INLINE void put_quad(weight_tile *tile, int b, int quad, vb codes, int zero,
                            const int16_t *q) {
    if (q)
        tile->dot[b] = vq_add(quad ? tile->dot[b] : vq_zero(), codes, q + b * 32 + quad * 4);
    else
        tile->codes[b][quad] = zero ? vb_sub8(codes, vb_set(zero)) : codes;
}

/* Four columns in the low halves of bytes, and four in the high halves. */
WEIGHT_INLINE void put_nibbles(weight_tile *tile, int b_low, int quad_low, int b_high,
                               int quad_high, vb bytes, int zero, const int16_t *q) {
    const vb low = vb_set(15);
    put_quad(tile, b_low, quad_low, vb_and(bytes, low), zero, q);
    put_quad(tile, b_high, quad_high, vb_shr(bytes, 4, low), zero, q);
}

/* Four columns of signed codes. */
WEIGHT_INLINE void put_signed_quad(weight_tile *tile, int b, int quad, vb codes, const int16_t *q) {
    put_quad(tile, b, quad, codes, 0, q);
}

/* Half a block of Q6_K: codes of 0 to 63 that stand for -32 to 31, and their scale as i32. A scaled
 * sum of high parts, up to 2^24, may wrap around when it is shifted up; the total is in i32. */
WEIGHT_INLINE void put_scaled(weight_tile *tile, int b, int half, const vb quads[4], vi scale,
                              const int16_t *q) {
    vq dot = vq_zero();
    tile->factor[b][half] = scale;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const vb codes = vb_sub8(quads[i], vb_set(32));
        if (q)
            dot = vq_add(dot, codes, q + b * 32 + half * 16 + i * 4);
        else
            tile->codes[b][half * 4 + i] = codes;
    }
    if (!q) return;
    dot = (vq){vi_mul(dot.high, scale), vi_mul(dot.low, scale)};
    if (half) {
        dot.high = vi_add(tile->dot[b].high, dot.high);
        dot.low = vi_add(tile->dot[b].low, dot.low);
    }
    tile->dot[b] = dot;
}

/* ---- products ----------------------------------------------------------------------------- */

/* The activations of a token alone, which are there: gcc should not ask at every put_quad. */
WEIGHT_INLINE const int16_t *token_alone(const int16_t *q) {
    if (!q) __builtin_unreachable();
    return q;
}

/* The product of block b with a token alone. */
WEIGHT_INLINE vi dot_of(const weight_tile *tile, int b) { return vq_total(tile->dot[b]); }

/* The products of block b of a panel's tiles with n_tok tokens; q: of the first, at block 0. */
WEIGHT_INLINE void multiply_codes(vi dot[TILE_TOKENS][PANEL_VECTORS], const weight_tile *tiles,
                                  int b, const int16_t *q, size_t n_cols, const int n_tok,
                                  const code_kind kind) {
    const int parts = kind == CODES_SCALED ? 2 : 1;
#pragma GCC unroll 2
    for (int part = 0; part < parts; part++) {
        vq sum[TILE_TOKENS][PANEL_VECTORS];
#pragma GCC unroll 8
        for (int i = part * 4; i < (part + 1) * 8 / parts; i++) {
#pragma GCC unroll 8
            for (int t = 0; t < n_tok; t++) {
                const int16_t *const columns = q + (size_t)t * n_cols + b * 32 + i * 4;
#pragma GCC unroll 8
                for (int v = 0; v < PANEL_VECTORS; v++) {
                    const vq before = i == part * 4 ? vq_zero() : sum[t][v];
                    sum[t][v] = vq_add(before, tiles[v].codes[b][i], columns);
                }
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < n_tok; t++) {
#pragma GCC unroll 8
            for (int v = 0; v < PANEL_VECTORS; v++) {
                vi total = vq_total(sum[t][v]);
                if (kind == CODES_SCALED) total = vi_mul(total, tiles[v].factor[b][part]);
                dot[t][v] = part ? vi_add(dot[t][v], total) : total;
            }
        }
    }
}
