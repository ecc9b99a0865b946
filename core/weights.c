/* weights.c: the formats of weights, their reference dequantizers, and the reference product.
 *
 * A quantized value is `scale * code`, or `scale * code + minimum`. The plain formats have one f16
 * scale per block of 32; the K formats have a super-block of 256 whose f16 scale is multiplied by a
 * small integer per sub-block. Layouts as published in ggml's ggml-common.h and the GGUF
 * specification; the order of rounding is ggml's, so that every value is the same bit for bit
 * (tests/vectors/weights.bin).
 */
#include "weights.h"

/* ---- floats ------------------------------------------------------------------------------ */

static void dequantize_F32(float *y, const uint8_t *row, size_t n) { memcpy(y, row, 4 * n); }

static void dequantize_F16(float *y, const uint8_t *row, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = kvq_load_f16(row + 2 * i);
}

static void dequantize_BF16(float *y, const uint8_t *row, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = kvq_bf16_to_f32(kvq_load_u16(row + 2 * i));
}

/* ---- blocks of 32 ------------------------------------------------------------------------ */

/* Codes of 4 bits: byte i holds column i in its low half and column i + 16 in its high half. */
static int nibble(const uint8_t codes[16], int column) {
    return column < 16 ? codes[column] & 15 : codes[column - 16] >> 4;
}

/* The fifth bit of a code of 5 bits: bit `column` of a word, as 0 or 16. */
static int fifth_bit(const uint8_t bits[4], int column) {
    return (int)(kvq_load_u32(bits) >> column & 1) * 16;
}

/* | scale f16 | 32 codes i8 | */
static void dequantize_Q8_0(float *y, const uint8_t *row, size_t n) {
    for (; n > 0; n -= 32, row += 34, y += 32) {
        const float scale = kvq_load_f16(row);
        for (int c = 0; c < 32; c++) y[c] = scale * (float)(int8_t)row[2 + c];
    }
}

/* | scale f16 | 16 bytes of nibbles |, 8 stands for zero */
static void dequantize_Q4_0(float *y, const uint8_t *row, size_t n) {
    for (; n > 0; n -= 32, row += 18, y += 32) {
        const float scale = kvq_load_f16(row);
        for (int c = 0; c < 32; c++) y[c] = scale * (float)(nibble(row + 2, c) - 8);
    }
}

/* | scale f16 | minimum f16 | 16 bytes of nibbles | */
static void dequantize_Q4_1(float *y, const uint8_t *row, size_t n) {
    for (; n > 0; n -= 32, row += 20, y += 32) {
        const float scale = kvq_load_f16(row), minimum = kvq_load_f16(row + 2);
        for (int c = 0; c < 32; c++) y[c] = scale * (float)nibble(row + 4, c) + minimum;
    }
}

/* | scale f16 | 32 fifth bits | 16 bytes of nibbles |, 16 stands for zero */
static void dequantize_Q5_0(float *y, const uint8_t *row, size_t n) {
    for (; n > 0; n -= 32, row += 22, y += 32) {
        const float scale = kvq_load_f16(row);
        for (int c = 0; c < 32; c++) {
            y[c] = scale * (float)(nibble(row + 6, c) + fifth_bit(row + 2, c) - 16);
        }
    }
}

/* | scale f16 | minimum f16 | 32 fifth bits | 16 bytes of nibbles | */
static void dequantize_Q5_1(float *y, const uint8_t *row, size_t n) {
    for (; n > 0; n -= 32, row += 24, y += 32) {
        const float scale = kvq_load_f16(row), minimum = kvq_load_f16(row + 2);
        for (int c = 0; c < 32; c++) {
            y[c] = scale * (float)(nibble(row + 8, c) + fifth_bit(row + 4, c)) + minimum;
        }
    }
}

/* ---- super-blocks of 256 ----------------------------------------------------------------- */

