// The tightest loops there are: multiply-adds in registers, reads, and copies.

#include "kernels.h"

#include "../../cpu/bytes.h"
#include "../../cpu/past_cache.h"
#include "../../cpu/register_tiles.h"
#include "../../cpu/tiles.h"

namespace nearpeak::peaks::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

namespace {

template <class Step>
double multiply_add_vectors(int64_t rounds) {
    constexpr int kChains = 12;  // enough to hide a latency of 6 cycles at 2 a cycle, few enough for 16 registers
    volatile float unknown = 1.0f;
    volatile float sink;
    const Float a = broadcast(unknown), b = broadcast(unknown * 1e-9f);
    Float sums[kChains];
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = b * static_cast<float>(chain);  // none equals another
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int chain = 0; chain < kChains; ++chain) sums[chain] = Step::multiply_add(a, b, sums[chain]);
    }
    sink = sum(add_up(sums));
    (void)sink;
    return 2.0 * Step::kElements * kLanes * kChains * static_cast<double>(rounds);
}

#ifdef NEARPEAK_HAS_TILES
double multiply_add_tiles(int64_t rounds) {
    const bfloat16 zeros[kTileElements] = {};
    [[maybe_unused]] const TileUnit unit;
    finish_stores();
    load_left<0>(zeros, kTileRowBytes);
    load_left<1>(zeros, kTileRowBytes);
    load_right<0>(zeros, kTileRowBytes);
    load_right<1>(zeros, kTileRowBytes);
    zero_all_sums();
    for (int64_t round = 0; round < rounds; ++round) multiply_all_tiles();
    return 4.0 * 2 * kTileRows * kTileRows * kTileDepth * static_cast<double>(rounds);
}
#endif

double multiply_add(Dtype dtype, int64_t rounds) {
#if defined(NEARPEAK_HAS_TILES)
    constexpr int64_t kRoundsPerTileRound = 64;  // a round of tiles takes about that much longer
    if (dtype == Dtype::bfloat16) return multiply_add_tiles(rounds / kRoundsPerTileRound);
#elif defined(NEARPEAK_HAS_PAIRS)
    if (dtype == Dtype::bfloat16) return multiply_add_vectors<Pairs>(rounds);
#endif
    return multiply_add_vectors<Singles>(rounds);
}

// Of the unit that is the fastest: VNNI, else products of bytes in pairs.
double multiply_add_bytes(int64_t rounds) {
    constexpr int kChains = 12;
    volatile int unknown = 1;
    volatile int sink;
#ifdef __AVX512VNNI__
    using Sums = Int;
    const Int a = broadcast(int32_t{unknown}), b = broadcast(int32_t{unknown});
    const auto multiply_add = [&](Sums sums) { return ByteStep::multiply_add(a, b, sums); };
#else
    using Sums = EightInts;
    UnsignedBytes a = UnsignedBytes{} + static_cast<uint8_t>(unknown);
    const SignedBytes b = SignedBytes{} + static_cast<int8_t>(unknown);
    const auto multiply_add = [&](Sums sums) {
        asm volatile("" : "+m"(a));  // else their product would be taken once
        return dot<8>(a, b, sums);
    };
#endif
    Sums sums[kChains];
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = Sums{} + chain;
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int chain = 0; chain < kChains; ++chain) sums[chain] = multiply_add(sums[chain]);
    }
    for (int chain = 1; chain < kChains; ++chain) sums[0] += sums[chain];
    sink = sums[0][0];
    (void)sink;
    return 2.0 * sizeof(Sums) * kChains * static_cast<double>(rounds);
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

const Kernels kernels = {multiply_add, multiply_add_bytes, read, copy};

}  // namespace nearpeak::peaks::NEARPEAK_ISA
