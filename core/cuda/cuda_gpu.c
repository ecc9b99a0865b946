/* cuda_gpu.c: see cuda_gpu.h; and the public functions about devices, which kvq.h declares. */
#include "cuda/cuda_gpu.h"

#include <pthread.h>
#include <stdio.h>

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

/* What can be said of it without a context. */
static kvq_status read_info(kvq_device_info *out, CUdevice *id, int index) {
    const kvq_cuda_api *api = NULL;
    size_t bytes_total = 0;
    *out = (kvq_device_info){.kind = "cuda", .index = index};
    kvq_status status = kvq_cuda_api_get(&api);
    if (status == KVQ_OK) status = kvq_cuda_device(id, api, index);
    if (status != KVQ_OK) return status;
    out->driver_version = api->version;
    status = kvq_cuda_check(api, api->cuDeviceGetName(out->name, (int)sizeof out->name, *id),
                            "cuDeviceGetName of CUDA device %d", index);
    if (status != KVQ_OK) return status;
    status = kvq_cuda_check(api, api->cuDeviceTotalMem(&bytes_total, *id),
                            "cuDeviceTotalMem of CUDA device %d", index);
    out->bytes_total = bytes_total;
    return status == KVQ_OK ? read_attributes(out, api, *id) : status;
}

static kvq_status require_capability(const kvq_device_info *device) {
    if (device->compute_capability >= LEAST_CAPABILITY) return KVQ_OK;
    return kvq_fail(KVQ_ERR_DEVICE,
                    "CUDA device %d (%.120s) has compute capability %d.%d, expected %d.%d or more.",
                    device->index, device->name, device->compute_capability / 10,
                    device->compute_capability % 10, LEAST_CAPABILITY / 10, LEAST_CAPABILITY % 10);
}

/* ---- those in use -------------------------------------------------------------------------- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static kvq_cuda_gpu *in_use; /* a list */

/* How sentences call a device. */
typedef struct label {
    char text[160];
} label;

static label label_of(const kvq_device_info *info) {
    label out;
    snprintf(out.text, sizeof out.text, "CUDA device %d (%.120s)", info->index, info->name);
    return out;
}

/* Those that are in use already, or the primary context of the device, which all libraries of the
 * process share. All of this is under the lock. */
static kvq_status find_or_retain(kvq_cuda_gpu **out, CUdevice id, const kvq_device_info *info) {
    kvq_cuda_gpu *gpu = in_use;
    while (gpu && gpu->index != info->index) gpu = gpu->next;
    if (!gpu) {
        gpu = kvq_alloc(sizeof *gpu);
        if (!gpu) return kvq_fail(KVQ_ERR_MEMORY, "There is no memory for a CUDA device.");
        *gpu = (kvq_cuda_gpu){.next = in_use,
                              .index = info->index,
                              .n_processors = info->n_multiprocessors,
                              .id = id};
        kvq_status status = kvq_cuda_api_get(&gpu->api);
        if (status == KVQ_OK) {
            status = kvq_cuda_check(gpu->api, gpu->api->cuDevicePrimaryCtxRetain(&gpu->context, id),
                                    "cuDevicePrimaryCtxRetain on %s", label_of(info).text);
        }
        if (status != KVQ_OK) {
            kvq_free(gpu);
            return status;
        }
        in_use = gpu;
    }
    gpu->users++;
    *out = gpu;
    return KVQ_OK;
}

static void release(const kvq_cuda_gpu *gpu) {
    kvq_cuda_gpu **at = &in_use;
    CUcontext popped;
    while (*at != gpu) at = &(*at)->next;
    kvq_cuda_gpu *const mine = *at;
    if (--mine->users > 0) return;
    *at = mine->next;
    if (mine->kernels.toolkit && mine->api->cuCtxPushCurrent(mine->context) == CUDA_SUCCESS) {
        kvq_cuda_kernels_close(&mine->kernels, mine->api);
        mine->api->cuCtxPopCurrent(&popped);
    }
    mine->api->cuDevicePrimaryCtxRelease(mine->id);
    kvq_free(mine);
}

/* Sees that the kernels are there, and what is free beside their code. The memory of an integrated
 * device is that of the host, where a cache of files counts as free; the driver takes it for used.
 */
static kvq_status load_and_measure(kvq_cuda_gpu *gpu, kvq_device_info *info, const char *device) {
    size_t bytes_free = 0, bytes_total = 0;
    kvq_status status = KVQ_OK;
    if (!gpu->kernels.toolkit) status = kvq_cuda_kernels_open(&gpu->kernels, gpu->api, device);
    const CUresult result = gpu->api->cuMemGetInfo(&bytes_free, &bytes_total);
    if (status == KVQ_OK) status = kvq_cuda_check(gpu->api, result, "cuMemGetInfo on %s", device);
    info->kernels = gpu->kernels.toolkit;
    info->bytes_free = bytes_free;
    if (info->integrated) {
        const uint64_t host = kvq_memory_available();
        info->bytes_free = host < info->bytes_total ? host : info->bytes_total;
    }
    return status;
}

static kvq_status enter_and_measure(kvq_cuda_gpu *gpu, kvq_device_info *info) {
    const label device = label_of(info);
    CUcontext popped;
    kvq_status status = kvq_cuda_check(gpu->api, gpu->api->cuCtxPushCurrent(gpu->context),
                                       "cuCtxPushCurrent on %s", device.text);
    if (status != KVQ_OK) return status;
    status = load_and_measure(gpu, info, device.text);
    const CUresult result = gpu->api->cuCtxPopCurrent(&popped);
    if (status != KVQ_OK) return status;
    return kvq_cuda_check(gpu->api, result, "cuCtxPopCurrent on %s", device.text);
}

static kvq_status take(kvq_cuda_gpu **out, CUdevice id, kvq_device_info *info) {
    kvq_cuda_gpu *gpu = NULL;
    kvq_status status = find_or_retain(&gpu, id, info);
    if (status != KVQ_OK) return status;
    status = enter_and_measure(gpu, info);
    if (status == KVQ_OK) {
        *out = gpu;
    } else {
        release(gpu);
    }
    return status;
}

kvq_status kvq_cuda_gpu_open(const kvq_cuda_gpu **out, kvq_device_info *info, int index) {
    kvq_cuda_gpu *gpu = NULL;
    CUdevice id = 0;
    kvq_status status = read_info(info, &id, index);
    if (status != KVQ_OK) return status;
    status = require_capability(info);
    if (status == KVQ_OK) {
        pthread_mutex_lock(&lock);
        status = take(&gpu, id, info);
        pthread_mutex_unlock(&lock);
    }
    info->usable = status == KVQ_OK;
    if (!info->usable) snprintf(info->why_not, sizeof info->why_not, "%s", kvq_error());
    *out = gpu;
    return KVQ_OK;
}

void kvq_cuda_gpu_close(const kvq_cuda_gpu *gpu) {
    if (!gpu) return;
    pthread_mutex_lock(&lock);
    release(gpu);
    pthread_mutex_unlock(&lock);
}

/* ---- the public functions ------------------------------------------------------------------ */

int32_t kvq_device_count(void) {
    const kvq_cuda_api *api = NULL;
    return kvq_cuda_api_get(&api) == KVQ_OK ? api->n_devices : 0;
}

kvq_status kvq_device_describe(int32_t index, kvq_device_info *out) {
    const kvq_cuda_gpu *gpu;
    const kvq_status status = kvq_cuda_gpu_open(&gpu, out, index);
    if (status == KVQ_OK) kvq_cuda_gpu_close(gpu);
    return status;
}
