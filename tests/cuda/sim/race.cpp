/* race.cpp: finds data races between the threads of a launch.
 *
 * Kernel files are compiled with -fsanitize=thread, which calls __tsan_readN and __tsan_writeN
 * before each access; libtsan is not linked, these functions stand here. A shadow cell for each
 * byte keeps its last write and two reads since. Two accesses race if one of them is a write, not
 * both are atomic, and nothing orders them: a barrier of the block, __syncwarp within a warp, or
 * the program order of one thread. So a race is found in any order in which the threads happen to
 * run.
 *
 * Besides: shared memory that is read before it was written, or while cp.async writes to it.
 */
#include "race.h"
#include "fiber.h"
#include "observer.h"
#include "source_place.h"
#include "warp_cost.h"

#include <algorithm>
#include <array>
#include <memory>
#include <set>
#include <stdlib.h>
#include <string.h>
#include <unordered_map>

extern "C" unsigned char __start_cusim_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_cusim_shared[] __attribute__((weak, visibility("hidden")));

namespace cusim {

bool measure_memory = getenv("CUSIM_MEMORY") != nullptr;

namespace {

/* An access, as a cell remembers it. */
struct Access {
    uint32_t block;    // serial number over all launches, from 1; 0: none
    uint32_t barriers; // that the block had passed
    uint32_t clock;    // of its lane
    uint32_t thread : 10, atomic : 1, in_flight : 1, source : 20;
};

struct Cell {
    Access write;
    Access reads[2]; // unordered with each other, of different warps if there were such
};

constexpr size_t page_bytes = 256, max_pages = 16384, n_cached = 1024;
using Page = std::array<Cell, page_bytes>;

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
struct {
    uintptr_t number;
    Page *page;
} cached[n_cached];

uint32_t block_serial, first_serial; // of the block under way; of the launch's first
uint32_t barriers_passed;
uint32_t clocks[1024][32]; // [thread]: what it knows of the lanes of its warp, vector clocks
bool in_atomic;            // the access that is announced is atomic

std::set<std::array<uint32_t, 3>> reported; // of this launch: kind, sources

Cell &cell_of(uintptr_t address) {
    const uintptr_t number = address / page_bytes;
    auto &slot = cached[number % n_cached];
    if (!slot.page || slot.number != number) {
        std::unique_ptr<Page> &page = pages[number];
        if (!page) page = std::make_unique<Page>();
        slot = {number, page.get()};
    }
    return (*slot.page)[address % page_bytes];
}

bool is_shared(uintptr_t address) {
    return address - (uintptr_t)active.shared < active.shared_bytes ||
           (address >= (uintptr_t)__start_cusim_shared && address < (uintptr_t)__stop_cusim_shared);
}

/* Shared memory begins anew with each block, global memory is compared over a launch. */
bool counts(const Access &access, bool shared) {
    return shared ? access.block == block_serial : access.block && access.block >= first_serial;
}

bool ordered(const Access &before, const Access &now) {
    if (before.block != now.block) return false;
    if (before.thread == now.thread || before.barriers < now.barriers) return true;
    return before.thread / 32 == now.thread / 32 &&
           before.clock <= clocks[now.thread][before.thread % 32];
}

bool conflict(const Access &before, const Access &now, bool shared) {
    return counts(before, shared) && !(before.atomic && now.atomic) && !ordered(before, now);
}

enum Kind : uint32_t { write_then_read, write_then_write, read_then_write, in_flight, unwritten };

void complain(Kind kind, const Access &before, const Access &now, uintptr_t address, bool shared) {
    const uint32_t other = kind == unwritten ? 0 : before.source;
    if (!reported.insert({kind, now.source, other}).second) return;
    const char *memory = shared ? "shared" : "global";
    const std::string here = source_text(now.source);
    if (kind == unwritten) {
        report("shared memory read before it is written, by thread %u at %s", (unsigned)now.thread,
               here.c_str());
        return;
    }
    const std::string there = source_text(before.source);
    if (kind == in_flight) {
        report("shared memory used by thread %u at %s while the cp.async of thread %u at %s is in "
               "flight",
               (unsigned)now.thread, here.c_str(), (unsigned)before.thread, there.c_str());
        return;
    }
    static const char *const verbs[][2] = {
        {"written", "read"}, {"written", "written"}, {"read", "written"}};
    report("race on %s memory at %p: %s by thread %u%s at %s, %s by thread %u at %s", memory,
           (void *)address, verbs[kind][0], (unsigned)before.thread,
           before.block == now.block ? "" : " of another block", there.c_str(), verbs[kind][1],
           (unsigned)now.thread, here.c_str());
}

/* Of many reads two are enough to find a race with any later write: if several threads have read,
 * one of the two is not the writer; if several warps have, one of the two is of another. */
void keep_read(Cell &cell, const Access &now, bool shared) {
    Access &first = cell.reads[0], &second = cell.reads[1];
    if (!counts(first, shared) || ordered(first, now)) {
        first = now;
        if (counts(second, shared) && ordered(second, now)) second = {};
    } else if (!counts(second, shared) || ordered(second, now) ||
               (second.thread / 32 == first.thread / 32 && now.thread / 32 != first.thread / 32)) {
        second = now;
    }
}

void check_byte(uintptr_t address, const Access &now, bool write, bool shared) {
    Cell &cell = cell_of(address);
    if (!counts(cell.write, shared)) {
        if (shared && !write) complain(unwritten, {}, now, address, shared);
    } else if (cell.write.in_flight) {
        complain(in_flight, cell.write, now, address, shared);
    } else if (conflict(cell.write, now, shared)) {
        complain(write ? write_then_write : write_then_read, cell.write, now, address, shared);
    }
    if (!write) {
        keep_read(cell, now, shared);
        return;
    }
    for (const Access &read : cell.reads)
        if (conflict(read, now, shared)) complain(read_then_write, read, now, address, shared);
    cell = {now, {}};
}

Access access_now(uint32_t source) {
    const unsigned thread = current->rank;
    Access now = {};
    now.block = block_serial;
    now.barriers = barriers_passed;
    now.clock = clocks[thread][current->lane];
    now.thread = thread & 1023;
    now.atomic = in_atomic;
    now.source = source & 0xfffff;
    return now;
}

void check(const void *p, size_t n, bool write, uint32_t source) {
    const bool shared = is_shared((uintptr_t)p);
    const Access now = access_now(source);
    for (size_t i = 0; i < n; i++) check_byte((uintptr_t)p + i, now, write, shared);
    if (measure_memory) count_access(source, (uintptr_t)p, (unsigned)n, shared, write);
}

/* What the instrumented code announces. Fibers' stacks are private but for the collectives, which
 * the scheduler orders. */
void announced(const void *p, size_t n, bool write, void *return_address) {
    if (!current || fiber_owns(p) || is_built_in(p)) return;
    check(p, n, write, source_of((uintptr_t)return_address - 1));
}

void announced_aligned(const void *p, size_t n, bool write, void *return_address) {
    if (current && (uintptr_t)p % n && !fiber_owns(p))
        report("misaligned %s of %zu bytes at %p, at %s", write ? "write" : "read", n, p,
               source_text(source_of((uintptr_t)return_address - 1)).c_str());
    announced(p, n, write, return_address);
}

struct Detector : Observer {
    Detector() { observer = this; }

