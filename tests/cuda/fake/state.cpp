// state.cpp: see state.h.
#include "state.h"

#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "fakecuda.h"

namespace fakecuda {

namespace {

const char *environment(const char *name, const char *otherwise) {
    const char *const value = getenv(name);
    return value && *value ? value : otherwise;
}

} // namespace

State &state() {
    static State *const only = new State; // never destroyed: threads may outlive main
    return *only;
}

void State::read_environment() {
    environment_read_ = true;
    settings.n_devices = atoi(environment("FAKECUDA_DEVICES", "1"));
    settings.version = atoi(environment("FAKECUDA_VERSION", "13000"));
    settings.capability = atoi(environment("FAKECUDA_CAPABILITY", "87"));
    settings.n_processors = atoi(environment("FAKECUDA_PROCESSORS", "16"));
    settings.bytes = strtoull(environment("FAKECUDA_MEMORY", "4294967296"), nullptr, 10);
    settings.integrated = atoi(environment("FAKECUDA_INTEGRATED", "0")) != 0;
    settings.failing.clear();
    settings.failing_with = CUDA_ERROR_UNKNOWN;
    const std::string fail = environment("FAKECUDA_FAIL", "");
    const size_t first = fail.find(':');
    if (first == std::string::npos) return;
    settings.failing = fail.substr(0, first);
    settings.failing_call = atoi(fail.c_str() + first + 1);
    const size_t second = fail.find(':', first + 1);
    if (second == std::string::npos) return;
    settings.failing_with = static_cast<CUresult>(atoi(fail.c_str() + second + 1));
}

void State::initialize() {
    initialized_ = true;
    for (int i = static_cast<int>(devices.size()); i < settings.n_devices; i++) {
        devices.emplace_back();
        devices.back().device = i;
    }
}

std::vector<CUcontext> &State::stack() const {
    static thread_local std::vector<CUcontext> contexts;
    return contexts;
}

CUcontext State::current() const { return stack().empty() ? nullptr : stack().back(); }

CUresult State::count_call(const char *name) {
    if (!environment_read_) read_environment();
    const int n = ++n_calls_[name];
    calls_.push_back(name);
    const bool fails = settings.failing == "any"
                           ? static_cast<int>(calls_.size()) == settings.failing_call
                           : name == settings.failing && n == settings.failing_call;
    return fails ? settings.failing_with : CUDA_SUCCESS;
}

int State::calls(const char *function) {
    const std::lock_guard<std::mutex> guard(lock_);
    return n_calls_[function];
}

const char *State::called(int number) {
    const std::lock_guard<std::mutex> guard(lock_);
    const bool was_made = number >= 1 && static_cast<size_t>(number) <= calls_.size();
    return was_made ? calls_[static_cast<size_t>(number) - 1] : "";
}

void State::reread() {
    const std::lock_guard<std::mutex> guard(lock_);
    read_environment();
    n_calls_.clear();
    calls_.clear();
}

bool State::is_release(const std::string &name) {
    for (const char *const word : {"Free", "Destroy", "Unload", "Release", "EndCapture"}) {
        if (name.find(word) != std::string::npos) return true;
    }
    return false;
}

CUresult State::check(Needs needs) const {
    if (needs != Needs::NOTHING && !initialized_) return CUDA_ERROR_NOT_INITIALIZED;
    if (needs == Needs::CONTEXT) {
        if (!current()) return CUDA_ERROR_INVALID_CONTEXT;
        if (current()->retained == 0) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    }
    return CUDA_SUCCESS;
}

CUresult State::drain_all() {
    for (CUstream_st *const stream : streams.all()) stream->drain(memory);
    return current() ? current()->spoiled : CUDA_SUCCESS;
}

bool State::valid(CUstream stream) {
    if (!stream) violation("work was put into the default stream");
    return stream && streams.has(stream) && stream->context == current();
}

void State::unload(CUmodule module) {
    for (const auto &[name, function] : module->functions) functions.remove(function);
    modules.remove(module);
}

void State::end(CUcontext context) {
    const auto remove = [&](auto &handles) {
        const auto all = handles.all(); // a copy: the set itself shrinks
        for (auto *const object : all) {
            if (object->context != context) continue;
            if constexpr (std::is_same_v<decltype(object), CUmod_st *const>) {
                unload(object);
            } else {
                handles.remove(object);
            }
            n_lost_++;
        }
    };
    remove(streams);
    remove(events);
    remove(modules);
    remove(graphs);
    remove(executables);
    n_lost_ += memory.release_all(context);
    context->spoiled = CUDA_SUCCESS;
}

bool State::captures() const {
    for (const CUstream_st *const stream : streams.all()) {
        if (stream->context == current() && stream->capturing && !stream->relaxed) return true;
    }
    return false;
}

CUresult State::break_captures() {
    for (CUstream_st *const stream : streams.all()) {
        if (stream->context != current() || !stream->capturing) continue;
        stream->capture_broken |= !stream->relaxed;
    }
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

void State::violation(const char *format, ...) {
    n_violations_++;
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "fakecuda: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
}

int State::leaks() const {
    size_t n = n_lost_ + memory.count() + streams.count() + events.count() + modules.count() +
               graphs.count() + executables.count();
    for (const CUctx_st &device : devices) n += static_cast<size_t>(device.retained);
    return static_cast<int>(n);
}

/* "Technical Specifications per Compute Capability" in the CUDA C++ Programming Guide. */
int most_shared(int capability) {
    switch (capability) {
    case 75:
        return 64 << 10;
    case 80:
    case 87:
        return 163 << 10;
    case 86:
    case 89:
    case 120:
        return 99 << 10;
    default:
        return 227 << 10;
    }
}

} // namespace fakecuda

EXPORTED int fakecuda_leaks() { return fakecuda::state().leaks(); }
EXPORTED int fakecuda_violations() { return fakecuda::state().violations(); }
EXPORTED int fakecuda_calls(const char *function) { return fakecuda::state().calls(function); }
EXPORTED const char *fakecuda_called(int number) { return fakecuda::state().called(number); }
EXPORTED void fakecuda_reread() { fakecuda::state().reread(); }
