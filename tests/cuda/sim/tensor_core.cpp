/* tensor_core.cpp: mma.sync in plain loops: the fragments of 32 lanes become matrices and back.
 * Their layout stands in port.cuh. */
#include "bytes.h"
#include "cusim.h"

#include <math.h>

namespace cusim {
namespace {

constexpr int n_lanes = 32;

template <class Sum> struct Fragments {
    Sum *d;
    const uint32_t *a, *b;
};

/* D(16 x 8) += A(16 x depth) B(depth x 8), elements of 32 / `per_word` bits. `of_a` and `of_b` take
 * one out of a word; products are made in `Wide`, and `add` adds them up. */
template <class Sum, class Wide, int depth, int per_word, class OfA, class OfB, class Add>
void multiply(Slots slots, OfA of_a, OfB of_b, Add add) {
    Wide a[16][depth], b[depth][8];
    for (int lane = 0; lane < n_lanes; lane++) {
        const auto &from = *static_cast<const Fragments<Sum> *>(slots[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int j = 0; j < per_word; j++) {
            for (int i = 0; i < 4; i++)
                a[g + 8 * (i % 2)][per_word * t + depth / 2 * (i / 2) + j] = of_a(from.a[i], j);
            for (int i = 0; i < 2; i++) b[per_word * t + depth / 2 * i + j][g] = of_b(from.b[i], j);
        }
    }
    for (int lane = 0; lane < n_lanes; lane++) {
        const auto &to = *static_cast<const Fragments<Sum> *>(slots[lane]);
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            Wide products[depth];
            for (int k = 0; k < depth; k++) products[k] = a[row][k] * b[k][column];
            to.d[i] = add(to.d[i], products);
        }
    }
}

constexpr int halves = 16; // products in a sum of mma_f16

float add_once(float start, const double (&products)[halves]) {
    double sum = start;
    for (const double product : products) sum += product;
    return (float)sum;
}

/* Towards zero. */
float truncate(double x) {
    const float nearest = (float)x;
    return fabs((double)nearest) > fabs(x) ? nextafterf(nearest, 0) : nearest;
}

/* As M. Fasi et al. found a T4 to add (Numerical behavior of NVIDIA tensor cores, PeerJ Computer
 * Science 7:e330, 2021): four products and the sum so far at a time, their bits cut off at one
 * beyond the 24 of the largest, and those of the result at 24. Later GPUs add more products at a
 * time. */
float add_truncating(float start, const double (&products)[halves]) {
    constexpr int at_a_time = 4, bits = 24 + 1;
    float sum = start;
    for (int first = 0; first < halves; first += at_a_time) {
        double plain = sum, largest = fabs((double)sum), total = 0;
        for (int k = 0; k < at_a_time; k++) {
            plain += products[first + k];
            largest = fmax(largest, fabs(products[first + k]));
        }
        if (largest == 0 || !isfinite(plain)) {
            sum = (float)plain;
            continue;
        }
        const double unit = ldexp(1, ilogb(largest) + 1 - bits);
        for (int k = 0; k < at_a_time; k++) total += trunc(products[first + k] / unit);
        sum = truncate((total + trunc(sum / unit)) * unit);
    }
    return sum;
}

void multiply_f16(Slots slots, unsigned lanes) {
    if (lanes != ~0u) return; // reported by mma_f16, or lanes have exited
    const auto element = [](uint32_t word, int j) {
        const uint16_t half = (uint16_t)(word >> 16 * j);
        if (options.mma == Mma::flushing && (half & 0x7c00) == 0) return 0.0;
        return (double)kvq_f16_to_f32(half);
    };
    const auto add = options.mma == Mma::truncating ? add_truncating : add_once;
    multiply<float, double, halves, 2>(slots, element, element, add);
}

template <class Byte> int64_t byte_of(uint32_t word, int j) { return (Byte)(word >> 8 * j); }

int32_t add_wrapping(int32_t sum, const int64_t (&products)[32]) {
    int64_t wide = sum;
    for (const int64_t product : products) wide += product;
    return (int32_t)wide;
}

template <class A, class B> void multiply_bytes(Slots slots, unsigned lanes) {
    if (lanes != ~0u) return;
    multiply<int32_t, int64_t, 32, 4>(slots, byte_of<A>, byte_of<B>, add_wrapping);
}

template <class A, class B>
void mma_bytes(int32_t d[4], const uint32_t a[4], const uint32_t b[2], Place at) {
    Fragments<int32_t> mine = {d, a, b};
    meet("mma.m16n8k32", ~0u, at, multiply_bytes<A, B>, &mine);
}

} // namespace

void mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2], Place at) {
    Fragments<float> mine = {d, a, b};
    meet("mma.m16n8k16", ~0u, at, multiply_f16, &mine);
}

void mma_s8_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2], Place at) {
    mma_bytes<int8_t, int8_t>(d, a, b, at);
}

void mma_s8_u8(int32_t d[4], const uint32_t a[4], const uint32_t b[2], Place at) {
    mma_bytes<int8_t, uint8_t>(d, a, b, at);
}

void mma_u8_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2], Place at) {
    mma_bytes<uint8_t, int8_t>(d, a, b, at);
}

} // namespace cusim
