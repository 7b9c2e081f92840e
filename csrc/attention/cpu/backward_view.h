// What a block of rows and a block of keys see of each other in backward.
#pragma once

#include <algorithm>

#include "mask.h"
#include "panel.h"

namespace nearpeak::attention::NEARPEAK_ISA {

// From one row's scores to the next, spread as below.
constexpr int64_t kScoreStride = kBlockKeys + 16;

inline int64_t in_panels(int64_t dim) { return (dim + kPanel - 1) / kPanel * kPanel; }

// An odd number of cache lines from one row to the next spreads rows over all sets of a cache.
inline int64_t spread(int64_t row) {
    constexpr int64_t kFloatsPerLine = 16;
    return ((row + kFloatsPerLine - 1) / kFloatsPerLine | 1) * kFloatsPerLine;
}

// Rows [first_row, first_row + rows) of the task with all its keys.
struct BackwardView {
    BackwardView(const Backward& parameters, const Task& this_task)
        : p(parameters), task(this_task), keys(this_task.key_end - this_task.key_begin) {}

    const Backward& p;
    const Task& task;
    const int64_t keys;
    int64_t first_row = 0, rows = 0;

    // Rows of the block, from its first, that may look at one of the block's keys [begin, end).
    RowRange rows_that_see(int64_t begin, int64_t end) const {
        const RowRange all =
            allowed_rows(p, task.sequence, task.key_begin + begin, task.key_begin + std::min(end, keys));
        return {std::clamp<int64_t>(all.begin - first_row, 0, rows), std::clamp<int64_t>(all.end - first_row, 0, rows)};
    }

    // Keys of the block, from its first, that one of the block's rows [begin, end) may look at.
    KeyRange keys_seen_by(int64_t begin, int64_t end) const {
        const KeyRange all = allowed_keys(p, task.sequence, first_row + begin, first_row + std::min(end, rows));
        return {std::clamp<int64_t>(all.begin - task.key_begin, 0, keys),
                std::clamp<int64_t>(all.end - task.key_begin, 0, keys)};
    }

    template <class T>
    const T* query(int64_t row) const {
        return query_row<T>(p, task, first_row + row);
    }
    template <class T>
    const T* grad_out(int64_t row) const {
        return row_in(static_cast<const T*>(p.grad_out), p.grad_out_strides, p, task, first_row + row);
    }
    template <class T>
    const T* key(int64_t k) const {
        return key_rows<T>(p, task) + (task.key_begin + k) * p.key_strides.position;
    }
    template <class T>
    const T* value(int64_t k) const {
        return value_rows<T>(p, task) + (task.key_begin + k) * p.value_strides.position;
    }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
