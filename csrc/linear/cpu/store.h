// y^T leaves scratch memory as rows of y, through its epilogue where there is one.
#pragma once

#include <algorithm>

#include "epilogue.h"
#include "pack.h"

namespace nearpeak::linear::NEARPEAK_ISA {

// `count` rows of y^T from `first` on, kLanes at most, of `columns` columns: totals[column][row] lie across lanes, and
// are added up with their bias.
template <class T>
[[gnu::always_inline]] inline void store_totals(const Product& p, int64_t column, int64_t columns, int64_t first,
                                                int64_t count, Float (*totals)[kLanes]) {
    const T* bias = static_cast<const T*>(p.bias);
    const Float offset = bias ? load(bias + first, count) : Float{};
    if (p.has_epilogue()) {
        // A copy is passed on: totals whose address were would stay in memory while they are summed.
        Vectors values;
        for (int64_t i = 0; i < columns; ++i) values.of[i] = sum_each(totals[i]) * p.scale + offset;
        return store_with_epilogue<T>(p, values, column, columns, first, count);
    }
    for (int64_t i = 0; i < columns; ++i) {
        T* to = static_cast<T*>(p.out) + p.out_matrix.rows(column + i) + first;
        store(to, sum_each(totals[i]) * p.scale + offset, count);
    }
}

// A panel of sums, rows of kPanel columns: `rows` of y^T, with their bias, and up to kPanel `columns` of it.
template <class T>
void store_panel_transposed(const Product& p, const float* sums, Range rows, Range columns) {
    const T* bias = static_cast<const T*>(p.bias);
    for (int64_t column = 0; column < columns.size(); column += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, columns.size() - column);
        for_each_vector(rows.size(), [&](int64_t row, auto lanes, int) {
            Float values[kLanes];
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                values[lane] = row + lane < rows.size() ? load(sums + (row + lane) * kPanel + column) : Float{};
            }
            transpose(values);
            const Float offset = bias ? load(bias + rows.begin + row, lanes) : Float{};
            if (p.has_epilogue()) {
                Vectors sums_and_bias;
                for (int64_t lane = 0; lane < kLanes; ++lane) sums_and_bias.of[lane] = values[lane] * p.scale + offset;
                return store_with_epilogue<T>(p, sums_and_bias, columns.begin + column, count, rows.begin + row,
                                              count_of(lanes));
            }
            for (int64_t lane = 0; lane < count; ++lane) {
                T* to = static_cast<T*>(p.out) + p.out_matrix.rows(columns.begin + column + lane) + rows.begin;
                store(to + row, values[lane] * p.scale + offset, lanes);
            }
        });
    }
}

}  // namespace nearpeak::linear::NEARPEAK_ISA
