// Rows of a quantised weight, as numbers with what makes them weights, and its dequantised rows as a left factor.
#pragma once

#include <type_traits>

#include "gguf_rows.h"
#include "row_of_numbers.h"

namespace nearpeak::linear::NEARPEAK_ISA {

// A row of codes of `kBits` bits, with scales and perhaps zero points beside them:  weight = scale * (code - zero).
template <int kBits, bool kZeros>
struct CodesRow {
    static constexpr int kMiddle = 1 << (kBits - 1);
    static constexpr bool kNeedsSums = kZeros;

    const uint8_t* codes;
    const float* scales;
    const uint8_t* zeros;
    int blocks_shift;  // log2 of the blocks of a group

    auto block(int64_t step) const {
        const uint8_t* const at = codes + step * kBits / 8;
        if constexpr (kBits == 4) {
            return HalvesOfBytes::block(at);
        } else {
            return bitcast<SignedBytes>(load_block(at) ^ uint8_t{kMiddle});
        }
    }
    template <class Block>
    static Float number(Block block, int j) {
        if constexpr (kBits == 4) {
            return HalvesOfBytes::number(block, j);
        } else {
            return vector_of(block, j);
        }
    }
    auto factors(int64_t block) const {
        const int64_t group = block >> blocks_shift;
        if constexpr (kZeros) {
            const float offset = static_cast<float>(zeros[group] - kMiddle) / kUnit;
            return ScaledFromZero{broadcast(scales[group] * kUnit), broadcast(offset)};
        } else {
            return Scaled{broadcast(scales[group] * kUnit)};
        }
    }

    void enter(int64_t) const {}

    [[gnu::always_inline]] void fetch(int64_t step) const {
        constexpr int64_t kLineCodes = 64 * 8 / kBits;
        if (step % kLineCodes == 0) fetch_line(codes + step * kBits / 8);
    }
};

// Calls function(row_of) with what gives a row of the weight, of `steps` elements.
template <class Function>
inline void with_rows(const Quantized& weight, int64_t steps, Function function) {
    const auto with_codes = [&](auto bits, auto zeros) {
        function([&weight, steps](int64_t row) {
            const int64_t groups = steps >> weight.group_shift;
            return CodesRow<decltype(bits)::value, decltype(zeros)::value>{
                weight.codes + row * (steps * decltype(bits)::value / 8), weight.scales + row * groups,
                decltype(zeros)::value ? weight.zeros + row * groups : nullptr, weight.group_shift - kBlockShift};
        });
    };
    const auto with_bits = [&](auto bits) {
        if (weight.zeros) {
            with_codes(bits, std::true_type{});
        } else {
            with_codes(bits, std::false_type{});
        }
    };
    switch (weight.format) {
        case Format::bits8:
            return with_bits(std::integral_constant<int, 8>{});
        case Format::bits4:
            return with_bits(std::integral_constant<int, 4>{});
        default:
            return with_gguf_rows(weight.format, weight.codes, steps, function);
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
            Row row = row_of(number);
            Kept* const at = reinterpret_cast<Kept*>(to);
            for (int64_t step = steps.begin; step < steps.end; step += kCodeBlock) {
                if (step == steps.begin || step / kCodeBlock % kEnterEvery == 0) row.enter(step / kCodeBlock);
                const auto block = row.block(step);
                const auto factors = row.factors(step / kCodeBlock);
                Float vectors[kBlockVectors], weights[kBlockVectors];
                for (int j = 0; j < kBlockVectors; ++j) vectors[j] = factors.weight(Row::number(block, j));
                put_in_order(vectors, weights);
                for (int i = 0; i < kBlockVectors; ++i) store(at + step - steps.begin + i * kLanes, weights[i]);
            }
        }
    });
}

}  // namespace nearpeak::linear::NEARPEAK_ISA
