/* cuda_info.c: what the CUDA devices of this machine are; kvq.h declares it. */
#include <stdio.h>

#include "cuda/cuda_image.h"

enum { LEAST_CAPABILITY = 75 }; /* of the oldest architecture that kernels are built for */

/* ---- what a device is ---------------------------------------------------------------------- */

static kvq_status read_attributes(kvq_device_info *out, const kvq_cuda_api *api, CUdevice device) {
    int32_t major = 0, minor = 0;
    const struct {
        CUdevice_attribute attribute;
        const char *name;
        int32_t *value;
    } wanted[] = {
#define ATTRIBUTE(name, value) {CU_DEVICE_ATTRIBUTE_##name, #name, value}
        ATTRIBUTE(COMPUTE_CAPABILITY_MAJOR, &major),
        ATTRIBUTE(COMPUTE_CAPABILITY_MINOR, &minor),
        ATTRIBUTE(MULTIPROCESSOR_COUNT, &out->n_multiprocessors),
        ATTRIBUTE(CLOCK_RATE, &out->clock_khz),
        ATTRIBUTE(MEMORY_CLOCK_RATE, &out->memory_clock_khz),
        ATTRIBUTE(GLOBAL_MEMORY_BUS_WIDTH, &out->memory_bus_bits),
        ATTRIBUTE(L2_CACHE_SIZE, &out->bytes_l2),
        ATTRIBUTE(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &out->bytes_shared),
        ATTRIBUTE(INTEGRATED, &out->integrated),
#undef ATTRIBUTE
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        int value = 0;
        const kvq_status status = kvq_cuda_check(
            api, api->cuDeviceGetAttribute(&value, wanted[i].attribute, device),
            "cuDeviceGetAttribute (%s) of CUDA device %d", wanted[i].name, out->index);
        if (status != KVQ_OK) return status;
        *wanted[i].value = value;
    }
    out->compute_capability = 10 * major + minor;
    return KVQ_OK;
}

/* What only a context can say, which is current: free memory, and whether kernels can be loaded. */
static kvq_status try_context(kvq_device_info *out, const kvq_cuda_api *api, const char *device) {
    size_t bytes_free = 0, bytes_total = 0;
    kvq_cuda_kernels kernels = {0};
    kvq_status status = kvq_cuda_kernels_open(&kernels, api, device);
    out->kernels = kernels.toolkit;
    /* what is left beside the kernels' own code */
    const CUresult result = api->cuMemGetInfo(&bytes_free, &bytes_total);
    kvq_cuda_kernels_close(&kernels, api);
    if (status == KVQ_OK) status = kvq_cuda_check(api, result, "cuMemGetInfo on %s", device);
    out->bytes_free = bytes_free;
    return status;
}

/* In the primary context, which all libraries of the process share. */
static kvq_status try_device(kvq_device_info *out, const kvq_cuda_api *api, CUdevice handle) {
    CUcontext context = NULL, popped = NULL;
    char device[160];
    snprintf(device, sizeof device, "CUDA device %d (%.120s)", out->index, out->name);
    kvq_status status = kvq_cuda_check(api, api->cuDevicePrimaryCtxRetain(&context, handle),
                                       "cuDevicePrimaryCtxRetain on %s", device);
    if (status != KVQ_OK) return status;
    status = kvq_cuda_check(api, api->cuCtxPushCurrent(context), "cuCtxPushCurrent on %s", device);
    if (status == KVQ_OK) {
        status = try_context(out, api, device);
        const CUresult result = api->cuCtxPopCurrent(&popped);
        if (status == KVQ_OK) status = kvq_cuda_check(api, result, "cuCtxPopCurrent on %s", device);
    }
    const CUresult result = api->cuDevicePrimaryCtxRelease(handle);
    if (status != KVQ_OK) return status;
    return kvq_cuda_check(api, result, "cuDevicePrimaryCtxRelease on %s", device);
}

/* ---- the public functions ------------------------------------------------------------------ */

int32_t kvq_device_count(void) {
    const kvq_cuda_api *api = NULL;
    return kvq_cuda_api_get(&api) == KVQ_OK ? api->n_devices : 0;
}

static kvq_status require_capability(const kvq_device_info *device) {
    if (device->compute_capability >= LEAST_CAPABILITY) return KVQ_OK;
    return kvq_fail(KVQ_ERR_DEVICE,
                    "CUDA device %d (%.120s) has compute capability %d.%d, expected %d.%d or more.",
                    device->index, device->name, device->compute_capability / 10,
                    device->compute_capability % 10, LEAST_CAPABILITY / 10, LEAST_CAPABILITY % 10);
}

kvq_status kvq_device_describe(int32_t index, kvq_device_info *out) {
    const kvq_cuda_api *api = NULL;
    CUdevice device = 0;
    size_t bytes_total = 0;
    *out = (kvq_device_info){.kind = "cuda", .index = index};
    kvq_status status = kvq_cuda_api_get(&api);
    if (status == KVQ_OK) status = kvq_cuda_device(&device, api, index);
    if (status != KVQ_OK) return status;
    out->driver_version = api->version;
    status = kvq_cuda_check(api, api->cuDeviceGetName(out->name, (int)sizeof out->name, device),
                            "cuDeviceGetName of CUDA device %d", index);
    if (status != KVQ_OK) return status;
    status = kvq_cuda_check(api, api->cuDeviceTotalMem(&bytes_total, device),
                            "cuDeviceTotalMem of CUDA device %d", index);
    if (status != KVQ_OK) return status;
    out->bytes_total = bytes_total;
    status = read_attributes(out, api, device);
    if (status != KVQ_OK) return status;
    status = require_capability(out);
    if (status == KVQ_OK) status = try_device(out, api, device);
    out->usable = status == KVQ_OK;
    if (status != KVQ_OK) snprintf(out->why_not, sizeof out->why_not, "%s", kvq_error());
    return KVQ_OK;
}
