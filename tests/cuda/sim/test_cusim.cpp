/* test_cusim.cpp: what the simulator makes of the CUDA language: each intrinsic against its
 * definition in plain loops, each error of the scheduler provoked. Compiled like a kernel file. */
#include "check.h"
#include "cuda/kernels/port.cuh"

#include <math.h>
#include <string.h>
#include <algorithm>
#include <set>

namespace {

using cusim::launch;

/* xorshift64*: the same numbers on every machine. */
uint64_t random_state = 1;
uint32_t random_bits() {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)(random_state * 2685821657736338717u >> 32);
}

template <class T> std::vector<T> buffer(size_t n, T value = T()) {
    return std::vector<T>(n, value);
}

// ---- threads, blocks, barriers ------------------------------------------------------------------

void every_thread_of_every_block_runs_once() {
    check::in_all_orders([] {
        const dim3 grid(3, 2, 2), block(5, 3, 2);
        auto times = buffer<int>(12 * 30);
        const auto kernel = +[](int *at) {
            const unsigned b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
            const unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
            at[b * 30 + t]++;
        };
        CHECK(launch(kernel, grid, block, 0, times.data()));
        CHECK(std::count(times.begin(), times.end(), 1) == 12 * 30);
    });
}

struct Sequence {
    int n, seen[64];
};

void orders_are_what_they_say() {
    const auto kernel = +[](Sequence *s) {
        s->seen[s->n++] = (int)threadIdx.x;
        __syncwarp();
        s->seen[s->n++] = (int)threadIdx.x;
    };
    Sequence forward = {}, reverse = {}, random = {}, again = {}, other = {};
#ifdef KVQ_RACE
    return; // the order of threads is a race by its nature
#endif
    CHECK(launch(kernel, 1, 32, 0, &forward));
    for (int i = 0; i < 64; i++) CHECK(forward.seen[i] == i % 32);
    cusim::options.order = cusim::Order::reverse;
    CHECK(launch(kernel, 1, 32, 0, &reverse));
    for (int i = 0; i < 64; i++) CHECK(reverse.seen[i] == 31 - i % 32);
    cusim::options.order = cusim::Order::random;
    CHECK(launch(kernel, 1, 32, 0, &random));
    CHECK(launch(kernel, 1, 32, 0, &again));
    cusim::options.seed = 2;
    CHECK(launch(kernel, 1, 32, 0, &other));
    CHECK(!memcmp(&random, &again, sizeof random));
    CHECK(memcmp(&random, &other, sizeof random) != 0);
    CHECK(std::set<int>(random.seen, random.seen + 32).size() == 32);
}

void kernels_without_barriers_never_switch() {
    const uint64_t before = cusim::statistics.switches;
    auto out = buffer<int>(1024);
    const auto kernel = +[](int *o) { o[blockIdx.x * 256 + threadIdx.x] = 1; };
    CHECK(launch(kernel, 4, 256, 0, out.data()));
    CHECK(cusim::statistics.switches - before == 2 * 4); // into each block and back
}

void barriers_separate_what_comes_before_and_after() {
    check::in_all_orders([] {
        const auto kernel = +[](int *out) {
            __shared__ int shared[256];
            for (int round = 0; round < 5; round++) {
                shared[threadIdx.x] = (int)threadIdx.x + round;
                __syncthreads();
                out[threadIdx.x] = shared[(threadIdx.x + 77) % 256];
                __syncthreads();
            }
        };
        auto out = buffer<int>(256);
        CHECK(launch(kernel, 1, 256, 0, out.data()));
        for (int i = 0; i < 256; i++) CHECK(out[i] == (i + 77) % 256 + 4);
    });
}

void barriers_count_and_vote() {
    check::in_all_orders([] {
        const auto kernel = +[](int *out) {
            const int t = (int)threadIdx.x;
            int *const mine = out + 5 * t;
            mine[0] = __syncthreads_count(t % 3 == 0);
            mine[1] = __syncthreads_or(t == 40);
            mine[2] = __syncthreads_or(t == 400);
            mine[3] = __syncthreads_and(t < 64);
            mine[4] = __syncthreads_and(t != 40);
        };
        auto out = buffer<int>(5 * 64);
        CHECK(launch(kernel, 1, 64, 0, out.data()));
        for (int t = 0; t < 64; t++) {
            const int expected[] = {22, 1, 0, 1, 0};
            CHECK(std::equal(expected, expected + 5, out.begin() + 5 * t));
        }
    });
}

void divergent_barriers_are_reported() {
    const auto at_two_places = +[](int *) {
        if (threadIdx.x < 32)
            __syncthreads();
        else
            __syncthreads();
    };
    const auto not_by_all = +[](int *) {
        if (threadIdx.x < 32) __syncthreads();
    };
    check::in_all_orders([&] {
        CHECK(!launch(at_two_places, 1, 64, 0, nullptr));
        CHECK(check::reported("divergent __syncthreads"));
        CHECK(!launch(not_by_all, 1, 64, 0, nullptr));
        CHECK(check::reported("32 have exited"));
    });
}

