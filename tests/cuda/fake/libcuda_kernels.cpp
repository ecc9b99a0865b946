/* libcuda_kernels.cpp: modules, kernels and graphs of the stand-in for libcuda.so.1.
 *
 * The kernels are those of core/cuda/kernels, compiled for the simulator and linked in; an image is
 * only checked for whether the driver could use it.
 */
#include <algorithm>
#include <cerrno>
#include <cstring>

#include <sys/mman.h>
#include <unistd.h>

#include "image.h"
#include "probe_args.h"
#include "state.h"

using fakecuda::Kind;
using fakecuda::Needs;
using fakecuda::state;

namespace {

constexpr unsigned MOST_DEPTH = 64, MOST_ROWS = 65535;

/* Bytes of static shared memory, by tests/cuda/resources.txt. */
const std::map<std::string, unsigned> static_shared = {
#include "static_shared.inc"
    {"kvq_cuda_probe", PROBE_SHARED},
};

bool is_mapped(uintptr_t address) {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    return msync(reinterpret_cast<void *>(address / page * page), page, MS_ASYNC) == 0 ||
           errno != ENOMEM;
}

/* What looks like a pointer of the host among the arguments of a kernel would work here, and on a
 * device not. Addresses below 4 GiB are left alone: they are numbers more often. So are those whose
 * lower half is small: an int, and what happens to lie in the gap that follows it in a struct. */
bool is_foreign(uintptr_t word) {
    if (word < uintptr_t{1} << 32 || word >= uintptr_t{1} << 47) return false;
    if (static_cast<uint32_t>(word) < 1 << 16) return false;
    if (state().memory.holds(word, 0, Kind::DEVICE, state().current())) return false;
    if (state().memory.holds(word, 0, Kind::PINNED, nullptr)) return false;
    return is_mapped(word);
}

void check_arguments(const CUfunc_st &function, const std::vector<unsigned char> &bytes) {
    for (size_t i = 0; i + sizeof(uintptr_t) <= bytes.size(); i += sizeof(uintptr_t)) {
        uintptr_t word;
        memcpy(&word, &bytes[i], sizeof word);
        if (!is_foreign(word)) continue;
        state().violation("%s was given %#zx, which is no address of its device, at byte %zu of "
                          "its arguments",
                          function.kernel->name.c_str(), static_cast<size_t>(word), i);
    }
}

bool fits(const CUfunc_st &function, dim3 grid, dim3 block, unsigned shared_bytes) {
    if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX) return false;
    if (grid.y > MOST_ROWS || grid.z > MOST_ROWS) return false;
    if (!block.x || !block.y || !block.z || block.z > MOST_DEPTH) return false;
    if (uint64_t{block.x} * block.y * block.z > function.kernel->most_threads) return false;
    return shared_bytes <= function.most_dynamic_shared;
}

} // namespace

// ---- modules and kernels ------------------------------------------------------------------------

EXPORTED CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (state().captures()) return state().break_captures();
        const CUresult result =
            fakecuda::check_image(image, state().settings.version, state().settings.capability);
        if (result == CUDA_SUCCESS) *module = state().modules.add({state().current(), {}});
        return result;
    });
}

