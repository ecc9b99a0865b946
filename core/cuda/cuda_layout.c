/* cuda_layout.c: see cuda_layout.h. */
#include "cuda/cuda_layout.h"

enum { LOAD = 16 }; /* bytes that kernels load at once */

uint64_t kvq_cuda_place_tracks(kvq_cuda_track *out, const kvq_track *tracks, size_t n) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < n; i++) {
        const kvq_track *const from = &tracks[i];
        const size_t codes_at = kvq_codec_codes_at(from->codec, &from->shape);
        const size_t lead = kvq_round_up(codes_at, LOAD) - codes_at;
        out[i] = (kvq_cuda_track){
            .codec = (int32_t)from->codec,
            .basis = (int32_t)from->basis.kind,
            .shape = from->shape,
            .lead = (uint32_t)lead,
            .stride = (uint32_t)kvq_round_up(lead + from->block_bytes, LOAD),
            .bytes_before = bytes,
            .order = from->basis.order,
            .store = from->basis.store,
            .query = from->basis.query,
            .restore = from->basis.restore,
            .mean = from->basis.mean,
            .n_waves = from->wave.n,
            .pair = from->wave.pair,
            .wave_u = from->wave.u,
            .wave_w = from->wave.w,
        };
        bytes += out[i].stride;
    }
    return bytes;
}