void deadlocks_name_the_threads_and_what_they_wait_for() {
    const auto kernel = +[](int *) {
        if (threadIdx.x < 16)
            __syncwarp(); // waits for the others
        else
            __syncthreads(); // and they for it
    };
    check::in_all_orders([&] {
        CHECK(!launch(kernel, 2, 64, 0, nullptr));
        CHECK(check::reported("deadlock: threads 0-15 wait in __syncwarp at"));
        CHECK(!launch(kernel, 1, 64, 0, nullptr));
        CHECK(check::reported("threads 16-63 wait in __syncthreads at"));
    });
    auto out = buffer<int>(64); // and the next launch works
    CHECK(launch(+[](int *o) { __syncthreads(), o[threadIdx.x] = 1; }, 1, 64, 0, out.data()));
    CHECK(std::count(out.begin(), out.end(), 1) == 64);
}

void impossible_launches_are_refused() {
    const auto kernel = +[](int *) {};
    CHECK(!launch(kernel, 1, 1025, 0, nullptr));
    CHECK(check::reported("a block of 1025 x 1 x 1 threads"));
    CHECK(!launch(kernel, 1, 0, 0, nullptr));
    CHECK(check::reported("a block of 0 x 1 x 1 threads"));
    CHECK(!launch(kernel, dim3(1, 65536), 32, 0, nullptr));
    CHECK(check::reported("a grid of 1 x 65536 x 1 blocks"));
    CHECK(!launch(kernel, 1, 32, 240000, nullptr));
    CHECK(check::reported("240000 bytes of dynamic shared memory"));
}

extern "C" void kvq_test_exported(const int value, int *out) { *out = value; }
KVQ_EXPORT_KERNEL(kvq_test_exported)

extern "C" __global__ void __launch_bounds__(32, 2) bounded(int *out) { out[threadIdx.x] = 1; }
KVQ_EXPORT_KERNEL(bounded)

void launch_bounds_hold() {
    auto out = buffer<int>(32);
    CHECK(cusim::find_kernel("bounded")->most_threads == 32);
    CHECK(launch(bounded, 1, 32, 0, out.data()));
    CHECK(!launch(bounded, 1, 33, 0, out.data()));
    CHECK(check::reported("a block of 33 x 1 x 1 threads; its __launch_bounds__ allow 32"));
}

void exported_kernels_launch_by_name() {
    const cusim::Kernel *kernel = cusim::find_kernel("kvq_test_exported");
    CHECK(kernel && kernel->parameter_sizes == (std::vector<size_t>{sizeof(int), sizeof(int *)}));
    CHECK(!cusim::find_kernel("kvq_test_absent"));
    int value = 7, result = 0, *out = &result;
    void *parameters[] = {&value, &out};
    CHECK(kernel && launch(*kernel, 1, 1, 0, parameters) && result == 7);
}

// ---- shared memory ------------------------------------------------------------------------------

void shared_memory_begins_each_block_as_ff() {
#ifdef KVQ_RACE
    return; // which reports the reads that this test makes
#endif
    const auto kernel = +[](uint32_t *out) {
        __shared__ uint32_t fixed[3];
        KVQ_SHARED_MEMORY(uint32_t, dynamic);
        out[2 * blockIdx.x] = fixed[2];
        out[2 * blockIdx.x + 1] = dynamic[4];
        fixed[2] = dynamic[4] = 5;
    };
    auto out = buffer<uint32_t>(4);
    CHECK(launch(kernel, 2, 1, 20, out.data()));
    CHECK(std::count(out.begin(), out.end(), ~0u) == 4);
}

void dynamic_shared_memory_is_aligned() {
    const auto kernel = +[](size_t *out) {
        KVQ_SHARED_MEMORY(char, bytes);
        *out = (size_t)bytes % 16;
    };
    size_t remainder = 1;
    CHECK(launch(kernel, 1, 1, 1, &remainder) && remainder == 0);
}

// ---- warp collectives ---------------------------------------------------------------------------

struct Shuffled {
    int by_index, by_xor, up, down;
};

/* What the CUDA guide says of a lane's source, for a width of a segment. */
void shuffles_follow_their_definition() {
    check::in_all_orders([] {
        const auto kernel = +[](Shuffled *out, int width, int delta) {
            const int t = (int)threadIdx.x, value = 100 * t;
            out[t].by_index = __shfl_sync(~0u, value, delta + t % 3, width);
            out[t].by_xor = __shfl_xor_sync(~0u, value, delta, width);
            out[t].up = __shfl_up_sync(~0u, value, (unsigned)delta, width);
            out[t].down = __shfl_down_sync(~0u, value, (unsigned)delta, width);
        };
        for (int width = 2; width <= 32; width *= 2) {
            for (int delta = 0; delta < 32; delta++) {
                auto out = buffer<Shuffled>(64);
                CHECK(launch(kernel, 1, 64, 0, out.data(), width, delta));
                for (int t = 0; t < 64; t++) {
                    const int warp = t / 32 * 32, lane = t % 32, first = lane / width * width;
                    const int end = first + width;
                    const int by_index = first + (delta + t % 3) % width, by_xor = lane ^ delta;
                    const int up = lane - delta, down = lane + delta;
                    CHECK(out[t].by_index == 100 * (warp + by_index));
                    CHECK(out[t].by_xor == 100 * (warp + (by_xor < end ? by_xor : lane)));
                    CHECK(out[t].up == 100 * (warp + (up >= first ? up : lane)));
                    CHECK(out[t].down == 100 * (warp + (down < end ? down : lane)));
                }
            }
        }
    });
}

