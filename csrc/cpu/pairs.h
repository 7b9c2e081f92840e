// Pairs of neighbouring bfloat16 numbers in each 32-bit lane, the first in the low half, and their products
// (AVX512_BF16): two multiply-adds per lane and instruction.
//
//     sums[lane] += left[lane].first * right[lane].first + left[lane].second * right[lane].second
//
// NEARPEAK_EMULATE_PAIRS puts float32 arithmetic in their place, by which the kernels are tested on other processors.
#pragma once

#include <type_traits>

#include "two.h"

#if defined(NEARPEAK_EMULATE_PAIRS) || defined(__AVX512BF16__)
#define NEARPEAK_HAS_PAIRS
#endif
#if defined(NEARPEAK_EMULATE_TILES) || defined(__AMX_BF16__)
#define NEARPEAK_HAS_TILES
#endif

namespace nearpeak::NEARPEAK_ISA {

// Whether products of this storage type are taken in pairs. Not where there are matrix units: processors that have them
// multiply pairs more slowly than the same numbers widened (Intel: 180 Gflop/s of attention against 280).
#if defined(NEARPEAK_HAS_PAIRS) && !defined(NEARPEAK_HAS_TILES)
template <class T>
constexpr bool kInPairs = std::is_same_v<T, bfloat16>;
#else
template <class T>
constexpr bool kInPairs = false;
#endif

inline Float pair(Short first, Short second) { return bitcast<Float>(widen(first) | (widen(second) << 16)); }

// Up to 2 kLanes elements of a row of `width`, from `column` on, in pairs as they lie; zeros past its end, and without
// a row.
inline Float load_some_pairs(const bfloat16* row, int64_t column, int64_t width) {
    if (row && column + 2 * kLanes <= width) return load(reinterpret_cast<const float*>(row + column));
    Float pairs = {};
    if (row && column < width) std::memcpy(&pairs, row + column, (width - column) * sizeof(bfloat16));
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

// Both rounded to bfloat16.
inline Float pair(Float first, Float second) { return rounded_pairs(first, second); }
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
inline Float pair(Float first, Float second) { return paired_bits({first, second}); }
inline Short rounded_bits(Float value) { return narrow_bfloat16(value); }

#endif

// The pairs (first, second) of the even elements that both hold as they lie, and of the odd ones.
inline Two pairs_across(Float first, Float second) {
    const auto a = bitcast<Unsigned>(first), b = bitcast<Unsigned>(second);
#if NEARPEAK_LANES == 16 && defined(__AVX512BW__)
    constexpr __mmask32 kOdd = 0xaaaaaaaa;
    const auto blend = [](Unsigned low, Unsigned high) {
        return reinterpret_cast<Float>(
            _mm512_mask_blend_epi16(kOdd, reinterpret_cast<__m512i>(low), reinterpret_cast<__m512i>(high)));
    };
    return {blend(a, b << 16), blend(a >> 16, b)};
#else
    return {bitcast<Float>((a & 0xffffu) | (b << 16)), bitcast<Float>((a >> 16) | (b & 0xffff0000u))};
#endif
}

// 2 kLanes neighbouring elements as they lie, for sums in which it does not matter which lane holds what.
struct PairsInLanes {
    Float bits;
};

inline void multiply_add(Float& sum, PairsInLanes a, PairsInLanes b) { sum = multiply_add_pairs(a.bits, b.bits, sum); }
inline void keep_in_register(PairsInLanes& pairs) { keep_in_register(pairs.bits); }

// How many of those elements are meant: all, known to the compiler, or the first `count`. Behind the first few, a load
// gives zeros; it touches no memory there.
struct AllPairs {};
struct SomePairs {
    int64_t count;
};

inline PairsInLanes load(const bfloat16* from, AllPairs) { return {load(reinterpret_cast<const float*>(from))}; }
inline PairsInLanes load(const bfloat16* from, SomePairs some) { return {load_some_pairs(from, 0, some.count)}; }

// What a kernel keeps of them is whole.
inline AllPairs kept(AllPairs lanes) { return lanes; }
inline AllPairs kept(SomePairs) { return {}; }
inline void store(bfloat16* to, PairsInLanes pairs, AllPairs) { store(reinterpret_cast<float*>(to), pairs.bits); }

// Even elements low, odd ones high.
template <class T>
inline void store(T* to, Two value, AllPairs) {
    store(to, value, TwoVectors<bfloat16>{});
}
template <class T>
inline void store(T* to, Two value, SomePairs some) {
    T buffer[2 * kLanes];
    store(buffer, value, TwoVectors<bfloat16>{});
    std::memcpy(to, buffer, some.count * sizeof(T));
}

// Like for_each_two where the products of T are not taken in pairs; else in steps of pairs.
template <class T, int kUnroll = 1, class Body>
[[gnu::always_inline]] inline void for_each_step(int64_t width, Body body) {
    if constexpr (kInPairs<T>) {
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
    } else {
        for_each_two<T, kUnroll>(width, body);
    }
}

}  // namespace nearpeak::NEARPEAK_ISA
