// The unit of work of prefill: a panel of query rows, one per lane.
#pragma once

#include <algorithm>

#include "../../cpu/register_tiles.h"
#include "rows.h"

namespace nearpeak::attention::NEARPEAK_ISA {

// Panel number `panel` of a task: rows [begin, end).
struct PanelRows {
    PanelRows(const Task& task, int64_t panel)
        : begin(task.row_begin + panel * kPanel), end(begin + kPanel < task.row_end ? begin + kPanel : task.row_end) {}

    int64_t begin, end;
};

inline int64_t panels_of(const Task& task) { return (task.row_end - task.row_begin + kPanel - 1) / kPanel; }

// The rows of each lane of a vector; null where there are none.
template <class T>
struct Lanes {
    const T* rows[kLanes];

    // block[i][lane] = element d + i of the lane's row; null lanes give zeros. `count` as in for_each_vector.
    template <class Count>
    void load_transposed(int64_t d, Count count, Float (&block)[kLanes]) const {
        for (int lane = 0; lane < kLanes; ++lane) block[lane] = rows[lane] ? load(rows[lane] + d, count) : Float{};
        transpose(block);
    }

    // to[d][lane] = factor * element d of the lane's row; the rows of `to` are kPanel apart.
    void transpose_to(int64_t head_dim, float factor, float* to) const {
        for_each_vector(head_dim, [&](int64_t d, auto count, int) {
            Float block[kLanes];
            load_transposed(d, count, block);
            const int64_t elements = std::min<int64_t>(kLanes, head_dim - d);
            for (int64_t i = 0; i < elements; ++i) store(to + (d + i) * kPanel, block[i] * factor);
        });
    }
};

// Lanes of the rows [begin, end), kLanes at most: row(number) says where each begins.
template <class T, class Row>
Lanes<T> lanes_of(int64_t begin, int64_t end, Row row) {
    Lanes<T> lanes;
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes.rows[lane] = begin + lane < end ? row(begin + lane) : nullptr;
    return lanes;
}

// Queries of one half of a panel.
template <class T>
Lanes<T> query_lanes(const Call& p, const Task& task, PanelRows rows, int half) {
    return lanes_of<T>(rows.begin + half * kLanes, rows.end, [&](int64_t row) { return query_row<T>(p, task, row); });
}

// Weights of two keys, k and the next one, in bfloat16 and in pairs: row k / 2 of a panel. A panel of weights in
// float32 is overwritten by its pairs as it is read: they lie in front of what is still to be read.
inline void store_weight_pairs(float* weights, int64_t k, int half, Float first, Float second) {
    store(weights + k / 2 * kPanel + half * kLanes, pair(first, second));
}

// block[i][lane] = pair (d + 2 i, d + 2 i + 1) of the lane's row.
inline void load_transposed_pairs(const Lanes<bfloat16>& lanes, int64_t d, int64_t dim, Float (&block)[kLanes]) {
    for (int lane = 0; lane < kLanes; ++lane) block[lane] = load_some_pairs(lanes.rows[lane], d, dim);
    transpose(block);
}

// to[i][lane] = pair (2 i, 2 i + 1) of the lane's row; the rows of `to` are kPanel apart.
inline void transpose_pairs(const Lanes<bfloat16>& lanes, int64_t dim, float* to) {
    const int64_t pairs = (dim + 1) / 2;
    for (int64_t first = 0; first < pairs; first += kLanes) {
        Float block[kLanes];
        load_transposed_pairs(lanes, 2 * first, dim, block);
        const int64_t count = std::min<int64_t>(kLanes, pairs - first);
        for (int64_t i = 0; i < count; ++i) store(to + (first + i) * kPanel, block[i]);
    }
}

}  // namespace nearpeak::attention::NEARPEAK_ISA