void shuffles_carry_2_4_and_8_bytes() {
    const auto kernel = +[](double *wide, float *single, uint16_t *bits) {
        const int t = (int)threadIdx.x;
        wide[t] = __shfl_xor_sync(~0u, t / 3.0, 5);
        single[t] = __shfl_xor_sync(~0u, (float)t / 3.0f, 5);
        bits[t] = __half_as_ushort(__shfl_xor_sync(~0u, __float2half((float)t), 5));
    };
    auto wide = buffer<double>(32);
    auto single = buffer<float>(32);
    auto bits = buffer<uint16_t>(32);
    CHECK(launch(kernel, 1, 32, 0, wide.data(), single.data(), bits.data()));
    for (int t = 0; t < 32; t++) {
        CHECK(wide[t] == (t ^ 5) / 3.0);
        CHECK(single[t] == (float)(t ^ 5) / 3.0f);
        CHECK(bits[t] == kvq_f32_to_f16((float)(t ^ 5)));
    }
}

void a_shuffle_from_a_lane_outside_the_mask_gives_ff() {
    const auto kernel = +[](int *out) {
        const int t = (int)threadIdx.x;
        out[t] = t < 8 ? __shfl_sync(0xffu, t, 8 + t) : 0;
    };
    auto out = buffer<int>(32);
    CHECK(launch(kernel, 1, 32, 0, out.data()));
    CHECK(std::count(out.begin(), out.begin() + 8, -1) == 8);
}

void parts_of_a_warp_meet_apart() {
    check::in_all_orders([] {
        const auto kernel = +[](int *out) {
            const int t = (int)threadIdx.x;
            int sum = t;
            if (t < 16)
                for (int i = 8; i; i /= 2) sum += __shfl_xor_sync(0x0000ffffu, sum, i);
            else
                for (int i = 8; i; i /= 2) sum += __shfl_xor_sync(0xffff0000u, sum, i);
            out[t] = sum;
        };
        auto out = buffer<int>(32);
        CHECK(launch(kernel, 1, 32, 0, out.data()));
        for (int t = 0; t < 32; t++) CHECK(out[t] == (t < 16 ? 120 : 376));
    });
}

void collectives_at_two_places_are_reported() {
    const auto kernel = +[](int *out) {
        if (threadIdx.x < 16)
            out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
        else
            out[threadIdx.x] = __shfl_sync(~0u, 2, 0);
    };
    check::in_all_orders([&] {
        auto out = buffer<int>(32);
        CHECK(!launch(kernel, 1, 32, 0, out.data()));
        CHECK(check::reported("divergent __shfl_sync"));
    });
}

struct Votes {
    unsigned ballot;
    int any, none, all, not_all;
};

void votes_follow_their_definition() {
    check::in_all_orders([] {
        const auto kernel = +[](Votes *out) {
            const int t = (int)threadIdx.x;
            if (t % 32 >= 24) return;
            const unsigned mask = 0x00ffffffu;
            out[t].ballot = __ballot_sync(mask, t % 3 == 0);
            out[t].any = __any_sync(mask, t % 32 == 20);
            out[t].none = __any_sync(mask, t < 0);
            out[t].all = __all_sync(mask, t >= 0);
            out[t].not_all = __all_sync(mask, t % 32 != 20);
        };
        auto out = buffer<Votes>(64);
        CHECK(launch(kernel, 1, 64, 0, out.data()));
        for (int t = 0; t < 64; t++) {
            if (t % 32 >= 24) continue;
            unsigned ballot = 0;
            for (int i = 0; i < 24; i++) ballot |= (unsigned)((t / 32 * 32 + i) % 3 == 0) << i;
            const Votes &v = out[t];
            CHECK(v.ballot == ballot && v.any == 1 && !v.none && v.all == 1 && !v.not_all);
        }
    });
}

