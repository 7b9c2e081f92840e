// Codes of a quantised weight, as numbers, and its dequantised rows as a left factor.
#pragma once

#include <type_traits>

#include "pack.h"

namespace nearpeak::linear::NEARPEAK_ISA {

// Vectors of a block of codes, which are the same elements whether 8 or 4 bits hold each.
constexpr int kBlockVectors = static_cast<int>(kCodeBlock) / kLanes;

// From a code to what it stands for, in one group of one row. A middle zero point is a power of two: its product with
// the scale is exact, and one multiply-add rounds once, as (code - zero) * scale does.
#ifdef __FMA__
constexpr bool kOneMultiplyAdd = true;
#else
constexpr bool kOneMultiplyAdd = false;
#endif

template <bool kZeros>
struct Dequantize {
    Float scale, zero;

    Dequantize() = default;
    Dequantize(float its_scale, float its_zero)
        : scale(broadcast(its_scale)), zero(broadcast(kZeros || !kOneMultiplyAdd ? its_zero : -its_zero * its_scale)) {}
    Float operator()(Float code) const {
        return kZeros || !kOneMultiplyAdd ? (code - zero) * scale : code * scale + zero;
    }
};

// One row of a quantised weight.
template <int kBits, bool kZeros>
struct QuantizedRow {
    using Group = Dequantize<kZeros>;

    const uint8_t* codes;
    const float* scales;
    const uint8_t* zeros;

    // Into the second-level cache, what a load of codes from `step` on will read. It may lie in a row behind this one.
    void fetch(int64_t step) const { __builtin_prefetch(codes + step * kBits / 8, 0, 2); }

    Group group(int64_t number) const {
        return {scales[number], kZeros ? static_cast<float>(zeros[number]) : 1 << (kBits - 1)};
    }
};

// The codes from `step` on, one block, as numbers in the order of their steps.
template <int kBits, bool kZeros>
inline void load_codes(const QuantizedRow<kBits, kZeros>& row, int64_t step, Float (&codes)[kBlockVectors]) {
    const uint8_t* block = row.codes + step * kBits / 8;
    if constexpr (kBits == 8) {
#pragma GCC unroll 8
        for (int vector = 0; vector < kBlockVectors; ++vector) codes[vector] = to_float(load(block + vector * kLanes));
    } else {
        constexpr int kHalf = kBlockVectors / 2;
#pragma GCC unroll 4
        for (int vector = 0; vector < kHalf; ++vector) {
            const Bytes pairs = load(block + vector * kLanes);
            codes[vector] = to_float(pairs & 15);
            codes[vector + kHalf] = to_float(pairs >> 4);
        }
    }
}

// Calls function(row_of) with what gives a row of the weight as its QuantizedRow.
template <class Function>
inline void with_rows(const Quantized& weight, int64_t steps, Function function) {
    const auto with = [&](auto bits, auto zeros) {
        function([&weight, steps](int64_t row) {
            const int64_t groups = steps >> weight.group_shift;
            return QuantizedRow<decltype(bits)::value, decltype(zeros)::value>{
                weight.codes + row * (steps * decltype(bits)::value / 8), weight.scales + row * groups,
                decltype(zeros)::value ? weight.zeros + row * groups : nullptr};
        });
    };
    const auto with_bits = [&](auto zeros) {
        if (weight.bits == 8) {
            with(std::integral_constant<int, 8>{}, zeros);
        } else {
            with(std::integral_constant<int, 4>{}, zeros);
        }
    };
    if (weight.zeros) {
        with_bits(std::true_type{});
    } else {
        with_bits(std::false_type{});
    }
}

// Like copy_left, of a dequantised weight: to[row][step], rows `stride` floats apart. Where the product takes bfloat16
// numbers in pairs, they are rounded to it, as a weight dequantised beforehand would be.
template <class Step>
void dequantize_left(const Quantized& weight, int64_t width, Range rows, Range steps, float* to, int64_t stride) {
    using Kept = std::conditional_t<Step::kElements == 2, bfloat16, float>;
    with_rows(weight, width, [&](auto row_of) {
        for (int64_t number = rows.begin; number < rows.end; ++number, to += stride) {
            const auto row = row_of(number);
            Kept* at = reinterpret_cast<Kept*>(to);
            for (int64_t step = steps.begin; step < steps.end; step += kCodeBlock) {
                const auto dequantize = row.group(step >> weight.group_shift);
                Float codes[kBlockVectors];
                load_codes(row, step, codes);
                for (int vector = 0; vector < kBlockVectors; ++vector, at += kLanes) {
                    store(at, dequantize(codes[vector]));
                }
            }
        }
    });
}

}  // namespace nearpeak::linear::NEARPEAK_ISA
