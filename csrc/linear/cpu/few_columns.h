// y^T = W x^T + b for few rows of x, as in decoding: the weight's bytes are the limit.
//
// in_features lies across the lanes. The weight streams through once, in memory's order; rows of x, widened once, stay
// in the caches and meet each of its vectors together.
#pragma once

#include <algorithm>

#include "../../cpu/arena.h"
#include "../../cpu/register_tiles.h"
#include "pack.h"

namespace nearpeak::linear::NEARPEAK_ISA {

constexpr int kColumnsTogether = 4;
constexpr int kSumsTogether = 8;  // as many independent sums as hide the multiply-add's latency

inline void multiply_add(Float& sum, Float a, Float b) { sum += a * b; }
inline void multiply_add(Float& sum, Two a, Two b) {
    sum += a.low * b.low;
    sum += a.high * b.high;
}

template <class T>
class FewColumns {
  public:
    FewColumns(const Product& product, Arena& arena)
        : p(product), stride(round_up(p.steps, 2 * kLanes)), x(arena.take(p.columns * stride)) {}

    // Rows [begin, end) of y^T.
    void run(int64_t begin, int64_t end) {
        const Stored<T> from{static_cast<const T*>(p.right), p.right_matrix.rows};
        for (int64_t column = 0; column < p.columns; ++column) {
            const T* at = from.row(column);
            for_each_two<T>(p.steps, [&](int64_t step, auto lanes, int) {
                store(x + column * stride + step, load(at + step, lanes), kept(lanes));
            });
        }
        for (int64_t row = begin; row < end; row += kLanes) multiply_rows(row, end);
    }

  private:
    const Product& p;
    const int64_t stride;
    float* const x;

    // kLanes rows of y^T, so that all their sums over lanes are taken together.
    void multiply_rows(int64_t first, int64_t end) const {
        const Stored<T> weight{static_cast<const T*>(p.left), p.left_matrix.rows};
        Float totals[kFewColumns][kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            const T* row = weight.row(std::min(first + lane, end - 1));
            for (int64_t column = 0; column < p.columns; column += kColumnsTogether) {
                with_count<kColumnsTogether>(std::min<int64_t>(kColumnsTogether, p.columns - column), [&](auto count) {
                    multiply_row<count>(row, x + column * stride, totals + column, lane);
                });
            }
        }
        const int64_t count = std::min<int64_t>(kLanes, end - first);
        const T* bias = static_cast<const T*>(p.bias);
        const Float offset = bias ? load(bias + first, count) : Float{};
        for (int64_t column = 0; column < p.columns; ++column) {
            T* to = static_cast<T*>(p.out) + p.out_matrix.rows(column) + first;
            store(to, sum_each(totals[column]) + offset, count);
        }
    }

    template <int kColumns>
    void multiply_row(const T* row, const float* columns, Float (*totals)[kLanes], int lane) const {
        constexpr int kSlots = kSumsTogether / kColumns;
        Float sums[kColumns][kSlots] = {};
        for_each_two<T, kSlots>(p.steps, [&](int64_t step, auto lanes, int slot) {
            const auto element = load(row + step, lanes);
#pragma GCC unroll 4
            for (int column = 0; column < kColumns; ++column) {
                multiply_add(sums[column][slot], load(columns + column * stride + step, kept(lanes)), element);
            }
        });
        for (int column = 0; column < kColumns; ++column) totals[column][lane] = add_up(sums[column]);
    }
};

}  // namespace nearpeak::linear::NEARPEAK_ISA