void masks_that_name_absent_lanes_are_reported() {
    const auto exited = +[](int *) {
        if (threadIdx.x < 16) __shfl_sync(~0u, 1, 0);
    };
    const auto never_were = +[](int *) { __shfl_sync(~0u, 1, 0); };
    const auto elsewhere = +[](int *) {
        if (threadIdx.x < 16) __shfl_sync(~0u, 1, 0);
        __syncthreads();
    };
    const auto not_its_own = +[](int *) { __shfl_sync(0xfffffffeu, 1, 0); };
    check::in_all_orders([&] {
        CHECK(!launch(exited, 1, 32, 0, nullptr));
        CHECK(check::reported("names lanes ffff0000 of warp 0, which have exited"));
        CHECK(!launch(never_were, 1, 48, 0, nullptr));
        CHECK(check::reported("names lanes ffff0000 of warp 1"));
        CHECK(!launch(elsewhere, 1, 32, 0, nullptr));
        CHECK(check::reported("threads 0-15 wait in __shfl_sync at"));
        CHECK(!launch(not_its_own, 1, 32, 0, nullptr));
        CHECK(check::reported("lane 0 is not in its own mask fffffffe"));
    });
}

// ---- atomics ------------------------------------------------------------------------------------

struct Counters {
    int sum, most, least, swapped;
    unsigned bits, sum_u, most_u, least_u, swapped_u, bits_u;
    int bits_i;
    float sum_f, swapped_f;
    int won;
};

void atomics_update_and_return_what_was_there() {
    check::in_all_orders([] {
        const auto kernel = +[](Counters *c, int *old) {
            const int t = (int)threadIdx.x;
            old[t] = atomicAdd(&c->sum, t);
            atomicMax(&c->most, t - 40);
            atomicMin(&c->least, t - 40);
            atomicOr(&c->bits_i, 1 << t % 8);
            atomicOr(&c->bits_u, 1u << t % 32);
            atomicAdd(&c->sum_u, (unsigned)t);
            atomicMax(&c->most_u, (unsigned)t);
            atomicMin(&c->least_u, (unsigned)t + 3);
            atomicAdd(&c->sum_f, 0.5f);
            atomicExch(&c->swapped, t);
            atomicExch(&c->swapped_u, (unsigned)t);
            atomicExch(&c->swapped_f, (float)t);
            if (atomicCAS(&c->won, -1, t) == -1) atomicAdd(&c->sum, 1000000);
        };
        Counters c = {};
        c.least_u = ~0u;
        c.won = -1;
        auto old = buffer<int>(64);
        CHECK(launch(kernel, 1, 64, 0, &c, old.data()));
        CHECK(c.sum == 64 * 63 / 2 + 1000000 && c.most == 23 && c.least == -40);
        CHECK(c.bits_i == 255 && c.bits_u == ~0u);
        CHECK(c.sum_u == 64 * 63 / 2 && c.most_u == 63 && c.least_u == 3 && c.sum_f == 32);
        CHECK(c.swapped >= 0 && c.swapped < 64 && c.swapped_u < 64 && c.swapped_f >= 0);
        CHECK(c.won >= 0 && c.won < 64);
        CHECK(*std::min_element(old.begin(), old.end()) == 0);
    });
}

// ---- integers -----------------------------------------------------------------------------------

void integer_intrinsics_follow_their_definition() {
    for (int i = 0; i < 100000; i++) {
        const unsigned a = random_bits(), b = random_bits(), c = random_bits(), s = random_bits();
        int64_t signed_dot = (int)c;
        uint64_t unsigned_dot = c, pair = (uint64_t)b << 32 | a;
        unsigned permuted = 0, with_signs = 0;
        int ones = 0, leading = 0, first = 0;
        for (int k = 0; k < 4; k++) {
            uint8_t x[4], y[4], both[8];
            memcpy(x, &a, 4), memcpy(y, &b, 4), memcpy(both, &a, 4), memcpy(both + 4, &b, 4);
            signed_dot += (int)(int8_t)x[k] * (int)(int8_t)y[k];
            unsigned_dot += (uint64_t)x[k] * y[k];
            const unsigned code = s >> 4 * k & 15; // __byte_perm does not look at its bit 3
            const unsigned byte = both[code % 8];
            permuted |= byte << 8 * k;
            with_signs |= (code < 8 ? byte : byte / 128 * 255) << 8 * k;
        }
        for (int k = 0; k < 32; k++) ones += (int)(a >> k & 1);
        while (leading < 32 && !(a >> (31 - leading) & 1)) leading++;
        while (first < 32 && !(a >> first & 1)) first++;
        CHECK(__dp4a((int)a, (int)b, (int)c) == (int)(uint32_t)signed_dot);
        CHECK(__dp4a(a, b, c) == (uint32_t)unsigned_dot);
        CHECK(__byte_perm(a, b, s) == permuted && kvq_permute(a, b, s) == with_signs);
        CHECK(__popc(a) == ones && __clz((int)a) == leading && __ffs((int)a) == first + 1);
        CHECK(__mulhi((int)a, (int)b) == (int)(((int64_t)(int)a * (int)b) >> 32));
        CHECK(__umulhi(a, b) == (uint32_t)(((unsigned __int128)a * b) >> 32));
        CHECK(__funnelshift_r(a, b, s) == (uint32_t)(pair >> s % 32));
        CHECK(__funnelshift_l(a, b, s) == (uint32_t)(pair << s % 32 >> 32));
    }
    CHECK(__clz(0) == 32 && __ffs(0) == 0);
    CHECK(min(3, -4) == -4 && max(3u, 4u) == 4u && max(1.5f, -2.0f) == 1.5f);
    const uint4 v = make_uint4(1, 2, 3, 4);
    CHECK(__ldg(&v).z == 3 && alignof(uint4) == 16 && alignof(float2) == 8 && alignof(char4) == 4);
}

