/* warp_cost.cpp: see warp_cost.h. */
#include "warp_cost.h"
#include "source_place.h"

#include <algorithm>
#include <array>
#include <map>
#include <stdio.h>
#include <unordered_map>

namespace cusim {
namespace {

constexpr unsigned n_banks = 32, bank_bytes = 4, sector_bytes = 32;

/* What the lanes of a warp do at one place, each for the k-th time. */
struct Request {
    std::vector<uintptr_t> addresses;
    unsigned n;
};

std::map<uint32_t, MemoryUse> uses;                   // by source; of this launch
std::vector<MemoryUse> past;                          // of earlier ones
std::map<std::array<uint32_t, 3>, Request> under_way; // source, warp, k; of this block
std::unordered_map<uint64_t, uint32_t> times;         // how often a thread was at a source

void finish(uint32_t source, const Request &request) {
    MemoryUse &use = uses[source];
    const Cost cost = use.shared ? shared_cost(request.addresses, request.n)
                                 : global_cost(request.addresses, request.n);
    use.requests++;
    use.lanes += request.addresses.size();
    use.cost += cost.cost;
    use.least_cost += cost.least;
}

void finish_all() {
    for (const auto &[key, request] : under_way) finish(key[0], request);
    under_way.clear();
    times.clear();
}

} // namespace

Cost shared_cost(const std::vector<uintptr_t> &addresses, unsigned n) {
    const size_t lanes = n > 8 ? 8 : n > 4 ? 16 : 32; // of a phase
    Cost total = {0, 0};
    for (size_t begin = 0; begin < addresses.size(); begin += lanes) {
        std::vector<uintptr_t> words;
        for (size_t i = begin; i < std::min(addresses.size(), begin + lanes); i++)
            for (uintptr_t word = addresses[i] / bank_bytes;
                 word <= (addresses[i] + n - 1) / bank_bytes; word++)
                words.push_back(word);
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        unsigned in_bank[n_banks] = {}, passes = 1;
        for (const uintptr_t word : words) passes = std::max(passes, ++in_bank[word % n_banks]);
        total.cost += passes;
        total.least += 1;
    }
    return total;
}

Cost global_cost(const std::vector<uintptr_t> &addresses, unsigned n) {
    std::vector<uintptr_t> sectors, distinct = addresses;
    for (const uintptr_t address : addresses)
        for (uintptr_t sector = address / sector_bytes; sector <= (address + n - 1) / sector_bytes;
             sector++)
            sectors.push_back(sector);
    std::sort(sectors.begin(), sectors.end());
    std::sort(distinct.begin(), distinct.end());
    sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    return {sectors.size(), (distinct.size() * n + sector_bytes - 1) / sector_bytes};
}

void count_access(uint32_t source, uintptr_t address, unsigned n, bool shared, bool write) {
    MemoryUse &use = uses[source];
    use.shared = shared;
    use.write = write;
    const uint32_t k = times[(uint64_t)source << 32 | current->rank]++;
    Request &request = under_way[{source, current->warp, k}];
    request.addresses.push_back(address);
    request.n = n;
}

void count_block_begins() { finish_all(); }

void count_launch_ends(const std::string &kernel, bool print) {
    finish_all();
    if (print) fprintf(stderr, "cusim: memory of %s\n", kernel.c_str());
    for (auto &[source, use] : uses) {
        use.place = source_text(source);
        if (use.place.rfind("sim/cusim.h", 0) == 0) continue; // parameters of the kernel
        if (print)
            fprintf(stderr,
                    "  %s %s: %llu requests of %.1f lanes, %.2f %s each, %.2f at least, %s\n",
                    use.shared ? "shared" : "global", use.write ? "write" : "read",
                    (unsigned long long)use.requests, (double)use.lanes / (double)use.requests,
                    (double)use.cost / (double)use.requests, use.shared ? "passes" : "sectors",
                    (double)use.least_cost / (double)use.requests, use.place.c_str());
        past.push_back(use);
    }
    uses.clear();
}

std::vector<MemoryUse> take_memory_use() { return std::exchange(past, {}); }

} // namespace cusim
