/* cuda_layout.h: where the tracks of a session lie in a chunk of sealed blocks on the device.
 *
 * Knows no driver. Called by cuda_device.c and by the tests of the kernels.
 */
#ifndef KVQ_CUDA_LAYOUT_H
#define KVQ_CUDA_LAYOUT_H

#include "cuda/kernels/cache_args.h"
#include "kv/kv_plan.h"

/* Fills out[n] from tracks[n] (those of all layers, in order), but for the addresses of bases and
 * waves, which stay as they are on the host. Returns the bytes that one block of all tracks takes.
 */
uint64_t kvq_cuda_place_tracks(kvq_cuda_track *out, const kvq_track *tracks, size_t n);

#endif
