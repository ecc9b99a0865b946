/* tensor_core.cpp: mma.sync in plain loops: the fragments of 32 lanes become matrices and back.
 * Their layout stands in port.cuh. */
#include "bytes.h"
#include "cusim.h"

namespace cusim {
namespace {

constexpr int n_lanes = 32;

template <class Sum> struct Fragments {
    Sum *d;
    const uint32_t *a, *b;
};

/* D(16 x 8) += A(16 x depth) B(depth x 8), elements of 32 / `per_word` bits. `element` takes one
 * out of a word; a product and its sum are made in `Wide`, which rounds once at the end. */
template <class Sum, class Wide, int depth, int per_word, class Element>
void multiply(Slots slots, Element element) {
    Wide a[16][depth], b[depth][8];
    for (int lane = 0; lane < n_lanes; lane++) {
        const auto &from = *static_cast<const Fragments<Sum> *>(slots[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int j = 0; j < per_word; j++) {
            for (int i = 0; i < 4; i++)
                a[g + 8 * (i % 2)][per_word * t + depth / 2 * (i / 2) + j] = element(from.a[i], j);
            for (int i = 0; i < 2; i++)
                b[per_word * t + depth / 2 * i + j][g] = element(from.b[i], j);
        }
    }
    for (int lane = 0; lane < n_lanes; lane++) {
        const auto &to = *static_cast<const Fragments<Sum> *>(slots[lane]);
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            Wide sum = to.d[i];
            for (int k = 0; k < depth; k++) sum += a[row][k] * b[k][column];
            to.d[i] = (Sum)sum;
        }
    }
}

void multiply_f16(Slots slots, unsigned lanes) {
    if (lanes != ~0u) return; // reported by mma_f16, or lanes have exited
    multiply<float, double, 16, 2>(slots, [](uint32_t word, int j) {
        return (double)kvq_f16_to_f32((uint16_t)(word >> 16 * j));
    });
}

void multiply_s8(Slots slots, unsigned lanes) {
    if (lanes != ~0u) return;
    multiply<int32_t, int64_t, 32, 4>(
        slots, [](uint32_t word, int j) { return (int64_t)(int8_t)(word >> 8 * j); });
}

} // namespace

void mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2], Place at) {
    Fragments<float> mine = {d, a, b};
    meet("mma.m16n8k16", ~0u, at, multiply_f16, &mine);
}

void mma_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2], Place at) {
    Fragments<int32_t> mine = {d, a, b};
    meet("mma.m16n8k32", ~0u, at, multiply_s8, &mine);
}

} // namespace cusim
