// What rows of every quantised weight give to the products: units of kUnitBlocks blocks of kCodeBlock steps, eight
// where a format's own blocks are as long, else four, which more widths are a multiple of.
//
//     enter(unit, group)              goes to a unit, whose first group that is; what follows is of its blocks
//     codes(i)                        a block's codes, an unsigned byte each; kMiddle stands for zero
//     coefficients(i, group)          what makes weights of its numbers, code - kMiddle, and of sums of their products
//                                     with x; groups of the unit are counted from its first
//     kNeedsSums                      whether that takes the sum of x over the block
//     kHasShifts, shifts()            whether weights have a part that their codes have none in, and that part, block
//                                     by block
//     kUnitBytes, fetch(bytes)        into the second-level cache, a unit that lies so many bytes behind this one
//
// and to those in floats:
//
//     block(i)                        a block's numbers, still packed
//     number(block, j)                vector j of them, in units of kUnit
//
// Most formats' codes become signed bytes first, 32 of them at once; then a quarter (an eighth, half) of those becomes
// a vector of floats. Numbers left where they are, with a larger offset to make up for it, would save an instruction in
// 4 bits; in float32 their sums err three times as much as those of dequantised weights.
#pragma once

#include "../../cpu/bytes.h"
#include "pack.h"

namespace nearpeak::linear::NEARPEAK_ISA {

constexpr int kBlockVectors = static_cast<int>(kCodeBlock) / kLanes;

static_assert(kCodeBlock == kBlockBytes);
using Words = uint16_t __attribute__((vector_size(kCodeBlock)));
using Eight = float __attribute__((vector_size(kCodeBlock)));

inline Eight to_floats(EightInts value) { return __builtin_convertvector(value, Eight); }

// A vector of kLanes with the same sum.
inline Float in_lanes_of(Eight sum) {
#if NEARPEAK_LANES == 16
    return __builtin_shufflevector(sum, Eight{}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif NEARPEAK_LANES == 8
    return sum;
#else
    return __builtin_shufflevector(sum, sum, 0, 1, 2, 3) + __builtin_shufflevector(sum, sum, 4, 5, 6, 7);
#endif
}

// Every byte's bits from `shift` on, in its lowest places; above them, rubbish.
inline UnsignedBytes shifted(UnsignedBytes bytes, int shift) {
    return bitcast<UnsignedBytes>(bitcast<Words>(bytes) >> static_cast<uint16_t>(shift));
}

template <std::size_t... place>
inline UnsignedBytes first_half_of_one(UnsignedBytes first, UnsignedBytes second, std::index_sequence<place...>) {
    return __builtin_shufflevector(first, second, (place < sizeof...(place) / 2 ? place : place + sizeof...(place))...);
}

using HalfBlock = uint8_t __attribute__((vector_size(kCodeBlock / 2)));

template <std::size_t... place>
inline UnsignedBytes twice(HalfBlock half, std::index_sequence<place...>) {
    return __builtin_shufflevector(half, half, (place % sizeof(half))...);
}

// 16 bytes as 32 codes of 4 bits: the low halves, and then the high ones.
inline UnsignedBytes load_halves(const uint8_t* from) {
    using Places = std::make_index_sequence<kCodeBlock>;
    HalfBlock half;
    std::memcpy(&half, from, sizeof(half));
    const UnsignedBytes bytes = twice(half, Places());
    return first_half_of_one(bytes, shifted(bytes, 4), Places()) & 15;
}

// Codes as numbers around zero.
template <int kMiddle>
inline SignedBytes numbers_of(UnsignedBytes codes) {
    return bitcast<SignedBytes>(codes - static_cast<uint8_t>(kMiddle));
}

#if NEARPEAK_LANES == 8 && defined(__AVX2__)
// A vector's bytes go to the highest byte of each lane, which costs one instruction and half of what widening them
// across the register does (Zen 3). So they come from both halves of the register: lanes 0 to 3 of vector j are steps 4
// j to 4 j + 3, lanes 4 to 7 those 16 behind.
constexpr bool kSideBySide = true;
constexpr float kUnit = 0x1p-24f;

inline Float vector_of(SignedBytes bytes, int j) {
    constexpr char kNone = -128;
    const auto place = [&](int i) { return static_cast<char>(4 * j + i); };
    const __m128i to_top = _mm_setr_epi8(kNone, kNone, kNone, place(0), kNone, kNone, kNone, place(1), kNone, kNone,
                                         kNone, place(2), kNone, kNone, kNone, place(3));
    const __m256i spread = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(bytes), _mm256_broadcastsi128_si256(to_top));
    return reinterpret_cast<Float>(_mm256_cvtepi32_ps(spread));
}
#else
constexpr bool kSideBySide = false;
constexpr float kUnit = 1.0f;

inline Float vector_of(SignedBytes bytes, int j) {
#if NEARPEAK_LANES == 16 && defined(__AVX512F__)
    const auto both = reinterpret_cast<__m256i>(bytes);
    const __m128i part = j == 0 ? _mm256_castsi256_si128(both) : _mm256_extracti128_si256(both, 1);
    return to_float(reinterpret_cast<Int>(_mm512_cvtepi8_epi32(part)));
#else
    int8_t __attribute__((vector_size(kLanes))) part;
    std::memcpy(&part, reinterpret_cast<const char*>(&bytes) + j * kLanes, sizeof(part));
    return to_float(__builtin_convertvector(part, Int));
#endif
}
#endif

template <int kHalf, std::size_t... lane>
inline Float halves_of(Float first, Float second, std::index_sequence<lane...>) {
    constexpr std::size_t kCount = sizeof...(lane) / 2;
    return __builtin_shufflevector(first, second,
                                   (lane < kCount ? lane + kHalf * kCount : lane + kCount + kHalf * kCount)...);
}

// The first, or the second, halves of two vectors.
template <int kHalf>
inline Float halves_of(Float first, Float second) {
    return halves_of<kHalf>(first, second, std::make_index_sequence<kLanes>());
}

// Vectors of neighbouring steps, as number() gives them.
inline void put_side_by_side(const Float (&steps)[kBlockVectors], Float (&vectors)[kBlockVectors]) {
    constexpr int kHalf = kBlockVectors / 2;
    for (int j = 0; j < kBlockVectors; ++j) {
        if constexpr (!kSideBySide) {
            vectors[j] = steps[j];
        } else {
            const Float first = steps[j / 2], second = steps[kHalf + j / 2];
            vectors[j] = j % 2 == 0 ? halves_of<0>(first, second) : halves_of<1>(first, second);
        }
    }
}

// The inverse.
inline void put_in_order(const Float (&vectors)[kBlockVectors], Float (&steps)[kBlockVectors]) {
    constexpr int kHalf = kBlockVectors / 2;
    for (int i = 0; i < kBlockVectors; ++i) {
        if constexpr (!kSideBySide) {
            steps[i] = vectors[i];
        } else {
            const Float first = vectors[2 * (i % kHalf)], second = vectors[2 * (i % kHalf) + 1];
            steps[i] = i < kHalf ? halves_of<0>(first, second) : halves_of<1>(first, second);
        }
    }
}

// weight = scale * number. of() is the weights' share of a result: of the sum of numbers times x, and of the sum of x.
struct Scale {
    float scale;