/* Q4_K and Q5_K: 8 scales and 8 minima of 6 bits in 12 bytes, one pair for each sub-block of 32.
 * Byte i of the three groups of 4 (scales 0-3, minima 0-3, and the rest):
 *     group 0:  bits 0-5 scale i,    bits 6-7 high bits of scale i + 4
 *     group 1:  bits 0-5 minimum i,  bits 6-7 high bits of minimum i + 4
 *     group 2:  bits 0-3 low bits of scale i + 4,  bits 4-7 low bits of minimum i + 4 */
static void unpack_scale_and_minimum(int *scale, int *minimum, const uint8_t packed[12],
                                     int sub_block) {
    const int i = sub_block & 3;
    if (sub_block < 4) {
        *scale = packed[i] & 63;
        *minimum = packed[4 + i] & 63;
    } else {
        *scale = (packed[8 + i] & 15) | (packed[i] >> 6 << 4);
        *minimum = (packed[8 + i] >> 4) | (packed[4 + i] >> 6 << 4);
    }
}

/* | f16 unit of scales | f16 unit of minima | 12 bytes of both, as above | 128 bytes of nibbles |
 * Each 32 bytes of nibbles hold two sub-blocks: low halves the first, high halves the second. */
static void dequantize_Q4_K(float *y, const uint8_t *row, size_t n) {
    for (; n > 0; n -= 256, row += 144) {
        const float unit = kvq_load_f16(row), unit_minimum = kvq_load_f16(row + 2);
        for (int s = 0; s < 8; s++) {
            int scale, minimum;
            unpack_scale_and_minimum(&scale, &minimum, row + 4, s);
            const float d = unit * (float)scale, m = unit_minimum * (float)minimum;
            const uint8_t *const codes = row + 16 + s / 2 * 32;
            for (int c = 0; c < 32; c++) {
                *y++ = d * (float)(codes[c] >> s % 2 * 4 & 15) - m;
            }
        }
    }
}

/* As Q4_K, with 32 bytes before the nibbles: bit s of byte c is the fifth bit of column c of
 * sub-block s. */
static void dequantize_Q5_K(float *y, const uint8_t *row, size_t n) {
    for (; n > 0; n -= 256, row += 176) {
        const float unit = kvq_load_f16(row), unit_minimum = kvq_load_f16(row + 2);
        const uint8_t *const fifth = row + 16;
        for (int s = 0; s < 8; s++) {
            int scale, minimum;
            unpack_scale_and_minimum(&scale, &minimum, row + 4, s);
            const float d = unit * (float)scale, m = unit_minimum * (float)minimum;
            const uint8_t *const codes = row + 48 + s / 2 * 32;
            for (int c = 0; c < 32; c++) {
                const int code = (codes[c] >> s % 2 * 4 & 15) | (fifth[c] >> s & 1) << 4;
                *y++ = d * (float)code - m;
            }
        }
    }
}

/* | 128 bytes of low 4 bits | 64 bytes of high 2 bits | 16 scales i8 | f16 unit of scales |
 * Code 32 stands for zero; a scale serves 16 columns. Each half of 128 columns has 64 bytes of low
 * and 32 of high bits. Its four runs of 32 columns take their low bits from bytes 0-31 and 32-63,
 * low halves, then the same bytes, high halves; run k takes bits 2k, 2k + 1 of the high bytes. */
static void dequantize_Q6_K(float *y, const uint8_t *row, size_t n) {
    for (; n > 0; n -= 256, row += 210) {
        const float unit = kvq_load_f16(row + 208);
        for (int c = 0; c < 256; c++) {
            const int half = c / 128, run = c / 32 % 4, i = c % 32;
            const int low = row[half * 64 + run % 2 * 32 + i] >> run / 2 * 4 & 15;
            const int high = row[128 + half * 32 + i] >> run * 2 & 3;
            const float scale = unit * (float)(int8_t)row[192 + c / 16];
            *y++ = scale * (float)((low | high << 4) - 32);
        }
    }
}

/* ---- tables ------------------------------------------------------------------------------ */

const kvq_weight_format kvq_weight_formats[KVQ_WEIGHT_KINDS] = {
#define KVQ_WEIGHT(NAME, ID, BLOCK, BYTES) {#NAME, ID, BLOCK, BYTES, dequantize_##NAME},
#include "weights.def"
#undef KVQ_WEIGHT
};

