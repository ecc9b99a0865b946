/* kv_digest.c: the digest, FNV-1a over units of 16 and 32 bits. */
#include "kv/kv_digest.h"

#include "isa/isa.h"

enum { TOKENS = KVQ_BLOCK, MOST = KVQ_BLOCK * KVQ_D_MAX };

static uint64_t hash(uint64_t h, uint32_t unit) { return (h ^ unit) * 1099511628211u; }

static uint64_t hash_floats(uint64_t h, const float *x, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        h = hash(h, bits);
    }
    return h;
}

/* Numbers from -4 to 4 (multiplier: Knuth, MMIX), in the basis: rows[KVQ_BLOCK][d]. */
static void make_rows(uint16_t *rows, const kvq_basis *basis, uint64_t seed, int d) {
    float x[KVQ_D_MAX];
    uint64_t state = seed;
    for (int t = 0; t < TOKENS; t++) {
        for (int c = 0; c < d; c++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            x[c] = (float)(int32_t)(state >> 32) * 0x1p-29f;
        }
        kvq_basis_store(basis, &kvq_isa_ref, x, 1, d);
        for (int c = 0; c < d; c++) rows[t * d + c] = kvq_f32_to_f16(x[c]);
    }
}

uint64_t kvq_digest(const kvq_track *tracks, size_t n, int d) {
    uint16_t rows[MOST];
    uint8_t block[2 * MOST]; /* no codec takes more than f16 */
    float x[MOST];
    uint64_t h = 14695981039346656037u;
    for (size_t i = 0; i < n; i++) {
        const kvq_track *const track = &tracks[i];
        const kvq_codec *const codec = &kvq_codecs[track->codec];
        make_rows(rows, &track->basis, i, d);
        codec->encode(block, rows, &track->shape);
        codec->decode(x, block, &track->shape);
        h = hash_floats(h, x, TOKENS * d);
        for (int j = 0; j < track->wave.n; j++) h = hash(h, track->wave.pair[j]);
        h = hash_floats(h, track->wave.u, track->wave.n * d);
        h = hash_floats(h, track->wave.w, track->wave.n * d);
    }
    return h;
}
