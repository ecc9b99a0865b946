/* stream.h: contexts, streams, events and graphs of the stand-in.
 *
 * Nothing that is put into a stream runs before somebody waits for it, so that host code that reads
 * too early reads what was there before. Work that fails spoils its context, as with a real driver:
 * every later call reports it.
 */
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include <cuda.h>

#include "memory.h"

namespace fakecuda {

using Work = std::function<CUresult()>;

struct Context {
    int device = 0;
    int retained = 0;
    CUresult spoiled = CUDA_SUCCESS;
};

} // namespace fakecuda

/* The driver's handles are pointers to these. */
struct CUctx_st : fakecuda::Context {};

struct CUstream_st {
    CUcontext context;
    bool blocking; // waits for the default stream, and that for it
    std::deque<fakecuda::Work> queue;
    bool capturing = false, relaxed = false, capture_broken = false;
    std::vector<fakecuda::Work> captured;

    void push(fakecuda::Work work);

    /* Runs what is queued until `until` holds. */
    CUresult drain(fakecuda::Memory &memory, const std::function<bool()> &until = {});
};

struct CUgraph_st {
    CUcontext context;
    std::vector<fakecuda::Work> nodes;
};

struct CUgraphExec_st {
    CUcontext context;
    std::vector<fakecuda::Work> nodes;
};

/* What a record of an event that is still queued shares with it: the event may be destroyed or
 * recorded again before. */
struct CUevent_st {
    struct Record {
        bool done = false;
        double seconds = 0;
    };
    CUcontext context;
    bool timed;
    CUstream stream = nullptr; // of the last record
    std::shared_ptr<Record> last;
};
