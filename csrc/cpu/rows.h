// Where the rows (the last dimension) of a tensor begin.
#pragma once

#include <cstdint>

namespace nearpeak {

// Row number `row` begins row / inner * outer_stride + row % inner * inner_stride elements from the tensor's start:
// enough for contiguous tensors, slices of packed ones, and transposed heads.
struct Rows {
    int64_t inner, outer_stride, inner_stride;

    // Also for device code; the branch spares contiguous tensors two 64-bit divisions a row.
    constexpr int64_t operator()(int64_t row) const {
        return row < inner ? row * inner_stride : row / inner * outer_stride + row % inner * inner_stride;
    }
};

}  // namespace nearpeak
