// Codes of a quantised weight, as numbers, and its dequantised rows as a left factor.
#pragma once

#include <type_traits>

#include "pack.h"

namespace nearpeak::linear::NEARPEAK_ISA {

// Vectors of a block of codes, which are the same elements whether 8 or 4 bits hold each.
constexpr int kBlockVectors = static_cast<int>(kCodeBlock) / kLanes;

// One row of a quantised weight, whose codes become numbers around zero. What they stand for:
//
//     weight = scale * (number - offset),   number = code - middle,   offset = zero - middle
//
// Numbers left where they are, with a larger offset to make up for it, would save an instruction in 4 bits; in float32
// their sums err three times as much as those of dequantised weights.
template <int kBits, bool kZeros>
struct QuantizedRow {
    static constexpr int kMiddle = 1 << (kBits - 1);
    static constexpr bool kLooksUp = 1 << kBits == kLanes;
    static constexpr bool kHasOffset = kZeros;
    // A block is loaded in so many vectors of bytes, of which each gives so many of numbers.
    static constexpr int kNumbers = 8 / kBits, kLoads = kBlockVectors / kNumbers;

    const uint8_t* codes;
    const float* scales;
    const uint8_t* zeros;

    Int bytes(int64_t step, int load_number) const {
        return to_int(load(codes + step * kBits / 8 + load_number * kLanes));
    }
    // In the order of their steps, this is vector `load_number + half * kLoads` of its block.
    static Float numbers(Int bytes, int half) {
        constexpr float kFloatMiddle = kMiddle;
        if constexpr (kBits == 8) {
            return to_float(bytes) - kFloatMiddle;
        } else {
            // Halves of bytes are taken apart in 32 bits: of shorter vectors GCC makes scalar code.
            const Int codes = half ? bytes >> 4 : bytes;
            if constexpr (kLooksUp) return look_up(to_float(lane_numbers()) - kFloatMiddle, codes);
            return to_float(codes & 15) - kFloatMiddle;
        }
    }

    float offset(int64_t group) const { return kZeros ? static_cast<float>(zeros[group] - kMiddle) : 0.0f; }

    // Into the second-level cache, once a line, what bytes() of `step` will read. It may lie in a row behind this one.
    // Inlined early: of a function that does nothing but fetch, GCC drops the calls.
    [[gnu::always_inline]] void fetch(int64_t step) const {
        constexpr int64_t kLineCodes = 64 * 8 / kBits;
        if (step % kLineCodes == 0) __builtin_prefetch(codes + step * kBits / 8, 0, 2);
    }
};

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
        using Row = decltype(row_of(0));
        for (int64_t number = rows.begin; number < rows.end; ++number, to += stride) {
            const Row row = row_of(number);
            Kept* const at = reinterpret_cast<Kept*>(to);
            for (int64_t step = steps.begin; step < steps.end; step += kCodeBlock) {
                const int64_t group = step >> weight.group_shift;
                const Float scale = broadcast(row.scales[group]), offset = broadcast(row.offset(group));
                for (int load_number = 0; load_number < Row::kLoads; ++load_number) {
                    const Int bytes = row.bytes(step, load_number);
                    for (int half = 0; half < Row::kNumbers; ++half) {
                        const int64_t vector = load_number + half * Row::kLoads;
                        store(at + step - steps.begin + vector * kLanes, (Row::numbers(bytes, half) - offset) * scale);
                    }
                }
            }
        }
    });
}

}  // namespace nearpeak::linear::NEARPEAK_ISA
