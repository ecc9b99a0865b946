/* weight_codes_i16.inl: how products of quantized weights (weight_kernels.inl) hold codes and
 * multiply them, on instruction sets that sum products of two i16 to a lane. Included by isa_*.c
 * before weight_kernels.inl.
 *
 * Codes are unpacked to i16, two columns of a row to a lane, in sixteen vectors for a block.
 */
#define WEIGHT_INLINE static inline __attribute__((always_inline))

#define TILE_BLOCKS 8 /* a super-block of 256 columns */

typedef enum code_kind {
    CODES_PLAIN,
    CODES_AFFINE,              /* with a minimum for each block */
    CODES_SCALED = CODES_PLAIN /* by integers, two to a block: those that are kept */
} code_kind;

typedef struct weight_tile {
    vf scale[TILE_BLOCKS];     /* of each row */
    vf minimum[TILE_BLOCKS];   /* of formats that have one */
    vi codes[TILE_BLOCKS][16]; /* [block][two columns] */
    vi dot[TILE_BLOCKS][2];    /* instead of codes, for a token alone; two terms: short chains */
} weight_tile;

/* ---- codes into a tile -------------------------------------------------------------------- */

/* In what follows q is NULL or not in each instance. NULL keeps the codes; else q is the
 * activations of a token alone, and the products become tile->dot. */

/* Codes are 0 and more; those that are kept are reduced by `zero`, the one that stands for 0. */
WEIGHT_INLINE void put(weight_tile *tile, int b, int i, vi codes, int zero, const int16_t *q) {
    if (!q) {
        tile->codes[b][i] = zero ? vi_sub16(codes, vi_set16((int16_t)zero)) : codes;
        return;
    }
    const vi before = i < 2 ? vi_zero() : tile->dot[b][i % 2];
    tile->dot[b][i % 2] = vi_dot16(before, codes, vi_set_lanes(q + b * 32 + i * 2));
}

/* Four columns of a block, 4 quad to 4 quad + 3, a byte each. The even ones come first, here and in
 * q: so they widen to i16 with no shuffle. */
WEIGHT_INLINE void put_quad(weight_tile *tile, int b, int quad, vb bytes, int zero,
                            const int16_t *q) {
    put(tile, b, 2 * quad, vi_low_bytes(bytes), zero, q);
    put(tile, b, 2 * quad + 1, vi_high_bytes(bytes), zero, q);
}

/* Four columns in the low halves of bytes, and four in the high halves. */
WEIGHT_INLINE void put_nibbles(weight_tile *tile, int b_low, int quad_low, int b_high,
                               int quad_high, vb bytes, int zero, const int16_t *q) {
    const vi low = vi_set16(15);
    put(tile, b_low, 2 * quad_low, vi_and(bytes, low), zero, q);
    put(tile, b_low, 2 * quad_low + 1, vi_and(vi_shr16(bytes, 8), low), zero, q);
    put(tile, b_high, 2 * quad_high, vi_and(vi_shr16(bytes, 4), low), zero, q);
    put(tile, b_high, 2 * quad_high + 1, vi_shr16(bytes, 12), zero, q);
}

/* Four columns of signed codes. */
WEIGHT_INLINE void put_signed_quad(weight_tile *tile, int b, int quad, vb codes, const int16_t *q) {
    put(tile, b, 2 * quad, vi_low_signed_bytes(codes), 0, q);
    put(tile, b, 2 * quad + 1, vi_high_signed_bytes(codes), 0, q);
}

/* Half a block of Q6_K: codes of 0 to 63 that stand for -32 to 31, and their scale as i32. Kept
 * codes are scaled; of a token alone the sum of products is. */
WEIGHT_INLINE void put_scaled(weight_tile *tile, int b, int half, const vb quads[4], vi scale,
                              const int16_t *q) {
    const vi zero = vi_set16(32), scales = vi_low16(scale);
    vi dot = vi_zero();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const vb quad = quads[i / 2];
        const vi codes = vi_sub16(i % 2 ? vi_high_bytes(quad) : vi_low_bytes(quad), zero);
        if (q)
            dot = vi_dot16(dot, codes, vi_set_lanes(q + b * 32 + half * 16 + i * 2));
        else
            tile->codes[b][half * 8 + i] = vi_mul16(codes, scales);
    }
    if (q) tile->dot[b][half] = vi_mul(dot, scale);
}

/* ---- products ----------------------------------------------------------------------------- */

/* The activations of a token alone. */
WEIGHT_INLINE const int16_t *token_alone(const int16_t *q) { return q; }

/* The product of block b with a token alone. */
WEIGHT_INLINE vi dot_of(const weight_tile *tile, int b) {
    return vi_add(tile->dot[b][0], tile->dot[b][1]);
}

/* The products of block b of a panel's tiles with n_tok tokens; q: of the first, at block 0. */
WEIGHT_INLINE void multiply_codes(vi dot[TILE_TOKENS][PANEL_VECTORS], const weight_tile *tiles,
                                  int b, const int16_t *q, size_t n_cols, const int n_tok,
                                  const code_kind kind) {
    (void)kind;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        vi codes[PANEL_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < PANEL_VECTORS; v++) codes[v] = tiles[v].codes[b][i];
#pragma GCC unroll 8
        for (int t = 0; t < n_tok; t++) {
            const vi columns = vi_set_lanes(q + (size_t)t * n_cols + b * 32 + i * 2);
#pragma GCC unroll 8
            for (int v = 0; v < PANEL_VECTORS; v++) {
                dot[t][v] = vi_dot16(i == 0 ? vi_zero() : dot[t][v], codes[v], columns);
            }
        }
    }
}
