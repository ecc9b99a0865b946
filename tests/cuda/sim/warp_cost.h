/* warp_cost.h: counts what the memory accesses of warps cost; called by the race detector. */
#ifndef CUSIM_WARP_COST_H
#define CUSIM_WARP_COST_H

#include "race.h"

namespace cusim {

void count_access(uint32_t source, uintptr_t address, unsigned n, bool shared, bool write);
void count_block_begins();
void count_launch_ends(const std::string &kernel, bool print);

/* Of one request: passes over the 32 banks of shared memory, 4 bytes wide; accesses of 8 and 16
 * bytes go by half and quarter warps. Lanes that want the same word share it. */
struct Cost {
    uint64_t cost, least;
};
Cost shared_cost(const std::vector<uintptr_t> &addresses, unsigned n);
/* Sectors of 32 bytes that a request to global memory touches. */
Cost global_cost(const std::vector<uintptr_t> &addresses, unsigned n);

} // namespace cusim

#endif
