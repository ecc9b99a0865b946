/* state.h: all that the stand-in knows, and the frame that each of its functions runs in. */
#pragma once

#include <cstdarg>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "cusim.h"
#include "stream.h"

/* What the library shows: exports.map. */
#define EXPORTED extern "C"

/* A function of a module, with what the caller set for it. */
struct CUfunc_st {
    const cusim::Kernel *kernel;
    unsigned static_shared, most_dynamic_shared; // bytes
    bool launched;
};

struct CUmod_st {
    CUcontext context;
    std::map<std::string, CUfunction> functions; // those that were asked for
};

namespace fakecuda {

/* The objects of one type that were made and not released. Those that were are kept, so that no
 * new one gets their address and passes for them. */
template <class T> class Handles {
  public:
    T *add(T object) {
        ever_made_.push_back(std::make_unique<T>(std::move(object)));
        return *all_.insert(ever_made_.back().get()).first;
    }
    bool has(T *object) const { return all_.count(object) != 0; }
    void remove(T *object) { all_.erase(object); }
    size_t count() const { return all_.size(); }
    const std::set<T *> &all() const { return all_; }

  private:
    std::vector<std::unique_ptr<T>> ever_made_;
    std::set<T *> all_;
};

struct Settings { // what the environment says
    int n_devices = 1, version = 13000, capability = 87, n_processors = 16;
    size_t bytes = size_t{4} << 30;
    bool integrated = false;
    std::string failing; // function
    int failing_call = 0;
    CUresult failing_with = CUDA_ERROR_UNKNOWN;
};

enum class Needs { NOTHING, INITIALIZED, CONTEXT };

class State {
  public:
    /* Runs `body` as the function `name` of the driver: one caller at a time; after the checks that
     * every function makes; failing where the environment says so. */
    template <class Body> CUresult call(const char *name, Needs needs, Body body) {
        const std::lock_guard<std::mutex> guard(lock_);
        fault_ = count_call(name);
        if (fault_ != CUDA_SUCCESS && !is_release(name)) return fault_;
        CUresult result = check(needs);
        if (result == CUDA_SUCCESS) result = body();
        if (result == CUDA_SUCCESS && current()) result = current()->spoiled;
        return result == CUDA_SUCCESS ? fault_ : result;
    }

    /* What the environment lets this call fail with, after it has released something. */
    CUresult fault() const { return fault_; }

    void initialize();         // reads the environment
    CUcontext current() const; // the context of the calling thread; NULL: none
    std::vector<CUcontext> &stack() const;
    CUresult drain_all();

    /* Streams of the current context alone. The default stream is refused: work on it does not wait
     * for streams that do not block, so whoever mixes the two gets results by luck. */
    bool valid(CUstream stream);

    void unload(CUmodule module);
    void end(CUcontext context); // with all that is in it

    /* Captures of the current context that forbid calls which could wait for them: all but those of
     * the relaxed mode. */
    bool captures() const;
    CUresult break_captures(); // by such a call

    /* Counts and prints a fault of the caller. */
    void violation(const char *format, ...) __attribute__((format(printf, 2, 3)));

    int leaks() const;
    int violations() const { return n_violations_; }
    int calls(const char *function);
    const char *called(int number);
    void reread();

    Settings settings;
    Memory memory;
    std::vector<CUctx_st> devices;
    Handles<CUstream_st> streams;
    Handles<CUevent_st> events;
    Handles<CUmod_st> modules;
    Handles<CUfunc_st> functions;
    Handles<CUgraph_st> graphs;
    Handles<CUgraphExec_st> executables;

  private:
    CUresult count_call(const char *name);
    CUresult check(Needs needs) const;
    static bool is_release(const std::string &name);

    std::mutex lock_;
    CUresult fault_ = CUDA_SUCCESS;
    std::map<std::string, int> n_calls_;
    std::vector<const char *> calls_; // their functions
    bool initialized_ = false, environment_read_ = false;
    int n_violations_ = 0;
    size_t n_lost_ = 0; // objects that went with their context

    void read_environment();
};

State &state();

/* Bytes of shared memory that a block can have on a device of this compute capability. */
int most_shared(int capability);

} // namespace fakecuda