// ---- floating point -----------------------------------------------------------------------------

void float_conversions_saturate_and_round() {
    CHECK(__float2int_rn(2.5f) == 2 && __float2int_rn(3.5f) == 4 && __float2int_rn(-2.5f) == -2);
    CHECK(__float2int_rz(2.9f) == 2 && __float2int_rz(-2.9f) == -2);
    CHECK(__float2int_rn(3e9f) == INT32_MAX && __float2int_rz(-3e9f) == INT32_MIN);
    CHECK(__float2int_rn(NAN) == 0 && __float2int_rz(NAN) == 0);
    CHECK(__int2float_rn(16777217) == 16777216.0f && __uint2float_rn(~0u) == 4294967296.0f);
    CHECK(__float_as_int(-0.0f) == INT32_MIN && __float_as_uint(1.0f) == 0x3f800000u);
    CHECK(__int_as_float(0x7f800000) == INFINITY && __uint_as_float(0x40000000u) == 2.0f);
}

void float_functions_are_within_an_ulp() {
    const auto close = [](float x, double exact) {
        return fabs(x - exact) <= 1.2e-7 * fabs(exact);
    };
    for (int i = 0; i < 1000; i++) {
        const float x = (float)random_bits() / 4294967296.0f * 20 + 0.01f;
        const float y = (float)random_bits() / 4294967296.0f * 2 + 0.01f;
        CHECK(close(__expf(x), exp(x)) && close(exp2f(x), exp2(x)) && close(__logf(y), log(y)));
        CHECK(close(kvq_exp2(-8 * x), -8 * x < -126 ? 0 : exp2(-8 * x)));
        CHECK(close(rsqrtf(x), 1 / sqrt(x)) && close(__fdividef(x, y), (double)x / y));
        CHECK(close(__powf(x, y), pow(x, y)));
        CHECK(fabs(__sinf(x) - sin(x)) < 1e-7 && fabs(__cosf(x) - cos(x)) < 1e-7);
        CHECK(__fmaf_rn(x, y, -x * y) == (float)((double)x * y - (double)(x * y)));
        CHECK(__fadd_rn(x, y) == x + y && __fsub_rn(x, y) == x - y && __fmul_rn(x, y) == x * y);
        CHECK(__fdiv_rn(x, y) == x / y && __frcp_rn(x) == 1 / x && __fsqrt_rn(x) == sqrtf(x));
    }
}

/* The value of a half by IEEE 754, and the half next to a value, ties to even. */
double half_value(uint32_t bits) {
    const int exponent = (int)(bits >> 10 & 31), mantissa = (int)(bits & 1023);
    const double sign = bits >> 15 ? -1 : 1;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexp(mantissa + 1024, exponent - 25) : ldexp(mantissa, -24));
}

uint16_t nearest_half(double x) {
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    const double size = fabs(x);
    if (size >= 65520) return sign | 0x7c00;
    if (size == 0) return sign;
    int exponent;
    frexp(size, &exponent);
    const int unit = std::max(exponent - 11, -24);
    const int whole = (int)nearbyint(ldexp(size, -unit)); // ties to even
    /* Counted from the smallest, halves follow each other without a gap. */
    return (uint16_t)(sign | (whole + (unit + 24) * 1024));
}

void halves_convert_as_ieee_754_and_bytes_h_say() {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        const __half h = __ushort_as_half((unsigned short)bits);
        const double value = half_value(bits);
        const float mine = __half2float(h);
        CHECK(__half_as_ushort(h) == bits);
        if (value != value) {
            CHECK(mine != mine && kvq_f16_to_f32((uint16_t)bits) != mine);
            continue;
        }
        CHECK(mine == value && signbit(mine) == signbit(value));
        CHECK(mine == kvq_f16_to_f32((uint16_t)bits));
        CHECK(__half_as_ushort(__float2half(mine)) == bits);
    }
    for (int i = 0; i < 1000000; i++) {
        const float x = __uint_as_float(random_bits());
        if (x != x) continue;
        const uint16_t bits = __half_as_ushort(__float2half_rn(x));
        CHECK(bits == nearest_half(x) && bits == kvq_f32_to_f16(x));
    }
}

