/* race.h: what a program can ask of the race detector (race.cpp) that it is linked with. */
#ifndef CUSIM_RACE_H
#define CUSIM_RACE_H

#include "cusim.h"

namespace cusim {

/* What the accesses of one place in the sources cost, over all warps. A request is what the lanes
 * of a warp do at once; lanes are matched by how often each has been at that place in the block. */
struct MemoryUse {
    std::string place; // FILE:LINE, inlined calls from the inside out
    bool shared, write;
    uint64_t requests, lanes;
    /* Passes over the banks of shared memory, or sectors of 32 bytes of global memory; and the
     * fewest that these bytes could take. */
    uint64_t cost, least_cost;
};

/* Whether to count; also on where the environment variable CUSIM_MEMORY is set, which prints each
 * launch's table to stderr. Counting is slow. */
extern bool measure_memory;

/* Of the launches since the last call. */
std::vector<MemoryUse> take_memory_use();

} // namespace cusim

#endif
