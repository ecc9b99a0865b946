/* cuda_api.c: finds the CUDA driver and its functions; words for its errors. */
#include "cuda/cuda_api.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

static bool is_forked; /* from the process that opened the driver, which serves that one alone */

/* ---- the system's loader ------------------------------------------------------------------ */

#if defined(_WIN32)

#define USUAL_LIBRARY "nvcuda.dll"

static void *open_library(const char *name) { return LoadLibraryA(name); }

static void *find_symbol(void *library, const char *name) {
    const FARPROC found = GetProcAddress(library, name);
    void *symbol;
    memcpy(&symbol, &found, sizeof symbol);
    return symbol;
}

static kvq_status fail_to_open(const char *name) {
    return kvq_fail(KVQ_ERR_DEVICE, "There is no CUDA driver: %.200s cannot be loaded (error %lu).",
                    name, GetLastError());
}

static void watch_forks(void) {}

#else

#define USUAL_LIBRARY "libcuda.so.1"

static void *open_library(const char *name) { return dlopen(name, RTLD_NOW | RTLD_LOCAL); }

static void *find_symbol(void *library, const char *name) { return dlsym(library, name); }

static kvq_status fail_to_open(const char *name) {
    const char *const why = dlerror();
    return kvq_fail(KVQ_ERR_DEVICE, "There is no CUDA driver: %.400s.", why ? why : name);
}

static void note_fork(void) { is_forked = true; }

static void watch_forks(void) { pthread_atfork(NULL, NULL, note_fork); }

#endif

/* ---- loading, once ------------------------------------------------------------------------- */

static const struct {
    const char *symbol;
    size_t offset; /* of its pointer in kvq_cuda_api */
} functions[] = {
#define KVQ_CUDA_API(name, symbol, parameters) {#symbol, offsetof(kvq_cuda_api, name)},
#include "cuda/cuda_api.def"
#undef KVQ_CUDA_API
};

/* Written by load() alone, which pthread_once lets no other thread overtake. */
static struct {
    kvq_cuda_api api;
    kvq_status status;
    char why_not[512];
} driver;

static const char *find_functions(void *library) { /* the symbol of the first that is missing */
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        void *const symbol = find_symbol(library, functions[i].symbol);
        if (!symbol) return functions[i].symbol;
        memcpy((char *)&driver.api + functions[i].offset, &symbol, sizeof symbol);
    }
    return NULL;
}

/* A driver that lacks functions may still know its version, which is what a user can change. */
static kvq_status fail_without(void *library, const char *missing) {
    CUresult (*get_version)(int *);
    void *const symbol = find_symbol(library, "cuDriverGetVersion");
    memcpy(&get_version, &symbol, sizeof symbol);
    int version = 0;
    if (!get_version || get_version(&version) != CUDA_SUCCESS) {
        return kvq_fail(KVQ_ERR_DEVICE,
                        "The CUDA driver (of a version that it does not tell) lacks %s, which "
                        "pykvq needs.",
                        missing);
    }
    return kvq_fail(KVQ_ERR_DEVICE, "The CUDA driver %d.%d lacks %s, which pykvq needs.",
                    version / 1000, version % 1000 / 10, missing);
}

static kvq_status initialize(kvq_cuda_api *api) {
    kvq_status status = kvq_cuda_check(api, api->cuDriverGetVersion(&api->version),
                                       "cuDriverGetVersion at the start of the CUDA driver");
    if (status != KVQ_OK) return status;
    const int major = api->version / 1000, minor = api->version % 1000 / 10;
    const CUresult result = api->cuInit(0);
    if (result == CUDA_SUCCESS) {
        status =
            kvq_cuda_check(api, api->cuDeviceGetCount(&api->n_devices),
                           "cuDeviceGetCount at the start of the CUDA driver %d.%d", major, minor);
        if (status != KVQ_OK) return status;
    }
    if (result == CUDA_ERROR_NO_DEVICE || (result == CUDA_SUCCESS && api->n_devices < 1)) {
        return kvq_fail(KVQ_ERR_DEVICE, "The CUDA driver %d.%d finds no device.", major, minor);
    }
    return kvq_cuda_check(api, result, "cuInit of the CUDA driver %d.%d", major, minor);
}

static kvq_status find_driver(void) {
    const char *const wanted = getenv("KVQ_LIBCUDA");
    const char *const name = wanted && *wanted ? wanted : USUAL_LIBRARY;
    void *const library = open_library(name); /* never closed: drivers keep threads of their own */
    if (!library) return fail_to_open(name);
    const char *const missing = find_functions(library);
    if (missing) return fail_without(library, missing);
    return initialize(&driver.api);
}

static void load(void) {
    watch_forks();
    driver.status = find_driver();
    if (driver.status != KVQ_OK) {
        snprintf(driver.why_not, sizeof driver.why_not, "%s", kvq_error());
    }
}

kvq_status kvq_cuda_api_get(const kvq_cuda_api **out) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    if (driver.status != KVQ_OK) return kvq_fail(driver.status, "%s", driver.why_not);
    if (is_forked) {
        return kvq_fail(KVQ_ERR_DEVICE,
                        "The CUDA driver was opened before this process was forked, and serves the "
                        "other one alone: open it only after the fork, or spawn processes.");
    }
    *out = &driver.api;
    return KVQ_OK;
}

/* ---- errors -------------------------------------------------------------------------------- */

kvq_status kvq_cuda_check(const kvq_cuda_api *api, CUresult result, const char *what, ...) {
    if (result == CUDA_SUCCESS) return KVQ_OK;
    const kvq_status status = result == CUDA_ERROR_OUT_OF_MEMORY ? KVQ_ERR_MEMORY : KVQ_ERR_DEVICE;
    char call[256];
    va_list args;
    va_start(args, what);
    vsnprintf(call, sizeof call, what, args);
    va_end(args);
    const char *name = NULL, *sentence = NULL;
    if (api->cuGetErrorName(result, &name) != CUDA_SUCCESS || !name ||
        api->cuGetErrorString(result, &sentence) != CUDA_SUCCESS || !sentence) {
        return kvq_fail(status, "%s: error %d, which the CUDA driver has no name for.", call,
                        (int)result);
    }
    return kvq_fail(status, "%s: %.100s (%.60s).", call, sentence, name);
}

kvq_status kvq_cuda_device(CUdevice *out, const kvq_cuda_api *api, int index) {
    if (index < 0 || index >= api->n_devices) {
        return kvq_fail(KVQ_ERR_ARGUMENT, "CUDA device %d does not exist; there %s %d.", index,
                        api->n_devices == 1 ? "is" : "are", api->n_devices);
    }
    return kvq_cuda_check(api, api->cuDeviceGet(out, index), "cuDeviceGet of CUDA device %d",
                          index);
}

CUresult kvq_cuda_copy_up(const kvq_cuda_api *api, CUdeviceptr to, const void *from, size_t bytes,
                          CUstream stream) {
    const CUresult result = api->cuMemcpyHtoDAsync(to, from, bytes, stream);
    return result == CUDA_SUCCESS ? api->cuStreamSynchronize(stream) : result;
}
