// y^T = W x^T + b for few rows of x and a quantised W: like few_columns.h, a quarter or an eighth of the bytes.
//
// Codes are widened and scaled in registers, and meet the rows of x, which stay in the caches, in float32.
#pragma once

#include <algorithm>

#include "../../cpu/arena.h"
#include "../../cpu/register_tiles.h"
#include "few_columns.h"
#include "quantized.h"

namespace nearpeak::linear::NEARPEAK_ISA {

// From here on blocks, which dequantise once for all rows of x, are as fast.
constexpr int64_t kFewQuantizedColumns = 16;
constexpr int kQuantizedTogether = kLanes == 16 ? 8 : 4;

template <class T>
class QuantizedColumns {
  public:
    QuantizedColumns(const Product& product, Arena& arena)
        : p(product), weight(*product.quantized), x(arena.take(p.columns * p.steps)) {}

    // Rows [begin, end) of y^T.
    void run(int64_t begin, int64_t end) {
        const Stored<T> from{static_cast<const T*>(p.right), p.right_matrix.rows};
        for (int64_t column = 0; column < p.columns; ++column) {
            const T* at = from.row(column);
            for_each_vector(p.steps, [&](int64_t step, auto lanes, int) {
                store(x + column * p.steps + step, load(at + step, lanes), lanes);
            });
        }
        with_rows(weight, p.steps, [&](auto row_of) {
            for (int64_t row = begin; row < end; row += kLanes) multiply_rows(row, end, row_of);
        });
    }

  private:
    const Product& p;
    const Quantized& weight;
    float* const x;

    // kLanes rows of y^T, so that all their sums over lanes are taken together. Rows past the end are the last one's.
    template <class RowOf>
    void multiply_rows(int64_t first, int64_t end, RowOf row_of) const {
        using Row = decltype(row_of(0));
        for (int64_t column = 0; column < p.columns; column += kQuantizedTogether) {
            with_count<kQuantizedTogether>(std::min<int64_t>(kQuantizedTogether, p.columns - column), [&](auto count) {
                constexpr int kRows = std::min(4, std::max(1, kSumsTogether / count));
                Float totals[count][kLanes];
                for (int lane = 0; lane < kLanes; lane += kRows) {
                    Row rows[kRows];
                    for (int row = 0; row < kRows; ++row) rows[row] = row_of(std::min(first + lane + row, end - 1));
                    add_rows<count>(rows, x + column * p.steps, totals, lane);
                }
                store_rows<count>(column, first, std::min<int64_t>(kLanes, end - first), totals);
            });
        }
    }

    // A few rows of y^T, as sums of short chains, for which see kChain.
    template <int kColumns, int kRows, class Row>
    void add_rows(const Row (&rows)[kRows], const float* columns, Float (*totals)[kLanes], int lane) const {
        for (int row = 0; row < kRows; ++row) {
            for (int column = 0; column < kColumns; ++column) totals[column][lane + row] = Float{};
        }
        constexpr int64_t kSteps = kChain * kLanes;
        for (int64_t step = 0; step < p.steps; step += kSteps) {
            add_chunk<kColumns>(rows, columns, {step, std::min(step + kSteps, p.steps)}, totals, lane);
        }
    }

    template <int kColumns, int kRows, class Row>
    void add_chunk(const Row (&rows)[kRows], const float* columns, Range steps, Float (*totals)[kLanes],
                   int lane) const {
        constexpr int kSlots = std::clamp(kSumsTogether / (kRows * kColumns), 1, kBlockVectors);
        Float sums[kRows][kColumns][kSlots] = {};
        for (int64_t step = steps.begin; step < steps.end; step += kCodeBlock) {
            const int64_t group = step >> weight.group_shift;
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
                const auto dequantize = rows[row].group(group);
                Float codes[kBlockVectors];
                load_codes(rows[row], step, codes);
#pragma GCC unroll 8
                for (int vector = 0; vector < kBlockVectors; ++vector) {
                    const Float element = dequantize(codes[vector]);
#pragma GCC unroll 8
                    for (int column = 0; column < kColumns; ++column) {
                        const float* at = columns + column * p.steps + step + vector * kLanes;
                        sums[row][column][vector % kSlots] += element * load(at);
                    }
                }
            }
        }
        for (int row = 0; row < kRows; ++row) {
            for (int column = 0; column < kColumns; ++column) totals[column][lane + row] += add_up(sums[row][column]);
        }
    }

    template <int kColumns>
    void store_rows(int64_t column, int64_t first, int64_t count, Float (*totals)[kLanes]) const {
        const T* bias = static_cast<const T*>(p.bias);
        const Float offset = bias ? load(bias + first, count) : Float{};
        for (int i = 0; i < kColumns; ++i) {
            T* to = static_cast<T*>(p.out) + p.out_matrix.rows(column + i) + first;
            store(to, sum_each(totals[i]) + offset, count);
        }
    }
};

}  // namespace nearpeak::linear::NEARPEAK_ISA
