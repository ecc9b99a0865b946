/* reference.c: see reference.h. Built into a library with attend_case.c, whose calloc and free are
 * those here (-Dcalloc=reference_calloc), so that the interpreter knows where each array ends. */
#include "reference.h"

#include <stdlib.h>

#include "cuda/cuda_layout.h"
#include "isa/isa.h"

void *reference_calloc(size_t n, size_t size);
void reference_free(void *p);

typedef struct block {
    void *p;
    size_t bytes;
} block;

static block *blocks;
static int n_blocks, room;

void *reference_calloc(size_t n, size_t size) {
    if (n_blocks == room) {
        room = room ? 2 * room : 256;
        blocks = realloc(blocks, (size_t)room * sizeof *blocks);
        if (!blocks) abort();
    }
    void *const p = calloc(n ? n : 1, size ? size : 1);
    blocks[n_blocks++] = (block){p, n * size};
    return p;
}

void reference_free(void *p) { free(p); }

int reference_n_blocks(void) { return n_blocks; }

void *reference_block(int i, size_t *bytes) {
    *bytes = blocks[i].bytes;
    return blocks[i].p;
}

void reference_forget(void) { n_blocks = 0; }

size_t reference_codec_bytes(int codec, const kvq_kv_shape *shape) {
    return kvq_codecs[codec].bytes(shape);
}

int reference_codec_multiple(int codec) { return kvq_codecs[codec].d_multiple; }

const char *reference_codec_name(int codec) { return kvq_codecs[codec].name; }

void reference_encode(int codec, uint8_t *out, const uint16_t *rows, const kvq_kv_shape *shape) {
    kvq_codecs[codec].encode(out, rows, shape);
}

uint64_t reference_place(kvq_cuda_track *out, const int *codecs, const kvq_kv_shape *shapes,
                         int n) {
    kvq_track *const tracks = calloc((size_t)n, sizeof *tracks);
    if (!tracks) abort();
    for (int i = 0; i < n; i++) {
        tracks[i].codec = (kvq_codec_id)codecs[i];
        tracks[i].shape = shapes[i];
        tracks[i].block_bytes = reference_codec_bytes(codecs[i], &shapes[i]);
    }
    const uint64_t bytes = kvq_cuda_place_tracks(out, tracks, (size_t)n);
    free(tracks);
    return bytes;
}

void reference_basis(int what, int kind, const uint16_t *order, const float *matrix,
                     const float *mean, float *x, int n, int d) {
    const kvq_basis basis = {.kind = (kvq_basis_kind)kind,
                             .order = order,
                             .store = matrix,
                             .query = matrix,
                             .restore = matrix,
                             .mean = mean};
    if (what == 0) kvq_basis_store(&basis, &kvq_isa_ref, x, n, d);
    if (what == 1) kvq_basis_query(&basis, &kvq_isa_ref, x, n, d);
    if (what == 2) kvq_basis_restore(&basis, &kvq_isa_ref, x, n, d);
}

void reference_matmul(int kind, float *y, int n_rows, const uint8_t *w, const float *x, int n,
                      int n_cols) {
    kvq_activations acts = {.x = x, .n_tok = (size_t)n, .n_cols = (size_t)n_cols};
    kvq_matmul_reference((kvq_weight_kind)kind, y, (size_t)n_rows, w, (size_t)n_rows, &acts);
}

int reference_weight_kinds(void) { return KVQ_WEIGHT_KINDS; }

const char *reference_weight_name(int kind) { return kvq_weight_formats[kind].name; }

size_t reference_weight_bytes(int kind, int n_cols) {
    return (size_t)n_cols / kvq_weight_formats[kind].block * kvq_weight_formats[kind].bytes;
}

kvq_cuda_launch_shape reference_matvec_shape(kvq_cuda_matmul_args *a, int n_processors) {
    return kvq_cuda_matvec_shape(a, n_processors);
}

kvq_cuda_launch_shape reference_gemm_shape(const kvq_cuda_matmul_args *a) {
    return kvq_cuda_gemm_shape(a);
}

void reference_dequantize(int kind, float *x, const uint8_t *w, int n) {
    kvq_weight_formats[kind].dequantize(x, w, (size_t)n);
}