EXPORTED CUresult cuModuleUnload(CUmodule module) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().modules.has(module)) return CUDA_ERROR_INVALID_HANDLE;
        state().unload(module);
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().modules.has(module)) return CUDA_ERROR_INVALID_HANDLE;
        const cusim::Kernel *const kernel = cusim::find_kernel(std::string(name));
        if (!kernel) return CUDA_ERROR_NOT_FOUND;
        CUfunction &known = module->functions[name];
        if (!known) {
            const auto row = static_shared.find(name);
            const unsigned shared = row == static_shared.end() ? 0 : row->second;
            known = state().functions.add(
                {kernel, shared, static_cast<unsigned>(cusim::default_shared_limit) - shared,
                 false});
        }
        *function = known;
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute,
                                     int value) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().functions.has(function)) return CUDA_ERROR_INVALID_HANDLE;
        const int most = fakecuda::most_shared(state().settings.capability) -
                         static_cast<int>(function->static_shared);
        if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0 ||
            value > most) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        function->most_dynamic_shared = static_cast<unsigned>(value);
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                                 unsigned grid_z, unsigned block_x, unsigned block_y,
                                 unsigned block_z, unsigned shared_bytes, CUstream stream,
                                 void **arguments, void **extra) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        const dim3 grid(grid_x, grid_y, grid_z), block(block_x, block_y, block_z);
        if (!state().valid(stream) || !state().functions.has(function)) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        if (!fits(*function, grid, block, shared_bytes) || extra) return CUDA_ERROR_INVALID_VALUE;
        std::vector<std::vector<unsigned char>> copies; // the caller's may be gone when it runs
        const std::vector<size_t> &sizes = function->kernel->parameter_sizes;
        for (size_t i = 0; i < sizes.size(); i++) {
            const auto *const begin = static_cast<const unsigned char *>(arguments[i]);
            copies.emplace_back(begin, begin + sizes[i]);
            check_arguments(*function, copies.back());
        }
        if (stream->capturing && !function->launched) {
            state().violation("%s is captured before it was ever launched: a driver may have to "
                              "load it then",
                              function->kernel->name.c_str());
        }
        function->launched = true;
        const cusim::Kernel *const kernel = function->kernel;
        stream->push([=]() mutable -> CUresult {
            if (!state().functions.has(function)) {
                state().violation("%s runs after its module was unloaded", kernel->name.c_str());
                return CUDA_ERROR_LAUNCH_FAILED;
            }
            std::vector<void *> pointers;
            for (std::vector<unsigned char> &copy : copies) pointers.push_back(copy.data());
            const bool ran = cusim::launch(*kernel, grid, block, shared_bytes, pointers.data());
            for (const std::string &error : cusim::take_errors()) {
                state().violation("%s: %s", kernel->name.c_str(), error.c_str());
            }
            return ran ? CUDA_SUCCESS : CUDA_ERROR_LAUNCH_FAILED;
        });
        return CUDA_SUCCESS;
    });
}

// ---- graphs -------------------------------------------------------------------------------------

EXPORTED CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().valid(stream)) return CUDA_ERROR_INVALID_HANDLE;
        if (stream->capturing) return CUDA_ERROR_ILLEGAL_STATE;
        stream->capturing = true;
        stream->relaxed = mode == CU_STREAM_CAPTURE_MODE_RELAXED;
        stream->capture_broken = false;
        stream->captured.clear();
        return CUDA_SUCCESS;
    });
}

/* Whatever goes wrong, the capture ends. */
EXPORTED CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    *graph = nullptr;
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().valid(stream)) return CUDA_ERROR_INVALID_HANDLE;
        if (!stream->capturing) return CUDA_ERROR_ILLEGAL_STATE;
        stream->capturing = false;
        if (state().fault() != CUDA_SUCCESS) return state().fault();
        if (stream->capture_broken) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        *graph = state().graphs.add({stream->context, std::move(stream->captured)});
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph,
                                              unsigned long long flags) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().graphs.has(graph)) return CUDA_ERROR_INVALID_HANDLE;
        if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
        *executable = state().executables.add({graph->context, graph->nodes});
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().valid(stream)) return CUDA_ERROR_INVALID_HANDLE;
        if (!state().executables.has(executable)) return CUDA_ERROR_INVALID_HANDLE;
        for (const fakecuda::Work &node : executable->nodes) stream->push(node);
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuGraphExecDestroy(CUgraphExec executable) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().executables.has(executable)) return CUDA_ERROR_INVALID_HANDLE;
        state().executables.remove(executable);
        return CUDA_SUCCESS;
    });
}

EXPORTED CUresult cuGraphDestroy(CUgraph graph) {
    return state().call(__func__, Needs::CONTEXT, [&]() -> CUresult {
        if (!state().graphs.has(graph)) return CUDA_ERROR_INVALID_HANDLE;
        state().graphs.remove(graph);
        return CUDA_SUCCESS;
    });
}