int kvq_weight_find(uint32_t ggml_id) {
    for (int kind = 0; kind < KVQ_WEIGHT_KINDS; kind++) {
        if (kvq_weight_formats[kind].ggml_id == ggml_id) return kind;
    }
    return -1;
}

/* Type ids of ggml (enum ggml_type, 2026). Missing numbers are formats that ggml has removed. */
static const struct {
    const char *name;
    uint16_t block, bytes;
} ggml_types[] = {
    [0] = {"F32", 1, 4},         [1] = {"F16", 1, 2},         [2] = {"Q4_0", 32, 18},
    [3] = {"Q4_1", 32, 20},      [6] = {"Q5_0", 32, 22},      [7] = {"Q5_1", 32, 24},
    [8] = {"Q8_0", 32, 34},      [9] = {"Q8_1", 32, 36},      [10] = {"Q2_K", 256, 84},
    [11] = {"Q3_K", 256, 110},   [12] = {"Q4_K", 256, 144},   [13] = {"Q5_K", 256, 176},
    [14] = {"Q6_K", 256, 210},   [15] = {"Q8_K", 256, 292},   [16] = {"IQ2_XXS", 256, 66},
    [17] = {"IQ2_XS", 256, 74},  [18] = {"IQ3_XXS", 256, 98}, [19] = {"IQ1_S", 256, 50},
    [20] = {"IQ4_NL", 32, 18},   [21] = {"IQ3_S", 256, 110},  [22] = {"IQ2_S", 256, 82},
    [23] = {"IQ4_XS", 256, 136}, [24] = {"I8", 1, 1},         [25] = {"I16", 1, 2},
    [26] = {"I32", 1, 4},        [27] = {"I64", 1, 8},        [28] = {"F64", 1, 8},
    [29] = {"IQ1_M", 256, 56},   [30] = {"BF16", 1, 2},       [34] = {"TQ1_0", 256, 54},
    [35] = {"TQ2_0", 256, 66},   [39] = {"MXFP4", 32, 17},    [40] = {"NVFP4", 64, 36},
    [41] = {"Q1_0", 128, 18},    [42] = {"Q2_0", 64, 18},
};

bool kvq_ggml_type_size(uint32_t ggml_id, const char **name, uint32_t *block, uint32_t *bytes) {
    const size_t n = sizeof ggml_types / sizeof *ggml_types;
    if (ggml_id >= n || !ggml_types[ggml_id].name) return false;
    *name = ggml_types[ggml_id].name;
    *block = ggml_types[ggml_id].block;
    *bytes = ggml_types[ggml_id].bytes;
    return true;
}

/* ---- product ----------------------------------------------------------------------------- */

#define RUN 256  /* columns dequantized at a time: a multiple of every block */
#define GROUP 32 /* tokens that share one dequantization */

void kvq_matmul_reference(kvq_weight_kind kind, float *y, size_t y_stride, const uint8_t *w,
                          size_t n_rows, const kvq_activations *x) {
    const kvq_weight_format *const format = &kvq_weight_formats[kind];
    const size_t bytes_row = x->n_cols / format->block * format->bytes;
    float values[RUN];

    for (size_t r = 0; r < n_rows; r++) {
        for (size_t first = 0; first < x->n_tok; first += GROUP) {
            const size_t n = x->n_tok - first < GROUP ? x->n_tok - first : GROUP;
            double sum[GROUP] = {0};
            for (size_t c = 0; c < x->n_cols; c += RUN) {
                const size_t run = x->n_cols - c < RUN ? x->n_cols - c : RUN;
                const uint8_t *const blocks = w + r * bytes_row + c / format->block * format->bytes;
                format->dequantize(values, blocks, run);
                for (size_t t = 0; t < n; t++) {
                    const float *const in = x->x + (first + t) * x->n_cols + c;
                    for (size_t i = 0; i < run; i++) sum[t] += (double)values[i] * (double)in[i];
                }
            }
            for (size_t t = 0; t < n; t++) y[(first + t) * y_stride + r] = (float)sum[t];
        }
    }
}
