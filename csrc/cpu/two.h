// Work that is the same in every lane, on two vectors at a time.
#pragma once

#include "vector.h"

namespace nearpeak::NEARPEAK_ISA {

// Two vectors of 2 kLanes neighbouring elements, for work that is the same in every lane. Which lane holds which
// element is the storage type's choice: bfloat16 puts the even ones low and the odd ones high, so that a shift and a
// mask widen both, and no lane moves.
struct Two {
    Float low, high;
};

inline void keep_in_register(Two& value) {
    keep_in_register(value.low);
    keep_in_register(value.high);
}

inline Two operator+(Two a, Two b) { return {a.low + b.low, a.high + b.high}; }
inline Two operator-(Two a, Two b) { return {a.low - b.low, a.high - b.high}; }
inline Two operator*(Two a, Two b) { return {a.low * b.low, a.high * b.high}; }
inline Two operator*(Two a, float b) { return {a.low * b, a.high * b}; }
inline Two operator*(float a, Two b) { return b * a; }
inline Two operator+(float a, Two b) { return {a + b.low, a + b.high}; }
inline Two operator-(Two a, float b) { return {a.low - b, a.high - b}; }

inline Float total_of(Float value) { return value; }
inline Float total_of(Two value) { return value.low + value.high; }

template <class T>
inline Two rounded_to(Two value) {
    return {rounded_to<T>(value.low), rounded_to<T>(value.high)};
}

// Two vectors in T's order, whatever type they are loaded from or stored as.
template <class T>
struct TwoVectors {};

// Which elements the lanes of two vectors hold.
struct TwoLanes {
    Int low, high;
};
template <class T>
inline TwoLanes lanes_of(TwoVectors<T>) {
    return {lane_numbers(), lane_numbers() + kLanes};
}

template <class T>
inline Two only(Two value, TwoVectors<T>) {
    return value;
}

template <class U, class T>
inline Two load(const U* from, TwoVectors<T>) {
    return {load(from), load(from + kLanes)};
}
template <class U, class T>
inline void store(U* to, Two value, TwoVectors<T>) {
    store(to, value.low);
    store(to + kLanes, value.high);
}
inline TwoLanes lanes_of(TwoVectors<bfloat16>) { return {2 * lane_numbers(), 2 * lane_numbers() + 1}; }
inline Two load(const bfloat16* from, TwoVectors<bfloat16>) {
    Unsigned bits;
    std::memcpy(&bits, from, sizeof(bits));
    return {bitcast<Float>(bits << 16), bitcast<Float>(bits & 0xffff0000u)};
}
inline Float paired_bits(Two value) {
#if NEARPEAK_LANES == 16 && defined(__AVX512BF16__)
    if (rounds_in_hardware(value.low) && rounds_in_hardware(value.high)) return rounded_pairs(value.low, value.high);
#endif
    const Unsigned low = round_bfloat16(value.low) >> 16, high = round_bfloat16(value.high);
#if NEARPEAK_LANES == 8 && defined(__AVX2__)
    const __m256i blended = _mm256_blend_epi16(reinterpret_cast<__m256i>(low), reinterpret_cast<__m256i>(high), 0xaa);
    return reinterpret_cast<Float>(blended);
#else
    return bitcast<Float>((high & 0xffff0000u) | low);
#endif
}
inline void store(bfloat16* to, Two value, TwoVectors<bfloat16>) {
    const Float bits = paired_bits(value);
    std::memcpy(to, &bits, sizeof(bits));
}

template <std::size_t... lane>
inline Two even_and_odd(Float first, Float second, std::index_sequence<lane...>) {
    return {__builtin_shufflevector(first, second, (2 * lane)...),
            __builtin_shufflevector(first, second, (2 * lane + 1)...)};
}
template <std::size_t... lane>
inline Two interleaved(Two value, std::index_sequence<lane...>) {
    return {__builtin_shufflevector(value.low, value.high, (lane / 2 + lane % 2 * kLanes)...),
            __builtin_shufflevector(value.low, value.high, (kLanes / 2 + lane / 2 + lane % 2 * kLanes)...)};
}
inline Two load(const float* from, TwoVectors<bfloat16>) {
    return even_and_odd(load(from), load(from + kLanes), std::make_index_sequence<kLanes>());
}
inline void store(float* to, Two value, TwoVectors<bfloat16>) {
    const Two in_order = interleaved(value, std::make_index_sequence<kLanes>());
    store(to, in_order.low);
    store(to + kLanes, in_order.high);
}

// How a kernel keeps in float32 what it will use again and again: as the lanes of T's vectors lie, so that no lane
// moves on the way to them, and in whole vectors.
template <class T>
inline TwoVectors<float> kept(TwoVectors<T>) {
    return {};
}
template <class Lanes>
inline AllLanes kept(Lanes) {
    return {};
}

// Fetches into the first-level cache what a load of these lanes will read. Nothing is read yet, so it may not exist.
template <class T, class Lanes>
inline void fetch(const T* from, Lanes) {
    constexpr int64_t kLine = 64, kBytes = 2 * kLanes * sizeof(T);
    for (int64_t byte = 0; byte < kBytes; byte += kLine) {
        __builtin_prefetch(reinterpret_cast<const char*>(from) + byte);
    }
}

// Like for_each_vector, in steps of two vectors in T's order, then of one, then the rest.
template <class T, int kUnroll = 1, class Body>
[[gnu::always_inline]] inline void for_each_two(int64_t width, Body body) {
    constexpr int64_t kStep = 2 * kLanes;
    int64_t column = 0;
    for (; column + kUnroll * kStep <= width; column += kUnroll * kStep) {
#pragma GCC unroll 16
        for (int slot = 0; slot < kUnroll; ++slot) body(column + slot * kStep, TwoVectors<T>{}, slot);
    }
    if constexpr (kUnroll > 1) {
        for (; column + kStep <= width; column += kStep) body(column, TwoVectors<T>{}, 0);
    }
    for (; column + kLanes <= width; column += kLanes) body(column, AllLanes{}, 0);
    if (column < width) body(column, width - column, 0);
}

}  // namespace nearpeak::NEARPEAK_ISA
