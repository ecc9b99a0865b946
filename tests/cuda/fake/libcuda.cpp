/* libcuda.cpp: devices, memory, streams and events of the stand-in for libcuda.so.1, a library of
 * the functions of the driver that pykvq and its benchmarks call, for tests to load in its place.
 * It is stricter than a driver, in order to find what only happens to work: see memory.h and
 * stream.h, and `valid`. NVIDIA's cuda.h, which it includes, checks the signatures.
 */
#include <chrono>
#include <cstdio>
#include <cstring>

#include "state.h"

#undef cuEventElapsedTime // cuda.h means its second version

using fakecuda::Kind;
using fakecuda::Needs;
using fakecuda::state;

namespace {

uintptr_t address(CUdeviceptr pointer) { return static_cast<uintptr_t>(pointer); }
void *host(CUdeviceptr pointer) { return reinterpret_cast<void *>(address(pointer)); }

bool on_device(CUdeviceptr pointer, size_t bytes) {
    return state().memory.holds(address(pointer), bytes, Kind::DEVICE, state().current());
}

bool exists(CUdevice device) {
    return device >= 0 && device < static_cast<int>(state().devices.size());
}

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

struct Error {
    CUresult code;
    const char *name, *sentence;
};

const Error errors[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain."},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS",
     "an illegal memory access was encountered"},
    {CUDA_ERROR_CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CUDA_ERROR_ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE",
     "the operation cannot be performed in the present state"},
    {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

const Error *find_error(CUresult code) {
    for (const Error &error : errors) {
        if (error.code == code) return &error;
    }
    return nullptr;
}

} // namespace

// ---- errors, devices, contexts ------------------------------------------------------------------

/* These two report nothing of earlier work: they serve to report it. */
EXPORTED CUresult cuGetErrorName(CUresult error, const char **name) {
    const Error *const found = find_error(error);
    *name = found ? found->name : nullptr;
    return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORTED CUresult cuGetErrorString(CUresult error, const char **sentence) {
    const Error *const found = find_error(error);
    *sentence = found ? found->sentence : nullptr;
    return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORTED CUresult cuInit(unsigned flags) {
    return state().call(__func__, Needs::NOTHING, [&]() -> CUresult {
        if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
        if (state().settings.n_devices == 0) return CUDA_ERROR_NO_DEVICE;
        state().initialize();
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuDriverGetVersion(int *version) {
    return state().call(__func__, Needs::NOTHING, [&]() -> CUresult {
        *version = state().settings.version;
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuDeviceGetCount(int *count) {
    return state().call(__func__, Needs::INITIALIZED, [&]() -> CUresult {
        *count = static_cast<int>(state().devices.size());
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuDeviceGet(CUdevice *device, int index) {
    return state().call(__func__, Needs::INITIALIZED, [&]() -> CUresult {
        *device = index;
        return exists(index) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
    });
}

EXPORTED CUresult cuDeviceGetName(char *name, int bytes, CUdevice device) {
    return state().call(__func__, Needs::INITIALIZED, [&]() -> CUresult {
        if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
        snprintf(name, static_cast<size_t>(bytes), "Simulated device %d", device);
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    return state().call(__func__, Needs::INITIALIZED, [&]() -> CUresult {
        *bytes = state().settings.bytes;
        return exists(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
    });
}

EXPORTED CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return state().call(__func__, Needs::INITIALIZED, [&]() -> CUresult {
        const int capability = state().settings.capability;
        if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
        switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            *value = capability / 10;
            break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            *value = capability % 10;
            break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
            *value = state().settings.n_processors;
            break;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
            *value = 1300000;
            break;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
            *value = 3200000;
            break;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
            *value = 256;
            break;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
            *value = 4 << 20;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
            *value = fakecuda::most_shared(capability);
            break;
        case CU_DEVICE_ATTRIBUTE_INTEGRATED:
            *value = state().settings.integrated;
            break;
        default:
            return CUDA_ERROR_INVALID_VALUE;
        }
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return state().call(__func__, Needs::INITIALIZED, [&]() -> CUresult {
        if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
        *context = &state().devices[static_cast<size_t>(device)];
        (*context)->retained++;
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    return state().call(__func__, Needs::INITIALIZED, [&]() -> CUresult {
        if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
        CUctx_st &context = state().devices[static_cast<size_t>(device)];
        if (context.retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
        if (--context.retained == 0) state().end(&context);
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuCtxPushCurrent_v2(CUcontext context) {
    return state().call(__func__, Needs::INITIALIZED, [&]() -> CUresult {
        if (!context) return CUDA_ERROR_INVALID_CONTEXT;
        if (context->retained == 0) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
        state().stack().push_back(context);
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    return state().call(__func__, Needs::INITIALIZED, [&]() -> CUresult {
        if (!state().current()) return CUDA_ERROR_INVALID_CONTEXT;
        *context = state().current();
        state().stack().pop_back();
        return CUDA_SUCCESS;
    });
}

// ---- memory -------------------------------------------------------------------------------------

EXPORTED CUresult cuMemGetInfo_v2(size_t *free, size_t *total) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        *total = state().settings.bytes;
        *free = *total - state().memory.used(state().current());
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (state().captures()) return state().break_captures();
        if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
        const size_t used = state().memory.used(state().current());
        if (bytes > state().settings.bytes - used) return CUDA_ERROR_OUT_OF_MEMORY;
        *pointer = state().memory.allocate(bytes, Kind::DEVICE, state().current());
        return *pointer ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    });
}

static CUresult release(uintptr_t begin, Kind kind) {
    if (begin == 0) return CUDA_SUCCESS;
    state().drain_all();
    bool intact = true;
    if (!state().memory.release(begin, kind, &intact)) return CUDA_ERROR_INVALID_VALUE;
    if (!intact) state().violation("memory was written beside its ends");
    return intact ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

EXPORTED CUresult cuMemFree_v2(CUdeviceptr pointer) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (state().captures()) state().break_captures();
        return release(address(pointer), Kind::DEVICE);
    });
}

EXPORTED CUresult cuMemAllocHost_v2(void **pointer, size_t bytes) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (state().captures()) return state().break_captures();
        if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
        const uintptr_t begin = state().memory.allocate(bytes, Kind::PINNED, state().current());
        *pointer = reinterpret_cast<void *>(begin);
        return begin ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    });
}

EXPORTED CUresult cuMemFreeHost(void *pointer) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (state().captures()) state().break_captures();
        return release(reinterpret_cast<uintptr_t>(pointer), Kind::PINNED);
    });
}

/* Copies that return when done wait for streams that block, and for no others. */
static CUresult copy_now(void *to, const void *from, size_t bytes) {
    if (state().captures()) return state().break_captures();
    for (CUstream_st *const stream : state().streams.all()) {
        if (stream->blocking) stream->drain(state().memory);
    }
    const fakecuda::Memory::Opened opened(state().memory);
    memcpy(to, from, bytes);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!on_device(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
        return copy_now(host(to), from, bytes);
    });
}

EXPORTED CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!on_device(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
        return copy_now(to, host(from), bytes);
    });
}

EXPORTED CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes,
                                       CUstream stream) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().valid(stream)) return CUDA_ERROR_INVALID_HANDLE;
        if (!on_device(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
        stream->push([=] {
            memcpy(host(to), from, bytes);
            return CUDA_SUCCESS;
        });
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().valid(stream)) return CUDA_ERROR_INVALID_HANDLE;
        if (!on_device(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
        stream->push([=] {
            memcpy(to, host(from), bytes);
            return CUDA_SUCCESS;
        });
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes,
                                       CUstream stream) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().valid(stream)) return CUDA_ERROR_INVALID_HANDLE;
        if (!on_device(to, bytes) || !on_device(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
        const CUdeviceptr distance = to > from ? to - from : from - to;
        if (distance < bytes) {
            state().violation("a copy of %zu bytes overlaps itself", bytes);
            return CUDA_ERROR_INVALID_VALUE;
        }
        stream->push([=] {
            memcpy(host(to), host(from), bytes);
            return CUDA_SUCCESS;
        });
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes,
                                  CUstream stream) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().valid(stream)) return CUDA_ERROR_INVALID_HANDLE;
        if (!on_device(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
        stream->push([=] {
            memset(host(to), value, bytes);
            return CUDA_SUCCESS;
        });
        return CUDA_SUCCESS;
    });
}

// ---- streams and events -------------------------------------------------------------------------

EXPORTED CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (flags & ~static_cast<unsigned>(CU_STREAM_NON_BLOCKING)) return CUDA_ERROR_INVALID_VALUE;
        *stream = state().streams.add({state().current(), flags == 0, {}, false, false, false, {}});
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuStreamSynchronize(CUstream stream) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().valid(stream)) return CUDA_ERROR_INVALID_HANDLE;
        if (stream->capturing) {
            stream->capture_broken = true;
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
        return stream->drain(state().memory);
    });
}

EXPORTED CUresult cuStreamDestroy_v2(CUstream stream) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().valid(stream)) return CUDA_ERROR_INVALID_HANDLE;
        if (stream->capturing) {
            state().violation("a stream was destroyed while it captures");
            stream->capture_broken = true;
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
        const CUresult result = stream->drain(state().memory);
        state().streams.remove(stream);
        return result;
    });
}

EXPORTED CUresult cuEventCreate(CUevent *event, unsigned flags) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        const unsigned known = CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC;
        if (flags & ~known) return CUDA_ERROR_INVALID_VALUE;
        const bool timed = !(flags & CU_EVENT_DISABLE_TIMING);
        *event = state().events.add({state().current(), timed, nullptr, nullptr});
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuEventRecord(CUevent event, CUstream stream) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().events.has(event) || !state().valid(stream)) return CUDA_ERROR_INVALID_HANDLE;
        if (event->context != stream->context) return CUDA_ERROR_INVALID_HANDLE;
        const auto record = std::make_shared<CUevent_st::Record>();
        event->stream = stream;
        event->last = record;
        stream->push([record] {
            record->done = true;
            record->seconds = now();
            return CUDA_SUCCESS;
        });
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuEventSynchronize(CUevent event) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().events.has(event)) return CUDA_ERROR_INVALID_HANDLE;
        if (!event->last || event->last->done) return CUDA_SUCCESS;
        return event->stream->drain(state().memory, [event] { return event->last->done; });
    });
}

EXPORTED CUresult cuEventElapsedTime(float *milliseconds, CUevent first, CUevent last) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        for (const CUevent event : {first, last}) {
            if (!state().events.has(event) || !event->timed) return CUDA_ERROR_INVALID_HANDLE;
            if (!event->last) return CUDA_ERROR_INVALID_HANDLE;
            if (!event->last->done) return CUDA_ERROR_NOT_READY;
        }
        *milliseconds = static_cast<float>(1e3 * (last->last->seconds - first->last->seconds));
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuEventDestroy_v2(CUevent event) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().events.has(event)) return CUDA_ERROR_INVALID_HANDLE;
        state().events.remove(event);
        return CUDA_SUCCESS;
    });
}