    void launch_begins() override {
        first_serial = block_serial + 1;
        reported.clear();
        if (pages.size() <= max_pages) return;
        pages.clear();
        memset(cached, 0, sizeof cached);
    }

    void block_begins() override {
        block_serial++;
        barriers_passed = 0;
        memset(clocks, 0, active.n_threads * sizeof clocks[0]);
        for (unsigned i = 0; i < active.n_threads; i++) clocks[i][i % 32] = 1;
        if (measure_memory) count_block_begins();
    }

    void barrier_passed() override { barriers_passed++; }

    void warp_synchronised(unsigned warp, unsigned lanes) override {
        uint32_t known[32] = {};
        for (unsigned lane = 0; lane < 32; lane++)
            if (lanes >> lane & 1)
                for (unsigned i = 0; i < 32; i++)
                    known[i] = std::max(known[i], clocks[warp * 32 + lane][i]);
        for (unsigned lane = 0; lane < 32; lane++) {
            if (!(lanes >> lane & 1)) continue;
            memcpy(clocks[warp * 32 + lane], known, sizeof known);
            clocks[warp * 32 + lane][lane]++;
        }
    }

    void atomic_access(const void *p, size_t n, Place at) override {
        in_atomic = true;
        check(p, n, true, source_of(at));
        in_atomic = false;
    }

    /* The hardware may write from the begin of a copy to its wait. */
    void copy_begins(const void *to, const void *from, size_t n, Place at) override {
        const uint32_t source = source_of(at);
        check(from, n, false, source);
        check(to, n, true, source);
        for (size_t i = 0; i < n; i++) cell_of((uintptr_t)to + i).write.in_flight = 1;
    }

    void copy_lands(const void *to, size_t n) override {
        for (size_t i = 0; i < n; i++) {
            Access &write = cell_of((uintptr_t)to + i).write;
            write = access_now(write.source);
        }
    }

    void launch_ends(const std::string &kernel) override {
        if (measure_memory) count_launch_ends(kernel, getenv("CUSIM_MEMORY") != nullptr);
    }
} detector;

} // namespace
} // namespace cusim

using cusim::announced;
using cusim::announced_aligned;

#define CALLER __builtin_return_address(0)

#define CUSIM_ACCESS(n)                                                                            \
    void __tsan_read##n(void *p) { announced_aligned(p, n, false, CALLER); }                       \
    void __tsan_write##n(void *p) { announced_aligned(p, n, true, CALLER); }                       \
    void __tsan_unaligned_read##n(void *p) { announced(p, n, false, CALLER); }                     \
    void __tsan_unaligned_write##n(void *p) { announced(p, n, true, CALLER); }

extern "C" {
CUSIM_ACCESS(1)
CUSIM_ACCESS(2)
CUSIM_ACCESS(4)
CUSIM_ACCESS(8)
CUSIM_ACCESS(16)
void __tsan_read_range(void *p, size_t n) { announced(p, n, false, CALLER); }
void __tsan_write_range(void *p, size_t n) { announced(p, n, true, CALLER); }
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}

/* The compiler does not instrument these; objcopy sends the calls of kernel files here. */
void *cusim_memcpy(void *to, const void *from, size_t n) {
    announced(from, n, false, CALLER);
    announced(to, n, true, CALLER);
    return memcpy(to, from, n);
}
void *cusim_memmove(void *to, const void *from, size_t n) {
    announced(from, n, false, CALLER);
    announced(to, n, true, CALLER);
    return memmove(to, from, n);
}
void *cusim_memset(void *p, int value, size_t n) {
    announced(p, n, true, CALLER);
    return memset(p, value, n);
}
}