void halves_compute_with_one_rounding() {
    for (int i = 0; i < 300000; i++) {
        /* Exponents that are near each other, so that roundings and ties are frequent. */
        const auto some = [] {
            return (uint16_t)((random_bits() & 0x83ff) | (11 + random_bits() % 8) << 10);
        };
        const uint16_t x = some(), y = some(), z = some();
        const __half a = __ushort_as_half(x), b = __ushort_as_half(y), c = __ushort_as_half(z);
        const double da = half_value(x), db = half_value(y), dc = half_value(z);
        const uint16_t sum = nearest_half(da + db), difference = nearest_half(da - db);
        const uint16_t product = nearest_half(da * db), fused = nearest_half(da * db + dc);
        CHECK(__half_as_ushort(__hadd(a, b)) == sum);
        CHECK(__half_as_ushort(__hsub(a, b)) == difference);
        CHECK(__half_as_ushort(__hmul(a, b)) == product);
        CHECK(__half_as_ushort(__hfma(a, b, c)) == fused);
        const __half2 p = __halves2half2(a, b), q = __halves2half2(b, c);
        CHECK(__half_as_ushort(__low2half(__hadd2(p, q))) == sum);
        CHECK(__half_as_ushort(__low2half(__hsub2(p, q))) == difference);
        CHECK(__half_as_ushort(__low2half(__hmul2(p, q))) == product);
        CHECK(__half_as_ushort(__low2half(__hfma2(p, q, __half2half2(c)))) == fused);
        CHECK(__high2float(__hadd2(p, q)) == __half2float(__hadd(b, c)));
    }
    const __half2 pair = __floats2half2_rn(1.5f, -2.0f), same = __float2half2_rn(3.0f);
    CHECK(__half22float2(pair).x == 1.5f && __half22float2(pair).y == -2.0f);
    CHECK(__low2float(pair) == 1.5f && __half2float(__high2half(pair)) == -2.0f);
    CHECK(__low2float(same) == 3.0f && __high2float(same) == 3.0f);
}

// ---- asynchronous copies ------------------------------------------------------------------------

void copies_land_at_the_wait_and_not_earlier() {
#ifdef KVQ_RACE
    return; // which reports the reads that this test makes
#endif
    const auto kernel = +[](const uint32_t *in, uint32_t *out) {
        KVQ_SHARED_MEMORY(uint32_t, s);
        for (int group = 0; group < 3; group++) {
            kvq_cp_async16(s + 4 * group, in + 4 * group);
            kvq_cp_commit();
        }
        kvq_cp_async16(s + 12, in + 12); // belongs to no group yet
        kvq_cp_wait<1>();
        for (int i = 0; i < 16; i++) out[i] = s[i];
        kvq_cp_commit();
        kvq_cp_wait<0>();
        for (int i = 0; i < 16; i++) out[16 + i] = s[i];
    };
    auto in = buffer<uint32_t>(16), out = buffer<uint32_t>(32);
    for (uint32_t i = 0; i < 16; i++) in[i] = i;
    CHECK(launch(kernel, 1, 1, 64, in.data(), out.data()));
    for (uint32_t i = 0; i < 16; i++) {
        CHECK(out[i] == (i < 8 ? i : ~0u));
        CHECK(out[16 + i] == i);
    }
}

void copies_are_of_the_thread_that_began_them() {
    check::in_all_orders([] {
        const auto kernel = +[](const uint32_t *in, uint32_t *out) {
            KVQ_SHARED_MEMORY(uint32_t, s);
            const int t = (int)threadIdx.x;
            kvq_cp_async16(s + 4 * t, in + 4 * t);
            kvq_cp_commit();
            kvq_cp_wait<0>();
            __syncthreads();
            out[64 * blockIdx.x + t] = s[(4 * t + 30) % 256];
        };
        auto in = buffer<uint32_t>(256), out = buffer<uint32_t>(128);
        for (uint32_t i = 0; i < 256; i++) in[i] = i;
        CHECK(launch(kernel, 2, 64, 1024, in.data(), out.data()));
        for (uint32_t t = 0; t < 128; t++) CHECK(out[t] == (4 * t + 30) % 256);
    });
}

void copies_nobody_waits_for_are_reported_and_forgotten() {
    const auto kernel = +[](const uint32_t *in, bool wait) {
        KVQ_SHARED_MEMORY(uint32_t, s);
        if (wait) {
            kvq_cp_wait<0>(); // must not bring what an earlier block left
            return;
        }
        kvq_cp_async16(s, in);
        kvq_cp_commit();
    };
    auto in = buffer<uint32_t>(4);
    CHECK(!launch(kernel, 1, 1, 16, in.data(), false));
    CHECK(check::reported("exited with 1 asynchronous copies that it did not wait for"));
    CHECK(launch(kernel, 1, 1, 16, in.data(), true));
}

void misaligned_copies_are_reported() {
    const auto kernel = +[](const uint32_t *in) {
        KVQ_SHARED_MEMORY(uint32_t, s);
        kvq_cp_async16(s, in + 1);
        kvq_cp_commit();
        kvq_cp_wait<0>();
    };
    alignas(16) const uint32_t in[8] = {};
    CHECK(!launch(kernel, 1, 1, 16, in));
    CHECK(check::reported("is not a multiple of 16"));
}

