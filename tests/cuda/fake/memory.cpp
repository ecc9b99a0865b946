// memory.cpp: see memory.h.
#include "memory.h"

#include <cstring>

#include <sys/mman.h>
#include <unistd.h>

namespace fakecuda {

namespace {

constexpr unsigned char FILL = 0xff;
constexpr size_t ALIGNMENT = 256; // before it a page is empty

size_t page() {
    static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

void *pointer(uintptr_t address) { return reinterpret_cast<void *>(address); }

} // namespace

uintptr_t Memory::allocate(size_t bytes, Kind kind, const void *owner) {
    const size_t pages = (ALIGNMENT + bytes + page() - 1) / page() * page();
    void *const mapped = mmap(nullptr, pages + 2 * page(), PROT_NONE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return 0;
    const uintptr_t first = reinterpret_cast<uintptr_t>(mapped) + page();
    mprotect(pointer(first), pages, PROT_READ | PROT_WRITE);
    memset(pointer(first), FILL, pages);
    if (kind == Kind::DEVICE) mprotect(pointer(first), pages, PROT_NONE);
    blocks_[first + ALIGNMENT] = {bytes, pages, kind, owner};
    return first + ALIGNMENT;
}

bool Memory::release(uintptr_t address, Kind kind, bool *intact) {
    const auto found = blocks_.find(address);
    if (found == blocks_.end() || found->second.kind != kind) return false;
    const Block &block = found->second;
    const uintptr_t first = address - ALIGNMENT;
    mprotect(pointer(first), block.pages, PROT_READ);
    const auto *const all = static_cast<const unsigned char *>(pointer(first));
    *intact = true;
    for (size_t i = 0; i < block.pages; i++) {
        if (i < ALIGNMENT || i >= ALIGNMENT + block.bytes) *intact &= all[i] == FILL;
    }
    munmap(pointer(first - page()), block.pages + 2 * page());
    blocks_.erase(found);
    return true;
}

size_t Memory::release_all(const void *owner) {
    size_t n = 0;
    for (auto at = blocks_.begin(); at != blocks_.end();) {
        const auto [address, block] = *at++;
        bool intact;
        if (block.owner == owner) n += release(address, block.kind, &intact);
    }
    return n;
}

bool Memory::holds(uintptr_t address, size_t bytes, Kind kind, const void *owner) const {
    auto found = blocks_.upper_bound(address);
    if (found == blocks_.begin()) return false;
    --found;
    const Block &block = found->second;
    if (block.kind != kind || (owner && block.owner != owner)) return false;
    const size_t before = address - found->first;
    return before <= block.bytes && bytes <= block.bytes - before;
}

size_t Memory::used(const void *owner) const {
    size_t sum = 0;
    for (const auto &[address, block] : blocks_) {
        if (block.kind == Kind::DEVICE && block.owner == owner) sum += block.bytes;
    }
    return sum;
}

void Memory::protect(bool open) const {
    for (const auto &[address, block] : blocks_) {
        if (block.kind != Kind::DEVICE) continue;
        mprotect(pointer(address - ALIGNMENT), block.pages,
                 open ? PROT_READ | PROT_WRITE : PROT_NONE);
    }
}

} // namespace fakecuda
