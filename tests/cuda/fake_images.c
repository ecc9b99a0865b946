/* fake_images.c: in the place of images.S, fat binaries of which there is no more than the heads,
 * since the stand-in for the driver (fake/image.cpp) reads no more. So tests decide what the images
 * are for: that of CUDA 13 for 8.7 and 9.0, and as PTX for 8.0 and later; that of CUDA 12 for 7.5
 * and 8.7, and as PTX for 7.5 and later.
 */
#include <stdint.h>

typedef struct head {
    uint32_t magic;
    uint16_t version, head_bytes;
    uint64_t bytes;
} head;

typedef struct entry {
    uint16_t kind, version;
    uint32_t head_bytes;
    uint64_t bytes;
    uint32_t bytes_compressed, reserved;
    uint16_t minor, major; /* of the PTX ISA, or of the form of the cubin */
    uint32_t capability;
} entry;

typedef struct image {
    head head;
    entry entries[3];
} image;

enum { PTX = 1, CUBIN = 2 };

#define ENTRY(kind, major, minor, capability)                                                      \
    {kind, 0x101, sizeof(entry), 0, 0, 0, minor, major, capability}
#define HEAD {0xba55ed50, 1, sizeof(head), 3 * sizeof(entry)}

#define KVQ_CUDA_KERNEL(module, name)
#define KVQ_CUDA_MODULE(module)                                                                    \
    extern const image kvq_cuda_image_13_##module, kvq_cuda_image_12_##module;                     \
    extern const uint64_t kvq_cuda_bytes_13_##module, kvq_cuda_bytes_12_##module;                  \
    const image kvq_cuda_image_13_##module = {                                                     \
        HEAD, {ENTRY(CUBIN, 1, 8, 87), ENTRY(CUBIN, 1, 8, 90), ENTRY(PTX, 9, 0, 80)}};             \
    const image kvq_cuda_image_12_##module = {                                                     \
        HEAD, {ENTRY(CUBIN, 1, 7, 75), ENTRY(CUBIN, 1, 7, 87), ENTRY(PTX, 8, 8, 75)}};             \
    const uint64_t kvq_cuda_bytes_13_##module = sizeof(image);                                     \
    const uint64_t kvq_cuda_bytes_12_##module = sizeof(image);
#include "cuda/kernels.def"