// ---- tensor cores -------------------------------------------------------------------------------

/* The layouts of port.cuh, written out once more: fragments are filled from matrices here, and come
 * from matrices in tensor_core.cpp the other way round. */
void half_products_match_plain_loops() {
    struct Matrices {
        uint16_t a[16][16], b[16][8];
        float d[16][8];
    };
    const auto kernel = +[](Matrices *m) {
        const int g = (int)threadIdx.x / 4, t = (int)threadIdx.x % 4;
        uint32_t a[4], b[2];
        float d[4];
        for (int i = 0; i < 4; i++) memcpy(&a[i], &m->a[g + 8 * (i % 2)][2 * t + 8 * (i / 2)], 4);
        for (int i = 0; i < 2; i++)
            b[i] = m->b[2 * t + 8 * i][g] | (uint32_t)m->b[2 * t + 8 * i + 1][g] << 16;
        for (int i = 0; i < 4; i++) d[i] = m->d[g + 8 * (i / 2)][2 * t + i % 2];
        kvq_mma_f16(d, a, b);
        for (int i = 0; i < 4; i++) m->d[g + 8 * (i / 2)][2 * t + i % 2] = d[i];
    };
    for (int round = 0; round < 20; round++) {
        Matrices m;
        const auto some = [] { return (float)(int)random_bits() / 2147483648.0f; };
        for (auto &row : m.a)
            for (uint16_t &x : row) x = kvq_f32_to_f16(some());
        for (auto &row : m.b)
            for (uint16_t &x : row) x = kvq_f32_to_f16(some());
        for (auto &row : m.d)
            for (float &x : row) x = some();
        const Matrices before = m;
        CHECK(launch(kernel, 1, 32, 0, &m));
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                double sum = before.d[i][j];
                for (int k = 0; k < 16; k++)
                    sum += half_value(before.a[i][k]) * half_value(before.b[k][j]);
                CHECK(fabs(m.d[i][j] - sum) < 1e-6);
            }
    }
}

void products_can_be_those_of_other_tensor_cores() {
    /* 1 and sixteen products of two numbers, or of only every fourth; all in d[0]. */
    const auto kernel = +[](float *out, float x, float y, bool all) {
        const uint32_t half = kvq_f32_to_f16(x), other = kvq_f32_to_f16(y);
        const uint32_t pair = all ? half << 16 | half : threadIdx.x % 2 ? 0 : half;
        const uint32_t a[4] = {pair, pair, pair, pair};
        const uint32_t b[2] = {other << 16 | other, other << 16 | other};
        float d[4] = {1, 1, 1, 1};
        kvq_mma_f16(d, a, b);
        if (threadIdx.x == 0) *out = d[0];
    };
    const auto expect = [&](float x, float y, bool all, float exact, float truncated) {
        auto out = buffer<float>(1);
        cusim::options.mma = cusim::Mma::exact;
        CHECK(launch(kernel, 1, 32, 0, out.data(), x, y, all) && out[0] == exact);
        cusim::options.mma = cusim::Mma::truncating;
        CHECK(launch(kernel, 1, 32, 0, out.data(), x, y, all) && out[0] == truncated);
    };
    expect(0x1p-12f, 0x1p-11f, true, 1 + 0x1p-19f, 1 + 0x1p-19f);
    expect(0x1p-12f, 0x1p-12f, true, 1 + 0x1p-20f, 1 + 0x1p-20f); // one bit more is kept
    expect(0x1p-12f, 0x1p-13f, true, 1 + 0x1p-21f, 1);            // and no two
    expect(0x1p-12f, 0x1p-12f, false, 1 + 0x1p-22f, 1);           // but not in the result
    expect(0x1p-12f, -0x1p-13f, true, 1 - 0x1p-21f, 1);           // towards zero
    expect(INFINITY, -1, true, -INFINITY, -INFINITY);
    auto out = buffer<float>(1);
    for (const bool flushes : {false, true}) {
        cusim::options.mma = flushes ? cusim::Mma::flushing : cusim::Mma::exact;
        CHECK(launch(kernel, 1, 32, 0, out.data(), 0x1p-24f, 0x1p15f, true));
        CHECK(out[0] == (flushes ? 1 : 1 + 0x1p-5f));
        CHECK(launch(kernel, 1, 32, 0, out.data(), 0x1p-14f, 0x1p15f, true) && out[0] == 33);
    }
}

