// Pairs of neighbouring bfloat16 numbers in each 32-bit lane, the first in the low half, and their products
// (AVX512_BF16): two multiply-adds per lane and instruction.
//
//     sums[lane] += left[lane].first * right[lane].first + left[lane].second * right[lane].second
//
// NEARPEAK_EMULATE_PAIRS puts float32 arithmetic in their place, by which the kernels are tested on other processors.
#pragma once

#include <algorithm>

#include "vector.h"

#if defined(NEARPEAK_EMULATE_PAIRS) || defined(__AVX512BF16__)
#define NEARPEAK_HAS_PAIRS
#endif

namespace nearpeak::NEARPEAK_ISA {

inline Float pair(Short first, Short second) { return bitcast<Float>(widen(first) | (widen(second) << 16)); }

// Up to 2 kLanes elements of a row of `width`, from `column` on, in pairs as they lie; zeros past its end, and without
// a row.
inline Float load_some_pairs(const bfloat16* row, int64_t column, int64_t width) {
    Float pairs = {};
    if (row && column + 2 * kLanes <= width) {
        std::memcpy(&pairs, row + column, sizeof(pairs));
    } else if (row && column < width) {
        std::memcpy(&pairs, row + column, (width - column) * sizeof(bfloat16));
    }
    return pairs;
}

// Likewise up to kLanes elements.
inline Short load_some_bits(const bfloat16* row, int64_t column, int64_t width) {
    if (row && column + kLanes <= width) return load_bits(row + column);
    Short bits = {};
    if (row && column < width) std::memcpy(&bits, row + column, (width - column) * sizeof(bfloat16));
    return bits;
}

#if NEARPEAK_LANES == 16 && defined(__AVX512BF16__)

inline Float multiply_add_pairs(Float left, Float right, Float sums) {
    return reinterpret_cast<Float>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(left),
                                                    reinterpret_cast<__m512bh>(right)));
}

using Halves = uint16_t __attribute__((vector_size(4 * kLanes)));

template <std::size_t... half>
constexpr Halves interleaved_halves(std::index_sequence<half...>) {
    return Halves{(half / 2 + half % 2 * kLanes)...};
}

// Both rounded to bfloat16.
inline Float pair(Float first, Float second) {
    const auto halves = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
    constexpr auto kOrder = interleaved_halves(std::make_index_sequence<2 * kLanes>());
    return reinterpret_cast<Float>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(kOrder), halves));
}
inline Short rounded_bits(Float value) {
    return reinterpret_cast<Short>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(value)));
}

#else

inline Float multiply_add_pairs(Float left, Float right, Float sums) {
    const auto first = [](Float pairs) { return bitcast<Float>(bitcast<Unsigned>(pairs) << 16); };
    const auto second = [](Float pairs) { return bitcast<Float>(bitcast<Unsigned>(pairs) & 0xffff0000u); };
    return sums + second(left) * second(right) + first(left) * first(right);
}

// Both rounded to bfloat16.
inline Float pair(Float first, Float second) {
    return bitcast<Float>((round_bfloat16(first) >> 16) | (round_bfloat16(second) & 0xffff0000u));
}
inline Short rounded_bits(Float value) { return narrow_bfloat16(value); }

#endif

// 2 kLanes neighbouring elements as they lie, for sums in which it does not matter which lane holds what.
struct PairsInLanes {
    Float bits;
};

// How many elements of them are meant: all, known to the compiler, or the first `count`.
struct AllPairs {};
struct SomePairs {
    int64_t count;
};

inline PairsInLanes load(const bfloat16* from, AllPairs) { return {load(reinterpret_cast<const float*>(from))}; }
inline PairsInLanes load(const bfloat16* from, SomePairs some) { return {load_some_pairs(from, 0, some.count)}; }

// Whole, with zeros after those that are meant.
inline void store(bfloat16* to, PairsInLanes pairs, AllPairs) { store(reinterpret_cast<float*>(to), pairs.bits); }
inline AllPairs kept(AllPairs lanes) { return lanes; }
inline AllPairs kept(SomePairs) { return {}; }

// Like for_each_two.
template <int kUnroll = 1, class Body>
[[gnu::always_inline]] inline void for_each_pairs(int64_t width, Body body) {
    constexpr int64_t kStep = 2 * kLanes;
    int64_t column = 0;
    for (; column + kUnroll * kStep <= width; column += kUnroll * kStep) {
#pragma GCC unroll 16
        for (int slot = 0; slot < kUnroll; ++slot) body(column + slot * kStep, AllPairs{}, slot);
    }
    if constexpr (kUnroll > 1) {
        for (; column + kStep <= width; column += kStep) body(column, AllPairs{}, 0);
    }
    if (column < width) body(column, SomePairs{width - column}, 0);
}

}  // namespace nearpeak::NEARPEAK_ISA
