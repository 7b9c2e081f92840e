// Rows of x in 8 bits: rounded to nearest in groups of neighbouring steps, each with the scale of its largest.
//
//     scale[g] = max over k in g of |x[k]| / 127,    code[k] = round(x[k] / scale[g]), ties to even
//
// Groups that small numbers alone fill are zeros; those with an infinity or NaN get NaN for their scale, and so do all
// results of the row.
#pragma once

#include "row_of_numbers.h"

namespace nearpeak::linear::NEARPEAK_ISA {

constexpr float kMostCode = 127.0f;

using CodeLanes = int8_t __attribute__((vector_size(kLanes)));

// -127 to 127. Added to 1.5 * 2^23, a number's units are the lowest bit.
inline CodeLanes rounded_codes(Float x, float factor) {
    const auto bits = bitcast<Int>(uncontracted(x * factor) + 0x1.8p23f);
    return __builtin_convertvector(bits, CodeLanes);
}

// Codes of `count` steps, whole blocks; returns their scale.
template <class T>
float round_group(const T* x, int64_t count, int8_t* codes) {
    Float most{};
    Int is_finite = ~Int{};
    for (int64_t step = 0; step < count; step += kLanes) {
        const Float size = magnitude(load(x + step));
        most = max(most, size);
        is_finite &= size < kInfinity;
    }
    const float largest = maximum(most);
    // Below, the factor could be infinite.
    constexpr float kLeast = 0x1p-119f;
    const float factor = largest >= kLeast ? kMostCode / largest : 0.0f;
    for (int64_t step = 0; step < count; step += kLanes) {
        const CodeLanes rounded = rounded_codes(load(x + step), factor);
        std::memcpy(codes + step, &rounded, sizeof(rounded));
    }
    if (any(~is_finite)) return std::numeric_limits<float>::quiet_NaN();
    return largest >= kLeast ? largest / kMostCode : 0.0f;
}

inline void round_x(const Product& p, int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        const Stored<T> from{static_cast<const T*>(p.right), p.right_matrix.rows};
        const int64_t group = p.quantized->group_size(), groups = p.steps / group;
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t i = 0; i < groups; ++i) {
                int8_t* const codes = p.rounded->codes + row * p.steps + i * group;
                p.rounded->scales[row * groups + i] = round_group(from.row(row) + i * group, group, codes);
            }
        }
    });
}

// What makes weights of numbers of a block, of its second half, or of the group that it lies in.
template <class Row>
auto coefficients_of_group(const Row& row, int i, int64_t group, bool second) {
    if constexpr (Row::kHasHalves) {
        return row.coefficients(i, group).of_half(second);
    } else {
        return row.coefficients(i, group);
    }
}

// For each four steps of a block: -kMiddle * sum of x, which less_middle is for dot().
template <int kMiddle>
inline EightInts less_middle_of(SignedBytes x) {
    return dot<0>(UnsignedBytes{} + uint8_t{1}, x, EightInts{}) * -kMiddle;
}

inline int32_t sum_of_codes(const int8_t* codes, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += codes[i];
    return sum;
}

}  // namespace nearpeak::linear::NEARPEAK_ISA
