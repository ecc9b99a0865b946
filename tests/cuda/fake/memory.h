/* memory.h: memory of the stand-in's devices, and page-locked memory of the host.
 *
 * A device's memory can be touched only while work of a stream runs: for the rest of the time its
 * pages are closed, so that host code that follows a device pointer crashes. It begins as 0xff
 * (NaN in every float format) and stands between two closed pages. What its pages have before and
 * behind it must still be 0xff when it is freed. Its address is a multiple of 256, which a driver
 * promises, and of no more.
 */
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

namespace fakecuda {

enum class Kind { DEVICE, PINNED };

class Memory {
  public:
    /* The address; 0 if the system has none. `owner` tells devices apart. */
    uintptr_t allocate(size_t bytes, Kind kind, const void *owner);

    /* False if nothing begins at the address. *intact: whether nothing was written beside it. */
    bool release(uintptr_t address, Kind kind, bool *intact);

    size_t release_all(const void *owner); /* how many there were */

    /* Whether a range lies within one allocation of this kind and owner (NULL: of any). */
    bool holds(uintptr_t address, size_t bytes, Kind kind, const void *owner) const;

    size_t used(const void *owner) const; /* bytes of device memory */
    size_t count() const { return blocks_.size(); }

    /* Device memory is open for as long as one of these lives. */
    class Opened {
      public:
        explicit Opened(Memory &memory) : memory_(memory) { memory_.protect(true); }
        ~Opened() { memory_.protect(false); }
        Opened(const Opened &) = delete;
        Opened &operator=(const Opened &) = delete;

      private:
        Memory &memory_;
    };

  private:
    struct Block {
        size_t bytes, pages; /* as asked for; of the pages that hold it */
        Kind kind;
        const void *owner;
    };
    void protect(bool open) const;

    std::map<uintptr_t, Block> blocks_;
};

} // namespace fakecuda
