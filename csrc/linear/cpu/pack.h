// Copies a part of a factor into scratch memory in steps of 32 bits: elements in float32, or pairs of them in bfloat16
// (register_tiles.h).
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../cpu/register_tiles.h"
#include "../../cpu/tiles.h"
#include "kernels.h"

namespace nearpeak::linear::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

template <class T>
using StepOf = std::conditional_t<kInPairs<T> || kInTiles<T>, Pairs, Singles>;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Range {
    int64_t begin, end;

    int64_t size() const { return end - begin; }
};

template <class Step>
constexpr int64_t in_steps(int64_t elements) {
    return (elements + Step::kElements - 1) / Step::kElements;
}

// A matrix as it lies in memory.
template <class T>
struct Stored {
    const T* data;
    Rows rows;

    const T* row(int64_t number) const { return data + rows(number); }
};

// Steps of the product lie along rows of memory: up to kLanes of them, from `element` on of a row of `width`, zeros
// past its end, and without a row.
template <class Step, class T>
Float load_along(const T* row, int64_t element, int64_t width) {
    if constexpr (Step::kElements == 2) {
        return load_some_pairs(row, element, width);
    } else {
        if (!row) return Float{};
        return element + kLanes <= width ? load(row + element) : load(row + element, width - element);
    }
}

// Steps lie across rows: the one that begins with row `number` of `steps`, of up to kLanes columns from `column` on,
// zeros past the ends of both.
template <class Step, class T>
Float load_across(const Stored<T>& from, Range steps, int64_t number, int64_t column, int64_t width) {
    const auto row = [&](int64_t of) { return of < steps.end ? from.row(of) : nullptr; };
    if constexpr (Step::kElements == 2) {
        return pair(load_some_bits(row(number), column, width), load_some_bits(row(number + 1), column, width));
    } else {
        return column < width ? load_along<Step>(row(number), column, width) : Float{};
    }
}

// A left factor whose rows lie as they should: to[row][step], rows `stride` floats apart. Whole vectors are written.
// Some rows are read at once, each a stream that the processor fetches ahead by itself. AMX machine, bfloat16, W of
// 4096 x 4096, 32 rows of x: one row at a time 578 Gflop/s, eight 646.
template <class Step, class T>
void copy_left(const Stored<T>& from, Range rows, Range steps, float* to, int64_t stride) {
    constexpr int64_t kStreams = 8;
    for (int64_t row = rows.begin; row < rows.end; row += kStreams, to += kStreams * stride) {
        const int64_t count = std::min(kStreams, rows.end - row);
        const T* streams[kStreams];
        for (int64_t i = 0; i < count; ++i) streams[i] = from.row(row + i) + steps.begin;
        for (int64_t element = 0; element < steps.size(); element += kLanes * Step::kElements) {
            for (int64_t i = 0; i < count; ++i) {
                store(to + i * stride + element / Step::kElements, load_along<Step>(streams[i], element, steps.size()));
            }
        }
    }
}

// A left factor that lies transposed: likewise.
template <class Step, class T>
void transpose_left(const Stored<T>& from, Range rows, Range steps, float* to, int64_t stride) {
    for (int64_t first = steps.begin; first < steps.end; first += kLanes * Step::kElements, to += kLanes) {
        for (int64_t row = rows.begin; row < rows.end; row += kLanes) {
            Float block[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                block[lane] = load_across<Step>(from, steps, first + lane * Step::kElements, row, rows.end);
            }
            transpose(block);
            const int64_t count = std::min<int64_t>(kLanes, rows.end - row);
            for (int64_t lane = 0; lane < count; ++lane) store(to + (row - rows.begin + lane) * stride, block[lane]);
        }
    }
}

// A panel of a right factor that lies transposed, up to kPanel columns of it: to[step][column], zeros past the last.
template <class Step, class T>
void transpose_panel(const Stored<T>& from, Range columns, Range steps, float* to) {
    for (int half = 0; half < kPanelVectors; ++half, to += kLanes) {
        const T* rows[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t column = columns.begin + half * kLanes + lane;
            rows[lane] = column < columns.end ? from.row(column) + steps.begin : nullptr;
        }
        for (int64_t element = 0; element < steps.size(); element += kLanes * Step::kElements) {
            Float block[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) block[lane] = load_along<Step>(rows[lane], element, steps.size());
            transpose(block);
            const int64_t count = std::min<int64_t>(kLanes, in_steps<Step>(steps.size() - element));
            for (int64_t i = 0; i < count; ++i) store(to + (element / Step::kElements + i) * kPanel, block[i]);
        }
    }
}

// A panel of a right factor that lies as it should: likewise.
template <class Step, class T>
void copy_panel(const Stored<T>& from, Range columns, Range steps, float* to) {
    for (int64_t row = steps.begin; row < steps.end; row += Step::kElements, to += kPanel) {
        for (int half = 0; half < kPanelVectors; ++half) {
            const int64_t column = columns.begin + half * kLanes;
            store(to + half * kLanes, load_across<Step>(from, steps, row, column, columns.end));
        }
    }
}

}  // namespace nearpeak::linear::NEARPEAK_ISA
