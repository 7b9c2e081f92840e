// The tightest loops there are: multiply-adds in registers, reads, and copies.

#include "kernels.h"

#include "../../cpu/vector.h"

namespace nearpeak::peaks::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

namespace {

double multiply_add(Dtype, int64_t rounds) {
    constexpr int kChains = 12;  // enough to hide a latency of 4 cycles at 2 a cycle, few enough for 16 registers
    volatile float unknown = 1.0f;
    volatile float sink;
    const Float a = broadcast(unknown), b = broadcast(unknown * 1e-9f);
    Float sums[kChains];
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = b * static_cast<float>(chain);  // none equals another
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int chain = 0; chain < kChains; ++chain) sums[chain] = sums[chain] * a + b;
    }
    sink = sum(add_up(sums));
    (void)sink;
    return 2.0 * kLanes * kChains * static_cast<double>(rounds);
}

float read(const float* from, int64_t count) {
    constexpr int kChains = 8;
    Float sums[kChains] = {};
    for_each_vector<kChains>(count, [&](int64_t i, auto lanes, int slot) { sums[slot] += load(from + i, lanes); });
    return sum(add_up(sums));
}

void copy(const float* from, float* to, int64_t count) {
    for_each_vector<4>(count,
                       [&](int64_t i, auto lanes, int) { store_past_cache(to + i, load(from + i, lanes), lanes); });
    fence_stores_past_cache();
}

}  // namespace

const Kernels kernels = {multiply_add, read, copy};

}  // namespace nearpeak::peaks::NEARPEAK_ISA
