// Products of bytes: of a weight's codes with x in 8 bits. Integers: they are exact, whatever the instruction set.
//
// A code is an unsigned byte, of which kMiddle stands for zero; x is a byte with a sign, not -128.
#pragma once

#include "vector.h"

namespace nearpeak::NEARPEAK_ISA {

// A block of bytes, and its sums, four steps a lane.
constexpr int kBlockBytes = 32;
using SignedBytes = int8_t __attribute__((vector_size(kBlockBytes)));
using UnsignedBytes = uint8_t __attribute__((vector_size(kBlockBytes)));
using EightInts = int32_t __attribute__((vector_size(kBlockBytes)));

using Shorts = int16_t __attribute__((vector_size(4 * kLanes)));
using BlockOfShorts = int16_t __attribute__((vector_size(2 * kBlockBytes)));

inline Int load_ints(const int32_t* from) {
    Int value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}
inline void store_ints(int32_t* to, Int value) { std::memcpy(to, &value, sizeof(value)); }

inline UnsignedBytes load_block(const uint8_t* from) {
    UnsignedBytes bytes;
    std::memcpy(&bytes, from, sizeof(bytes));
    return bytes;
}
inline SignedBytes load_block(const int8_t* from) {
    return bitcast<SignedBytes>(load_block(reinterpret_cast<const uint8_t*>(from)));
}

// For each four steps: less_middle + sum of code * x, where less_middle is -kMiddle * sum of x.
template <int kMiddle>
inline EightInts dot(UnsignedBytes codes, SignedBytes x, EightInts less_middle) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<EightInts>(_mm256_dpbusd_epi32(
        reinterpret_cast<__m256i>(less_middle), reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(x)));
#elif defined(__AVX2__)
    const auto sums = [](UnsignedBytes left, SignedBytes right) {
        const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(left), reinterpret_cast<__m256i>(right));
        return reinterpret_cast<EightInts>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    };
    if constexpr (kMiddle < 128) {
        return less_middle + sums(codes, x);
    } else {
        // Two products of 8 bits by 7 do not fit into 16 bits; of 7 by 7 they do. So x takes over the number's sign.
        const auto numbers = reinterpret_cast<__m256i>(codes ^ uint8_t{kMiddle});
        return sums(reinterpret_cast<UnsignedBytes>(_mm256_abs_epi8(numbers)),
                    reinterpret_cast<SignedBytes>(_mm256_sign_epi8(reinterpret_cast<__m256i>(x), numbers)));
    }
#else
    for (int step = 0; step < kBlockBytes; ++step) less_middle[step / 4] += codes[step] * x[step];
    return less_middle;
#endif
}

// What a step of 32 bits multiplies in every lane, of blocks of many rows of x. Where it takes codes as they are, the
// sums have to begin with less_middle; else they are codes less kMiddle.
#if defined(__AVX512VNNI__) || defined(NEARPEAK_EMULATE_PAIRS)
struct ByteStep {
    static constexpr int kElements = 4;
    static constexpr bool kTakesCodes = true;

    static Float load_x(const int8_t* codes) { return load(reinterpret_cast<const float*>(codes)); }

    static Int multiply_add(Int codes, Int x, Int sums) {
#if defined(__AVX512VNNI__)
        return reinterpret_cast<Int>(_mm512_dpbusd_epi32(
            reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(codes), reinterpret_cast<__m512i>(x)));
#else
        for (int shift = 0; shift < 32; shift += 8) {
            sums += (codes >> shift & 255) * (bitcast<Int>(bitcast<Unsigned>(x) << (24 - shift)) >> 24);
        }
        return sums;
#endif
    }
};
#else
struct ByteStep {
    static constexpr int kElements = 2;
    static constexpr bool kTakesCodes = false;

    static Float load_x(const int8_t* codes) {
        int8_t __attribute__((vector_size(2 * kLanes))) bytes;
        std::memcpy(&bytes, codes, sizeof(bytes));
        return bitcast<Float>(__builtin_convertvector(bytes, Shorts));
    }

    static Int multiply_add(Int numbers, Int x, Int sums) {
#if NEARPEAK_LANES == 16 && defined(__AVX512BW__)
        return sums + reinterpret_cast<Int>(
                          _mm512_madd_epi16(reinterpret_cast<__m512i>(numbers), reinterpret_cast<__m512i>(x)));
#elif NEARPEAK_LANES == 8 && defined(__AVX2__)
        return sums + reinterpret_cast<Int>(
                          _mm256_madd_epi16(reinterpret_cast<__m256i>(numbers), reinterpret_cast<__m256i>(x)));
#elif NEARPEAK_LANES == 4 && defined(__SSE2__)
        return sums +
               reinterpret_cast<Int>(_mm_madd_epi16(reinterpret_cast<__m128i>(numbers), reinterpret_cast<__m128i>(x)));
#else
        const auto first = [](Int both) { return bitcast<Int>(bitcast<Unsigned>(both) << 16) >> 16; };
        return sums + first(numbers) * first(x) + (numbers >> 16) * (x >> 16);
#endif
    }
};
#endif

}  // namespace nearpeak::NEARPEAK_ISA