template <class A, class B, void multiply(int32_t *, const uint32_t *, const uint32_t *)>
void byte_products_match_plain_loops() {
    struct Matrices {
        A a[16][32];
        B b[32][8];
        int32_t d[16][8];
    };
    const auto kernel = +[](Matrices *m) {
        const int g = (int)threadIdx.x / 4, t = (int)threadIdx.x % 4;
        uint32_t a[4], b[2] = {};
        int32_t d[4];
        for (int i = 0; i < 4; i++) memcpy(&a[i], &m->a[g + 8 * (i % 2)][4 * t + 16 * (i / 2)], 4);
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 4; j++)
                b[i] |= (uint32_t)(uint8_t)m->b[4 * t + 16 * i + j][g] << 8 * j;
        for (int i = 0; i < 4; i++) d[i] = m->d[g + 8 * (i / 2)][2 * t + i % 2];
        multiply(d, a, b);
        for (int i = 0; i < 4; i++) m->d[g + 8 * (i / 2)][2 * t + i % 2] = d[i];
    };
    for (int round = 0; round < 20; round++) {
        Matrices m;
        for (auto &row : m.a)
            for (A &x : row) x = (A)random_bits();
        for (auto &row : m.b)
            for (B &x : row) x = (B)random_bits();
        for (auto &row : m.d)
            for (int32_t &x : row) x = (int32_t)random_bits(); // sums wrap around
        const Matrices before = m;
        CHECK(launch(kernel, 1, 32, 0, &m));
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                uint32_t sum = (uint32_t)before.d[i][j];
                for (int k = 0; k < 32; k++) sum += (uint32_t)(before.a[i][k] * before.b[k][j]);
                CHECK(m.d[i][j] == (int32_t)sum);
            }
    }
}

void products_need_the_whole_warp() {
    const auto kernel = +[](float *out) {
        const uint32_t a[4] = {}, b[2] = {};
        float d[4] = {};
        if (threadIdx.x < 16) kvq_mma_f16(d, a, b);
        out[threadIdx.x] = d[0];
    };
    auto out = buffer<float>(32);
    CHECK(!launch(kernel, 1, 32, 0, out.data()));
    CHECK(check::reported("mma.m16n8k16"));
}

const check::Test tests[] = {
    {"every thread of every block runs once", every_thread_of_every_block_runs_once},
    {"orders are what they say", orders_are_what_they_say},
    {"kernels without barriers never switch", kernels_without_barriers_never_switch},
    {"barriers separate what comes before and after",
     barriers_separate_what_comes_before_and_after},
    {"barriers count and vote", barriers_count_and_vote},
    {"divergent barriers are reported", divergent_barriers_are_reported},
    {"deadlocks name the threads and what they wait for",
     deadlocks_name_the_threads_and_what_they_wait_for},
    {"impossible launches are refused", impossible_launches_are_refused},
    {"launch bounds hold", launch_bounds_hold},
    {"exported kernels launch by name", exported_kernels_launch_by_name},
    {"shared memory begins each block as 0xff", shared_memory_begins_each_block_as_ff},
    {"dynamic shared memory is aligned", dynamic_shared_memory_is_aligned},
    {"shuffles follow their definition", shuffles_follow_their_definition},
    {"shuffles carry 2, 4 and 8 bytes", shuffles_carry_2_4_and_8_bytes},
    {"a shuffle from a lane outside the mask gives 0xff",
     a_shuffle_from_a_lane_outside_the_mask_gives_ff},
    {"parts of a warp meet apart", parts_of_a_warp_meet_apart},
    {"collectives at two places are reported", collectives_at_two_places_are_reported},
    {"votes follow their definition", votes_follow_their_definition},
    {"masks that name absent lanes are reported", masks_that_name_absent_lanes_are_reported},
    {"atomics update and return what was there", atomics_update_and_return_what_was_there},
    {"integer intrinsics follow their definition", integer_intrinsics_follow_their_definition},
    {"float conversions saturate and round", float_conversions_saturate_and_round},
    {"float functions are within an ulp", float_functions_are_within_an_ulp},
    {"halves convert as IEEE 754 and bytes.h say", halves_convert_as_ieee_754_and_bytes_h_say},
    {"halves compute with one rounding", halves_compute_with_one_rounding},
    {"copies land at the wait and not earlier", copies_land_at_the_wait_and_not_earlier},
    {"copies are of the thread that began them", copies_are_of_the_thread_that_began_them},
    {"copies nobody waits for are reported and forgotten",
     copies_nobody_waits_for_are_reported_and_forgotten},
    {"misaligned copies are reported", misaligned_copies_are_reported},
    {"half products match plain loops", half_products_match_plain_loops},
    {"products can be those of other tensor cores", products_can_be_those_of_other_tensor_cores},
    {"products of signed bytes match plain loops",
     byte_products_match_plain_loops<int8_t, int8_t, kvq_mma_s8_s8>},
    {"products of signed and unsigned bytes match plain loops",
     byte_products_match_plain_loops<int8_t, uint8_t, kvq_mma_s8_u8>},
    {"products of unsigned and signed bytes match plain loops",
     byte_products_match_plain_loops<uint8_t, int8_t, kvq_mma_u8_s8>},
    {"products need the whole warp", products_need_the_whole_warp},
};

} // namespace

int main() { return check::run(tests); }
