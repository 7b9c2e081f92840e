// How kernels that walk over rows share them out among PyTorch's threads.
#pragma once

#include "column_sums.h"
#include "tensors.h"

namespace nearpeak {

// Rows below this many elements in all are not worth a second thread: waking one costs about 5 us, in which one
// core of the machines measured (2 x Zen 3, 2 x Sapphire Rapids) normalises about 32768 floats.
constexpr int64_t kElementsPerThread = 32768;

inline int64_t rows_per_thread(int64_t width) {
    return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, width));
}

// The gradients of weight and bias are summed over fixed parts of the rows, and these in a fixed order: the same bits
// whatever the number of threads.
constexpr int64_t kParts = 32, kRowsPerPart = 16;

// Runs backward(first row, row after the last, ColumnSums) over all rows, and writes d_weight and d_bias, unless null,
// by add_up(parts, total, first column, column after the last).
template <class Backward, class AddUp>
void run_in_parts(int64_t rows, int64_t width, const Tensor* d_weight, const Tensor* d_bias, const Backward& backward,
                  const AddUp& add_up) {
    if (!d_weight && !d_bias) {
        torch::stable::parallel_for(0, rows, rows_per_thread(width), [&](int64_t begin, int64_t end) {
            backward(begin, end, ColumnSums{nullptr, nullptr});
        });
        return;
    }
    const int64_t count = std::clamp<int64_t>(rows / kRowsPerPart, 1, kParts);
    const int64_t of_weight = d_weight ? padded(width) : 0, stride = of_weight + (d_bias ? padded(width) : 0);
    Tensor sums = empty_floats({count, stride});
    torch::stable::zero_(sums);
    float* data = static_cast<float*>(sums.mutable_data_ptr());
    parallel_tasks(count, [&](int64_t part) {
        float* of_part = data + part * stride;
        backward(rows * part / count, rows * (part + 1) / count,
                 ColumnSums{d_weight ? of_part : nullptr, d_bias ? of_part + of_weight : nullptr});
    });
    Parts parts{data, count, stride};
    const int64_t blocks = divide_up(width, kColumnBlock);
    const int64_t blocks_per_thread = std::max<int64_t>(1, kElementsPerThread / count / kColumnBlock);
    for (const Tensor* total : {d_weight, d_bias}) {
        if (!total) continue;
        torch::stable::parallel_for(0, blocks, blocks_per_thread, [&](int64_t begin, int64_t end) {
            add_up(parts, total->mutable_data_ptr(), begin * kColumnBlock, std::min(end * kColumnBlock, width));
        });
        parts.sums += padded(width);
    }
}

}  // namespace nearpeak
