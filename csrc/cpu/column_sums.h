// Sums over rows that differ in order neither with threads nor from run to run: each part of the rows has its own, and
// the parts are added up in their order.
#pragma once

#include <cstdint>

namespace nearpeak {

// Sums over rows, one float32 for each column, that a backward pass adds to. They are kept as the instruction set
// likes them, and only add_up_parts can read them; a row of them holds padded(width) floats.
struct ColumnSums {
    float *weight, *bias;  // either null where its gradient is not wanted
};

constexpr int64_t kMostLanes = 16;
constexpr int64_t padded(int64_t width) { return (width + kMostLanes - 1) / kMostLanes * kMostLanes; }

// add_up_parts may begin at multiples of this many columns.
constexpr int64_t kColumnBlock = 2 * kMostLanes;

struct Parts {
    const float* sums;
    int64_t count, stride;  // floats from one part to the next
};

}  // namespace nearpeak

#ifdef NEARPEAK_ISA
#include "two.h"

namespace nearpeak::NEARPEAK_ISA {

template <class Values, class Lanes>
void add_to(float* sums, Values values, Lanes lanes) {
    store(sums, load(sums, lanes) + values, lanes);
}

// to[column] = sum of all parts' column, for columns [begin, end). T: the type whose order of lanes the sums have.
template <class T, class W>
void add_up_parts(Parts parts, W* to, int64_t begin, int64_t end) {
    const float* from = parts.sums + begin;
    for_each_two<T>(end - begin, [&](int64_t column, auto lanes, int) {
        auto value = load(from + column, kept(lanes));
        for (int64_t part = 1; part < parts.count; ++part) {
            value = value + load(from + part * parts.stride + column, kept(lanes));
        }
        store(to + begin + column, value, lanes);
    });
}

}  // namespace nearpeak::NEARPEAK_ISA
#endif
