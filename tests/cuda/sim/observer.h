/* observer.h: what the scheduler tells the race detector (race.cpp), if it is linked. */
#ifndef CUSIM_OBSERVER_H
#define CUSIM_OBSERVER_H

#include "cusim.h"

namespace cusim {

struct Observer {
    virtual ~Observer() = default;
    virtual void launch_begins() = 0;
    virtual void block_begins() = 0;
    virtual void barrier_passed() = 0;
    virtual void warp_synchronised(unsigned warp, unsigned lanes) = 0;
    virtual void atomic_access(const void *p, size_t n, Place at) = 0;
    virtual void copy_begins(const void *to, const void *from, size_t n, Place at) = 0;
    virtual void copy_lands(const void *to, size_t n) = 0;
    virtual void launch_ends(const std::string &kernel) = 0;
};

extern Observer *observer; // NULL if there is none

bool is_built_in(const void *p); // where threadIdx and its like are read from

} // namespace cusim

#endif