    Scale in_units(float unit) const { return {scale * unit}; }
    template <class Vector>
    Vector weight(Vector number) const {
        return number * scale;
    }
    template <class Vector>
    Vector of(Vector sum, Vector) const {
        return sum * scale;
    }
    Scale without_shift() const { return *this; }
};

// weight = scale * (number - offset)
struct ScaleFromZero {
    float scale, offset;

    ScaleFromZero in_units(float unit) const { return {scale * unit, offset / unit}; }
    template <class Vector>
    Vector weight(Vector number) const {
        return (number - offset) * scale;
    }
    template <class Vector>
    Vector of(Vector sum, Vector x_sum) const {
        return (sum - x_sum * offset) * scale;
    }
    ScaleFromZero without_shift() const { return *this; }
};

// weight = scale * number + shift
struct ScaleAndShift {
    float scale, shift;

    ScaleAndShift in_units(float unit) const { return {scale * unit, shift}; }
    template <class Vector>
    Vector weight(Vector number) const {
        return number * scale + shift;
    }
    template <class Vector>
    Vector of(Vector sum, Vector x_sum) const {
        return sum * scale + x_sum * shift;
    }
    Scale without_shift() const { return {scale}; }
};

// weight = scale * number, with a scale for each half of a block: of vectors whose halves lie in those.
struct ScaleOfHalves {
    float first, second;

    ScaleOfHalves in_units(float unit) const { return {first * unit, second * unit}; }
    Scale of_half(int half) const { return {half == 0 ? first : second}; }
    Eight both() const { return Eight{first, first, first, first, second, second, second, second}; }

    Eight weight(Eight number) const { return number * both(); }
    Eight of(Eight sum, Eight) const { return sum * both(); }
    ScaleOfHalves without_shift() const { return *this; }
};

// 32 codes of 4 bits, two a byte, around their middle. A vector of 16 floats holds all that there are.
struct HalvesOfBytes {
    static constexpr int kMiddle = 8;

    static UnsignedBytes codes(const uint8_t* at) { return load_halves(at); }
#if NEARPEAK_LANES == 16 && defined(__AVX512F__)
    using Block = Int;

    static Block block(const uint8_t* at) { return to_int(load(at)); }
    static Float number(Block bytes, int j) {
        return look_up(to_float(lane_numbers() - kMiddle), j == 0 ? bytes : bytes >> 4);
    }
#else
    using Block = SignedBytes;

    static Block block(const uint8_t* at) { return numbers_of<kMiddle>(codes(at)); }
    static Float number(Block bytes, int j) { return vector_of(bytes, j); }
#endif
};

// Inlined early: of a function that does nothing but fetch, GCC drops the calls.
template <int64_t kBytes>
[[gnu::always_inline]] inline void fetch_lines(const uint8_t* at) {
    constexpr int64_t kLine = 64;
#pragma GCC unroll 8
    for (int64_t byte = 0; byte < kBytes; byte += kLine) __builtin_prefetch(at + byte, 0, 2);
}

}  // namespace nearpeak::linear::NEARPEAK_ISA
