// Copies a part of a matrix into scratch memory, in float32: as its rows lie, or transposed.
#pragma once

#include <algorithm>

#include "../../cpu/vector.h"
#include "kernels.h"

namespace nearpeak::linear::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Range {
    int64_t begin, end;

    int64_t size() const { return end - begin; }
};

// A matrix as it lies in memory.
template <class T>
struct Stored {
    const T* data;
    Rows rows;

    const T* row(int64_t number) const { return data + rows(number); }
};

// to[i][j] = from[i][j]. Whole vectors are written.
template <class T>
void copy_rows(const Stored<T>& from, Range i, Range j, float* to, int64_t stride) {
    for (int64_t row = i.begin; row < i.end; ++row, to += stride) {
        const T* at = from.row(row) + j.begin;
        for_each_vector(j.size(),
                        [&](int64_t column, auto lanes, int) { store(to + column, load(at + column, lanes)); });
    }
}

// to[j][i] = from[i][j], zeros in the columns from the last one up to `width`. Whole vectors are written.
template <class T>
void transpose_rows(const Stored<T>& from, Range i, Range j, float* to, int64_t stride, int64_t width) {
    for (int64_t first = 0; first < width; first += kLanes) {
        const T* rows[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const int64_t row = i.begin + first + lane;
            rows[lane] = row < i.end ? from.row(row) + j.begin : nullptr;
        }
        for_each_vector(j.size(), [&](int64_t column, auto lanes, int) {
            Float block[kLanes];
            for (int lane = 0; lane < kLanes; ++lane)
                block[lane] = rows[lane] ? load(rows[lane] + column, lanes) : Float{};
            transpose(block);
            const int64_t count = std::min<int64_t>(kLanes, j.size() - column);
            for (int64_t lane = 0; lane < count; ++lane) store(to + (column + lane) * stride + first, block[lane]);
        });
    }
}

}  // namespace nearpeak::linear::NEARPEAK_ISA
