// image.cpp: see image.h.
#include "image.h"

#include <cstdint>
#include <cstring>

namespace fakecuda {

namespace {

struct Head { // of the whole
    uint32_t magic;
    uint16_t version, head_bytes;
    uint64_t bytes; // of all entries
};

struct EntryHead { // of one cubin or PTX text; more follows, up to head_bytes
    uint16_t kind, version;
    uint32_t head_bytes;
    uint64_t bytes; // of what follows the head
    uint32_t bytes_compressed, reserved;
    uint16_t isa_minor, isa_major; // of PTX
    uint32_t capability;
};

constexpr uint32_t MAGIC = 0xba55ed50;
constexpr uint16_t PTX = 1, CUBIN = 2;

// The newest PTX that a driver translates, 10 * major + minor: "Release Notes" of NVIDIA's PTX ISA.
int newest_ptx(int driver_version) {
    const int major = driver_version / 1000, minor = driver_version % 1000 / 10;
    if (major == 12) return minor < 6 ? 80 + minor : 79 + minor;
    return major == 13 ? 90 + minor : 0;
}

// Cubins serve later devices of the same major number, but not across to or from Tegra (8.7, 11.0):
// "Binary Compatibility" in the CUDA C++ Programming Guide.
bool cubin_serves(int wanted, int capability) {
    const bool tegra = wanted == 87 || capability == 87 || wanted == 110 || capability == 110;
    return tegra ? wanted == capability : wanted / 10 == capability / 10 && wanted <= capability;
}

} // namespace

CUresult check_image(const void *image, int driver_version, int capability) {
    Head head;
    memcpy(&head, image, sizeof head);
    if (head.magic != MAGIC || head.version != 1 || head.head_bytes != sizeof head) {
        return CUDA_ERROR_INVALID_IMAGE;
    }
    const char *const begin = static_cast<const char *>(image) + sizeof head;
    bool ptx_too_new = false;
    for (uint64_t at = 0; at < head.bytes;) {
        EntryHead entry;
        memcpy(&entry, begin + at, sizeof entry);
        if (entry.head_bytes < sizeof entry || entry.bytes > head.bytes - at) {
            return CUDA_ERROR_INVALID_IMAGE;
        }
        const int wanted = static_cast<int>(entry.capability);
        if (entry.kind == CUBIN && cubin_serves(wanted, capability)) return CUDA_SUCCESS;
        if (entry.kind == PTX && wanted <= capability) {
            if (10 * entry.isa_major + entry.isa_minor <= newest_ptx(driver_version)) {
                return CUDA_SUCCESS;
            }
            ptx_too_new = true;
        }
        at += entry.head_bytes + entry.bytes;
    }
    return ptx_too_new ? CUDA_ERROR_UNSUPPORTED_PTX_VERSION : CUDA_ERROR_NO_BINARY_FOR_GPU;
}

} // namespace fakecuda
