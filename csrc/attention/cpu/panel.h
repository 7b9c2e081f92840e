// The unit of work of prefill: a panel of query rows, one per lane.
#pragma once

#include <algorithm>

#include "rows.h"

namespace nearpeak::attention::NEARPEAK_ISA {

// Two vectors: per broadcast element two multiply-adds, so that a tile of 6 x 2 (12 x 2 with 32 registers) needs
// 8 (14) loads for its 12 (24) multiply-adds, and the multipliers, not the loads, are the limit.
constexpr int kPanelVectors = 2;
constexpr int kPanel = kPanelVectors * kLanes;

// Panel number `panel` of a task: rows [begin, end).
struct PanelRows {
    PanelRows(const Task& task, int64_t panel)
        : begin(task.row_begin + panel * kPanel), end(begin + kPanel < task.row_end ? begin + kPanel : task.row_end) {}

    int64_t begin, end;
};

inline int64_t panels_of(const Task& task) { return (task.row_end - task.row_begin + kPanel - 1) / kPanel; }

// The queries of each lane of a vector; null past the panel's last row.
template <class T>
struct QueryLanes {
    QueryLanes(const Call& p, const Task& task, PanelRows rows, int half) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t row = rows.begin + half * kLanes + lane;
            lanes[lane] = row < rows.end ? query_row<T>(p, task, row) : nullptr;
        }
    }

    const T* lanes[kLanes];
};

// to[d][lane] = factor * lanes[lane][d], the rows of `to` being kPanel apart; null lanes give zeros.
template <class T>
void transpose_lanes(const T* const (&lanes)[kLanes], int64_t head_dim, float factor, float* to) {
    for_each_vector(head_dim, [&](int64_t d, auto count, int) {
        Float block[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            block[lane] = lanes[lane] ? load(lanes[lane] + d, count) * factor : Float{};
        }
        transpose(block);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, head_dim - d); ++i) store(to + (d + i) * kPanel, block[i]);
    });
}

}  // namespace nearpeak::attention::NEARPEAK_ISA
