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
    static constexpr bool kNeedsSums = kZeros, kHasShifts = false, kScalesNumbers = false, kHasHalves = false;
    static constexpr int kUnitBlocks = 4;
    static constexpr int64_t kBytes = kCodeBlock * kBits / 8, kUnitBytes = kUnitBlocks * kBytes;

    const uint8_t* bytes;
    const float* scales;
    const uint8_t* zeros;
    int64_t offset, first_group;  // of the unit: the same in all rows, and so in one register

    void enter(int64_t number, int64_t group) {
        offset = number * kUnitBytes;
        first_group = group;
    }
    const uint8_t* at(int i) const { return bytes + offset + i * kBytes; }

    UnsignedBytes codes(int i) const {
        if constexpr (kBits == 4) {
            return HalvesOfBytes::codes(at(i));
        } else {
            return load_block(at(i));
        }
    }
    auto block(int i) const {
        if constexpr (kBits == 4) {
            return HalvesOfBytes::block(at(i));
        } else {
            return numbers_of<kMiddle>(codes(i));
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
    auto coefficients(int, int64_t group) const {
        if constexpr (kZeros) {
            return ScaleFromZero{scales[first_group + group], static_cast<float>(zeros[first_group + group] - kMiddle)};
        } else {
            return Scale{scales[first_group + group]};
        }
    }

    [[gnu::always_inline]] void fetch(int64_t behind) const { fetch_lines<kUnitBytes>(at(0) + behind); }
};

// What makes weights of numbers as block() and number() give them.
template <class Row>
auto coefficients_in_units(const Row& row, int i, int64_t group) {
    if constexpr (Row::kScalesNumbers) {
        return Scale{1.0f};
    } else {
        return row.coefficients(i, group).in_units(kUnit);
    }
}

// Calls function(row_of) with what gives a row of the weight, of `steps` elements.
template <class Function>
inline void with_rows(const Quantized& weight, int64_t steps, Function function) {
    const auto with_codes = [&](auto bits, auto zeros) {
        function([&weight, steps](int64_t row) {
            const int64_t groups = steps >> weight.group_shift;
            using Row = CodesRow<decltype(bits)::value, decltype(zeros)::value>;
            Row its_row{};
            its_row.bytes = weight.codes + row * (steps * decltype(bits)::value / 8);
            its_row.scales = weight.scales + row * groups;
            if (decltype(zeros)::value) its_row.zeros = weight.zeros + row * groups;
            return its_row;
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

// Like copy_left, of a dequantised weight, from the first step of a unit on: to[row][step], rows `stride` floats apart.
// Where the product takes bfloat16 numbers in pairs, they are rounded to it, as a weight dequantised beforehand would
// be.
template <class Step>
void dequantize_left(const Quantized& weight, int64_t width, Range rows, Range steps, float* to, int64_t stride) {
    using Kept = std::conditional_t<Step::kElements == 2, bfloat16, float>;
    const int blocks_shift = weight.group_shift - kBlockShift;
    with_rows(weight, width, [&](auto row_of) {
        using Row = decltype(row_of(0));
        for (int64_t number = rows.begin; number < rows.end; ++number, to += stride) {
            Row row = row_of(number);
            Kept* const at = reinterpret_cast<Kept*>(to);
            for (int64_t step = steps.begin; step < steps.end; step += kCodeBlock) {
                const int64_t number = step / kCodeBlock;
                const int i = static_cast<int>(number % Row::kUnitBlocks);
                if (i == 0) row.enter(number / Row::kUnitBlocks, number >> blocks_shift);
                const auto block = row.block(i);
                const auto coefficients = coefficients_in_units(row, i, i >> blocks_shift);
                Float vectors[kBlockVectors], weights[kBlockVectors];
                for (int j = 0; j < kBlockVectors; ++j) vectors[j] = coefficients.weight(Row::number(block, j));
                put_in_order(vectors, weights);
                for (int v = 0; v < kBlockVectors; ++v) store(at + step - steps.begin + v * kLanes, weights[v]);
            }
        }
    });
}

}  // namespace nearpeak::linear::NEARPEAK_ISA
