/* test_race.cpp: the race detector and the counts of requests. Compiled like a kernel file. */
#include "check.h"
#include "cuda/kernels/port.cuh"
#include "race.h"
#include "warp_cost.h"

#include <string.h>

namespace {

using cusim::launch;

/* The launch is clean, or has the error, in every order. */
template <class... P, class... A>
void expect(const char *error, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
            A... arguments) {
    check::in_all_orders([&] {
        const bool clean = launch(kernel, grid, block, shared, arguments...);
        CHECK(clean == (error == nullptr));
        if (error) CHECK(check::reported(error));
    });
}

template <class T> std::vector<T> buffer(size_t n, T value = T()) {
    return std::vector<T>(n, value);
}

void barriers_order_a_block() {
    const auto kernel = +[](int *out, bool before, bool after) {
        __shared__ int s[64];
        const int t = (int)threadIdx.x;
        s[t] = t;
        if (before) __syncthreads();
        const int x = s[(t + 40) % 64];
        if (after) __syncthreads();
        s[t] = x;
        out[t] = x;
    };
    auto out = buffer<int>(64);
    expect(nullptr, kernel, 1, 64, 0, out.data(), true, true);
    expect("race on shared memory", kernel, 1, 64, 0, out.data(), false, true);
    expect("race on shared memory", kernel, 1, 64, 0, out.data(), true, false);
}

void syncwarp_orders_the_lanes_of_its_mask_and_no_others() {
    const auto kernel = +[](int *out, unsigned even, unsigned odd, int distance) {
        __shared__ int s[64];
        const int t = (int)threadIdx.x;
        s[t] = t;
        __syncwarp(t % 2 ? odd : even);
        out[t] = s[t ^ distance];
    };
    auto out = buffer<int>(64);
    const unsigned even = 0x55555555, odd = 0xaaaaaaaa;
    expect(nullptr, kernel, 1, 64, 0, out.data(), ~0u, ~0u, 1);
    expect(nullptr, kernel, 1, 64, 0, out.data(), even, odd, 2);
    expect("race on shared memory", kernel, 1, 64, 0, out.data(), even, odd, 1);
    expect("race on shared memory", kernel, 1, 64, 0, out.data(), ~0u, ~0u, 32);
}

void syncwarp_is_transitive() {
    const auto kernel = +[](int *out, int last) {
        __shared__ int s;
        const int t = (int)threadIdx.x;
        if (t == 0) s = 5;
        if (t < 2) __syncwarp(0x3);
        if (t == 1 || t == 2) __syncwarp(0x6); // lane 2 hears of lane 0 through lane 1
        if (t == last) out[0] = s;
    };
    auto out = buffer<int>(1);
    expect(nullptr, kernel, 1, 32, 0, out.data(), 2);
    expect("race on shared memory", kernel, 1, 32, 0, out.data(), 3);
}

void shuffles_order_nothing() {
    const auto kernel = +[](int *out) {
        __shared__ int s[32];
        const int t = (int)threadIdx.x;
        s[t] = t;
        out[t] = __shfl_xor_sync(~0u, t, 1);
        out[t] += s[t ^ 1];
    };
    auto out = buffer<int>(32);
    expect("race on shared memory", kernel, 1, 32, 0, out.data());
}

void blocks_are_unordered() {
    const auto kernel = +[](int *out, int stride) { out[blockIdx.x * stride] = 1; };
    const auto reads = +[](int *out) {
        if (blockIdx.x == 0)
            out[0] = 1;
        else
            out[1] = out[0];
    };
    auto out = buffer<int>(4);
    expect(nullptr, kernel, 4, 1, 0, out.data(), 1);
    expect("race on global memory", kernel, 4, 1, 0, out.data(), 0);
    expect("of another block", reads, 2, 1, 0, out.data());
}

void launches_are_ordered() {
    const auto kernel = +[](int *out, int shift) { out[(threadIdx.x + shift) % 64] += 1; };
    auto out = buffer<int>(64);
    for (int i = 0; i < 3; i++) expect(nullptr, kernel, 1, 64, 0, out.data(), i);
}

void bytes_of_a_word_are_apart() {
    const auto kernel = +[](uint8_t *out, int shift) { out[threadIdx.x >> shift] = 1; };
    auto out = buffer<uint8_t>(64);
    expect(nullptr, kernel, 1, 64, 0, out.data(), 0);
    expect("race on global memory", kernel, 1, 64, 0, out.data(), 1);
}

void atomics_race_with_plain_accesses_only() {
    const auto kernel = +[](int *sum, bool plain) {
        if (plain && threadIdx.x == 7)
            *sum = 3;
        else
            atomicAdd(sum, 1);
    };
    int sum = 0;
    expect(nullptr, kernel, 4, 64, 0, &sum, false);
    expect("race on global memory", kernel, 1, 64, 0, &sum, true);
}

void a_writer_among_many_readers_is_found() {
    const auto kernel = +[](int *out, int writer) {
        __shared__ int s;
        const int t = (int)threadIdx.x;
        if (t == 0) s = 1;
        __syncthreads();
        out[t] = s;
        if (t == writer) s = 2;
    };
    auto out = buffer<int>(128);
    for (int writer = 0; writer < 128; writer += 9)
        expect("race on shared memory", kernel, 1, 128, 0, out.data(), writer);
}

void memory_functions_are_seen() {
    const auto kernel = +[](char *out, int n, int what) {
        char *mine = out + threadIdx.x * 64;
        if (what == 0) memset(mine, 0, (size_t)n);
        if (what == 1) memcpy(mine, out + 64 * 32, (size_t)n);
        if (what == 2) memmove(mine, out + 64 * 32, (size_t)n);
        if (what == 3) memset(mine, 0, 64);
        if (what == 4) memset(mine, 0, 65);
    };
    auto out = buffer<char>(64 * 33);
    for (int what = 0; what < 3; what++) {
        expect(nullptr, kernel, 1, 32, 0, out.data(), 64, what);
        expect("race on global memory", kernel, 1, 32, 0, out.data(), 65, what);
    }
    expect(nullptr, kernel, 1, 32, 0, out.data(), 64, 3);
    expect("race on global memory", kernel, 1, 32, 0, out.data(), 65, 4);
}

void shared_memory_that_nobody_wrote_is_found() {
    const auto kernel = +[](int *out, int limit) {
        __shared__ int fixed[64];
        KVQ_SHARED_MEMORY(int, dynamic);
        const int t = (int)threadIdx.x;
        if (t < limit) fixed[t] = dynamic[t] = t;
        out[64 * blockIdx.x + t] = fixed[t] + dynamic[t];
    };
    auto out = buffer<int>(128);
    expect(nullptr, kernel, 2, 64, 256, out.data(), 64);
    expect("shared memory read before it is written", kernel, 1, 64, 256, out.data(), 63);
}

void shared_memory_is_forgotten_between_blocks() {
    const auto kernel = +[](int *out) {
        __shared__ int s;
        if (blockIdx.x == 0) s = 1;
        out[blockIdx.x] = s;
    };
    auto out = buffer<int>(2);
    CHECK(!launch(kernel, 2, 1, 0, out.data()));
    CHECK(check::reported("shared memory read before it is written"));
}

void copies_in_flight_may_not_be_touched() {
    const auto kernel = +[](const int *in, int *out, int what) {
        KVQ_SHARED_MEMORY(int, s);
        const int t = (int)threadIdx.x;
        if (what == 1) { // somebody still reads what the copy overwrites
            s[4 * t] = 0;
            __syncthreads();
            out[t] = s[4 * (t ^ 1)];
        }
        kvq_cp_async16(s + 4 * t, in + 4 * t);
        kvq_cp_commit();
        if (what == 2) out[t] = s[4 * t];
        if (what == 3) s[4 * t] = 1;
        kvq_cp_wait<0>();
        if (what != 4) __syncthreads();
        out[t] = s[4 * (t ^ 33)];
    };
    auto in = buffer<int>(256), out = buffer<int>(64);
    const int *const from = in.data();
    expect(nullptr, kernel, 1, 64, 1024, from, out.data(), 0);
    expect("race on shared memory", kernel, 1, 64, 1024, from, out.data(), 1);
    expect("is in flight", kernel, 1, 64, 1024, from, out.data(), 2);
    expect("is in flight", kernel, 1, 64, 1024, from, out.data(), 3);
    CHECK(!launch(kernel, 1, 64, 1024, from, out.data(), 4));
    CHECK(!cusim::take_errors().empty()); // a race, or in flight, by the order
}

void misaligned_accesses_are_reported() {
    const auto kernel =
        +[](const char *in, float *out) { *out = *reinterpret_cast<const float *>(in + 2); };
    alignas(16) const char in[8] = {};
    float out;
    CHECK(!launch(kernel, 1, 1, 0, in, &out));
    CHECK(check::reported("misaligned read of 4 bytes"));
}

void reports_name_the_lines() {
    const auto kernel = +[](int *out) { out[0] = (int)threadIdx.x; };
    const std::string line = "test_race.cpp:" + std::to_string(__LINE__ - 1);
    int out;
    CHECK(!launch(kernel, 1, 2, 0, &out));
    CHECK(check::reported("written by thread 0 at sim/" + line + ", written by thread 1 at sim/" +
                          line));
}

// ---- what requests cost -------------------------------------------------------------------------

void bank_conflicts_follow_the_banks() {
    struct {
        unsigned bytes, stride; // between lanes
        uint64_t passes, least;
    } const cases[] = {
        {4, 4, 1, 1},   {4, 8, 2, 1},    {4, 128, 32, 1},  {4, 0, 1, 1},  {4, 132, 1, 1},
        {1, 1, 1, 1},   {1, 128, 32, 1}, {2, 64, 16, 1},   {8, 8, 2, 2},  {8, 16, 4, 2},
        {16, 16, 4, 4}, {16, 32, 8, 4},  {16, 128, 32, 4}, {16, 0, 4, 4},
    };
    for (const auto &c : cases) {
        std::vector<uintptr_t> addresses;
        for (unsigned lane = 0; lane < 32; lane++) addresses.push_back(4096 + lane * c.stride);
        const cusim::Cost cost = cusim::shared_cost(addresses, c.bytes);
        CHECK(cost.cost == c.passes && cost.least == c.least);
    }
}

void sectors_are_counted_once() {
    struct {
        unsigned bytes, stride, offset;
        uint64_t sectors, least;
    } const cases[] = {
        {4, 4, 0, 4, 4}, {4, 4, 16, 5, 4}, {4, 32, 0, 32, 4}, {16, 16, 0, 16, 16}, {4, 0, 0, 1, 1},
    };
    for (const auto &c : cases) {
        std::vector<uintptr_t> addresses;
        for (unsigned lane = 0; lane < 32; lane++)
            addresses.push_back(4096 + c.offset + lane * c.stride);
        const cusim::Cost cost = cusim::global_cost(addresses, c.bytes);
        CHECK(cost.cost == c.sectors && cost.least == c.least);
    }
}

void requests_of_a_kernel_are_counted_by_line() {
    const auto kernel = +[](const float *in, float *out, int stride) {
        __shared__ float s[32 * 32];
        const int t = (int)threadIdx.x % 32;
        for (int i = 0; i < 10; i++) {
            s[t * stride] = 1;
            __syncthreads();
        }
        out[threadIdx.x] = in[threadIdx.x * 8] + s[t * stride];
    };
    alignas(32) static float in[256], out[32]; // on sectors, as memory of a GPU is
    cusim::take_memory_use();
    cusim::measure_memory = true;
    for (const int stride : {1, 2, 32}) {
        CHECK(launch(kernel, 1, 32, 0, in, out, stride));
        uint64_t found = 0;
        for (const cusim::MemoryUse &use : cusim::take_memory_use()) {
            CHECK(use.lanes == 32 * use.requests);
            if (use.shared) {
                CHECK(use.requests == (use.write ? 10 : 1) && use.least_cost == use.requests);
                CHECK(use.cost == use.requests * (unsigned)stride);
            } else {
                CHECK(use.requests == 1 && use.cost == (use.write ? 4 : 32) && use.least_cost == 4);
            }
            found++;
        }
        CHECK(found == 4);
    }
    cusim::measure_memory = false;
}

const check::Test tests[] = {
    {"barriers order a block", barriers_order_a_block},
    {"__syncwarp orders the lanes of its mask and no others",
     syncwarp_orders_the_lanes_of_its_mask_and_no_others},
    {"__syncwarp is transitive", syncwarp_is_transitive},
    {"shuffles order nothing", shuffles_order_nothing},
    {"blocks are unordered", blocks_are_unordered},
    {"launches are ordered", launches_are_ordered},
    {"bytes of a word are apart", bytes_of_a_word_are_apart},
    {"atomics race with plain accesses only", atomics_race_with_plain_accesses_only},
    {"a writer among many readers is found", a_writer_among_many_readers_is_found},
    {"memory functions are seen", memory_functions_are_seen},
    {"shared memory that nobody wrote is found", shared_memory_that_nobody_wrote_is_found},
    {"shared memory is forgotten between blocks", shared_memory_is_forgotten_between_blocks},
    {"copies in flight may not be touched", copies_in_flight_may_not_be_touched},
    {"misaligned accesses are reported", misaligned_accesses_are_reported},
    {"reports name the lines", reports_name_the_lines},
    {"bank conflicts follow the banks", bank_conflicts_follow_the_banks},
    {"sectors are counted once", sectors_are_counted_once},
    {"requests of a kernel are counted by line", requests_of_a_kernel_are_counted_by_line},
};

} // namespace

int main() { return check::run(tests); }
