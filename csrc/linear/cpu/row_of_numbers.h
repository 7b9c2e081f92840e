// What rows of every quantised weight give to the products, in blocks of kCodeBlock steps:
//
//     block(step)       a block's codes, as they come out of memory
//     number(block, j)  vector j of its numbers, which are codes around zero, in units of kUnit
//     enter(block)      called for every kEnterEvery-th block before its own and the next ones' block() and factors()
//     factors(block)    what makes weights of its numbers, and of the sum of their products with x
//     kNeedsSums        whether that takes the sum of x over the block
//     fetch(step)       into the second-level cache, what block(step) will read; it may lie in a row behind this one
//
// Most formats' codes become signed bytes first, 32 of them at once; then a quarter (an eighth, half) of those becomes
// a vector of floats. Numbers left where they are, with a larger offset to make up for it, would save an instruction in
// 4 bits; in float32 their sums err three times as much as those of dequantised weights.
#pragma once

#include <array>

#include "pack.h"

namespace nearpeak::linear::NEARPEAK_ISA {

constexpr int64_t kEnterEvery = 8;
constexpr int kBlockVectors = static_cast<int>(kCodeBlock) / kLanes;

using SignedBytes = int8_t __attribute__((vector_size(kCodeBlock)));
using UnsignedBytes = uint8_t __attribute__((vector_size(kCodeBlock)));
using Words = uint16_t __attribute__((vector_size(kCodeBlock)));

inline UnsignedBytes load_block(const uint8_t* from) {
    UnsignedBytes bytes;
    std::memcpy(&bytes, from, sizeof(bytes));
    return bytes;
}

// Every byte's bits from `shift` on, in its lowest places; above them, rubbish.
inline UnsignedBytes shifted(UnsignedBytes bytes, int shift) {
    return bitcast<UnsignedBytes>(bitcast<Words>(bytes) >> static_cast<uint16_t>(shift));
}

template <std::size_t... place>
inline UnsignedBytes first_half_of_one(UnsignedBytes first, UnsignedBytes second, std::index_sequence<place...>) {
    return __builtin_shufflevector(first, second, (place < sizeof...(place) / 2 ? place : place + sizeof...(place))...);
}

// 16 bytes as 32 codes of 4 bits: the low halves, and then the high ones.
inline UnsignedBytes load_halves(const uint8_t* from) {
    std::array<uint8_t, kCodeBlock> twice;
    std::memcpy(twice.data(), from, kCodeBlock / 2);
    std::memcpy(twice.data() + kCodeBlock / 2, from, kCodeBlock / 2);
    const UnsignedBytes bytes = load_block(twice.data());
    return first_half_of_one(bytes, shifted(bytes, 4), std::make_index_sequence<kCodeBlock>()) & 15;
}

// Codes of 5 bits less 16, of the lower four and where the fifth is not set (-1; else 0).
inline SignedBytes with_fifth_bits(UnsignedBytes low, SignedBytes without) {
    constexpr int8_t kSixteen = -16;
    return bitcast<SignedBytes>(low) | (without & kSixteen);
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

// weight = scale * number; here and below scales have the factor kUnit.
struct Scaled {
    Float scale;

    Float weight(Float number) const { return number * scale; }
    void add(Float& chain, Float sum, Float) const { chain += scale * sum; }
};

// weight = scale * (number - offset)
struct ScaledFromZero {
    Float scale, offset;

    Float weight(Float number) const { return (number - offset) * scale; }
    void add(Float& chain, Float sum, Float x_sum) const { chain += scale * (sum - x_sum * offset); }
};

// weight = scale * number + shift
struct ScaledAndShifted {
    Float scale, shift;

    Float weight(Float number) const { return number * scale + shift; }
    void add(Float& chain, Float sum, Float x_sum) const {
        chain += scale * sum;
        chain += shift * x_sum;
    }
};

// 32 codes of 4 bits, two a byte, around their middle. A vector of 16 floats holds all that there are.
struct HalvesOfBytes {
    static constexpr int kMiddle = 8;
#if NEARPEAK_LANES == 16 && defined(__AVX512F__)
    using Block = Int;

    static Block block(const uint8_t* at) { return to_int(load(at)); }
    static Float number(Block bytes, int j) {
        return look_up(to_float(lane_numbers() - kMiddle), j == 0 ? bytes : bytes >> 4);
    }
#else
    using Block = SignedBytes;

    static Block block(const uint8_t* at) { return bitcast<SignedBytes>(load_halves(at)) - int8_t{kMiddle}; }
    static Float number(Block bytes, int j) { return vector_of(bytes, j); }
#endif
};

// Inlined early: of a function that does nothing but fetch, GCC drops the calls.
[[gnu::always_inline]] inline void fetch_line(const void* at) { __builtin_prefetch(at, 0, 2); }

}  // namespace nearpeak::linear::NEARPEAK_ISA
