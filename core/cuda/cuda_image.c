/* cuda_image.c: chooses an embedded image and loads it. */
#include "cuda/cuda_image.h"

/* What images.S has of each module: its fat binary and how many bytes it has, 0 where this build
 * lacks the image. */
#define KVQ_CUDA_KERNEL(module, name)
#define KVQ_CUDA_MODULE(module)                                                                    \
    extern const uint8_t kvq_cuda_image_13_##module[], kvq_cuda_image_12_##module[];               \
    extern const uint64_t kvq_cuda_bytes_13_##module, kvq_cuda_bytes_12_##module;
#include "cuda/kernels.def"
#undef KVQ_CUDA_MODULE

typedef struct module_image {
    const uint8_t *data;
    const uint64_t *bytes;
} module_image;

/* The best first. */
static const struct image {
    const char *toolkit;
    int least_driver; /* that takes it */
    module_image modules[KVQ_CUDA_MODULES];
} images[] = {
#define KVQ_CUDA_MODULE(module) {kvq_cuda_image_13_##module, &kvq_cuda_bytes_13_##module},
    {"CUDA 13.0",
     13000,
     {
#include "cuda/kernels.def"
     }},
#undef KVQ_CUDA_MODULE
#define KVQ_CUDA_MODULE(module) {kvq_cuda_image_12_##module, &kvq_cuda_bytes_12_##module},
    {"CUDA 12.9",
     12000,
     {
#include "cuda/kernels.def"
     }},
#undef KVQ_CUDA_MODULE
};
#undef KVQ_CUDA_KERNEL

enum { IMAGES = sizeof images / sizeof *images };

static const char *const module_names[] = {
#define KVQ_CUDA_MODULE(module) #module,
#define KVQ_CUDA_KERNEL(module, name)
#include "cuda/kernels.def"
#undef KVQ_CUDA_MODULE
#undef KVQ_CUDA_KERNEL
};

static const struct {
    const char *name;
    kvq_cuda_module_id module;
} kernels[] = {
#define KVQ_CUDA_MODULE(module)
#define KVQ_CUDA_KERNEL(module, name) {"kvq_cuda_" #name, KVQ_MODULE_##module},
#include "cuda/kernels.def"
#undef KVQ_CUDA_MODULE
#undef KVQ_CUDA_KERNEL
};

const char *kvq_cuda_kernel_name(kvq_cuda_kernel_id kernel) { return kernels[kernel].name; }

/* All modules of an image are built together. */
static bool is_embedded(const struct image *image) { return *image->modules[0].bytes != 0; }

static kvq_status fail_without_image(const kvq_cuda_api *api) {
    int least = 0;
    for (int i = 0; i < IMAGES; i++) {
        if (is_embedded(&images[i])) least = images[i].least_driver;
    }
    if (!least) {
        return kvq_fail(
            KVQ_ERR_DEVICE,
            "This build of pykvq has no CUDA kernels (`make cuda` had not built them).");
    }
    return kvq_fail(KVQ_ERR_DEVICE,
                    "The CUDA driver %d.%d is older than %d.%d, which the kernels of this build "
                    "of pykvq need.",
                    api->version / 1000, api->version % 1000 / 10, least / 1000, least % 1000 / 10);
}

/* *result: of the driver, where it refuses a module. */
static kvq_status load(kvq_cuda_kernels *out, const kvq_cuda_api *api, const struct image *image,
                       const char *device, CUresult *result) {
    out->toolkit = image->toolkit;
    for (int i = 0; i < KVQ_CUDA_MODULES; i++) {
        *result = api->cuModuleLoadData(&out->modules[i], image->modules[i].data);
        const kvq_status status = kvq_cuda_check(
            api, *result, "cuModuleLoadData of the kernels in %s.cu, built by %s, on %s",
            module_names[i], image->toolkit, device);
        if (status != KVQ_OK) return status;
    }
    for (int i = 0; i < KVQ_CUDA_KERNELS; i++) {
        const kvq_status status = kvq_cuda_check(
            api,
            api->cuModuleGetFunction(&out->functions[i], out->modules[kernels[i].module],
                                     kernels[i].name),
            "cuModuleGetFunction of %s, built by %s, on %s", kernels[i].name, image->toolkit,
            device);
        if (status != KVQ_OK) return status;
    }
    return KVQ_OK;
}

/* Whether another image may be what the device takes. */
static bool is_about_image(CUresult result) {
    return result == CUDA_ERROR_NO_BINARY_FOR_GPU || result == CUDA_ERROR_INVALID_IMAGE ||
           result == CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
}

kvq_status kvq_cuda_kernels_open(kvq_cuda_kernels *out, const kvq_cuda_api *api,
                                 const char *device) {
    CUresult result = CUDA_ERROR_INVALID_IMAGE;
    kvq_status status = KVQ_OK;
    bool tried = false;
    for (int i = 0; i < IMAGES && is_about_image(result); i++) {
        if (!is_embedded(&images[i]) || api->version < images[i].least_driver) continue;
        *out = (kvq_cuda_kernels){0};
        status = load(out, api, &images[i], device, &result);
        if (status == KVQ_OK) return KVQ_OK;
        kvq_cuda_kernels_close(out, api);
        tried = true;
    }
    return tried ? status : fail_without_image(api);
}

void kvq_cuda_kernels_close(kvq_cuda_kernels *loaded, const kvq_cuda_api *api) {
    for (int i = 0; i < KVQ_CUDA_MODULES; i++) {
        if (loaded->modules[i]) api->cuModuleUnload(loaded->modules[i]);
    }
    *loaded = (kvq_cuda_kernels){0};
}
