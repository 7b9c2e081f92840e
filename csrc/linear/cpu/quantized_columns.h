// y^T = W x^T + b for few rows of x and a quantised W: like few_columns.h, a quarter or an eighth of the bytes.
//
// Codes are widened and scaled in registers, and meet the rows of x, which stay in the caches, in float32.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../cpu/arena.h"
#include "../../cpu/register_tiles.h"
#include "few_columns.h"
#include "quantized.h"

namespace nearpeak::linear::NEARPEAK_ISA {

// From here on blocks, which dequantise once for all rows of x, are as fast: in bfloat16 they take pairs, or tiles.
template <class T>
constexpr int64_t kFewQuantizedColumns = std::is_same_v<StepOf<T>, Pairs> ? 8 : 16;
// Two rows of the weight with four of x: each x is loaded once for both. Gflop/s of one thread, 4096 x 4096 in 8 bits,
// eight rows of x (Zen 5): four together 120, eight with one row of the weight 69.
constexpr int kQuantizedTogether = 4;

class QuantizedColumns {
  public:
    QuantizedColumns(const Product& product, Arena& arena)
        : p(product), weight(*product.quantized), x(arena.take(p.columns * p.steps)) {}

    // Rows [begin, end) of y^T.
    void run(int64_t begin, int64_t end) {
        with_type(p.dtype, [&](auto* t) { widen_x<std::remove_pointer_t<decltype(t)>>(); });
        with_rows(weight, p.steps, [&](auto row_of) {
            for (int64_t row = begin; row < end; row += kLanes) multiply_rows(row, end, row_of);
        });
    }

  private:
    const Product& p;
    const Quantized& weight;
    float* const x;  // vectors of neighbouring steps, those of all columns next to each other

    float* vector_of(int64_t step, int64_t column) const { return x + step * p.columns + column * kLanes; }

    template <class T>
    void widen_x() {
        const Stored<T> from{static_cast<const T*>(p.right), p.right_matrix.rows};
        for (int64_t column = 0; column < p.columns; ++column) {
            const T* at = from.row(column);
            for (int64_t step = 0; step < p.steps; step += kLanes) store(vector_of(step, column), load(at + step));
        }
    }

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
                    add_rows<count>(rows, column, totals, lane);
                }
                with_type(p.dtype, [&](auto* t) {
                    store_totals<std::remove_pointer_t<decltype(t)>>(p, column, count, first,
                                                                     std::min<int64_t>(kLanes, end - first), totals);
                });
            });
        }
    }

    // A few rows of y^T, as sums of short chains, for which see kChain.
    template <int kColumns, int kRows, class Row>
    void add_rows(const Row (&rows)[kRows], int64_t first, Float (*totals)[kLanes], int lane) const {
        for (int row = 0; row < kRows; ++row) {
            for (int column = 0; column < kColumns; ++column) totals[column][lane + row] = Float{};
        }
        constexpr int64_t kSteps = kChain * kLanes;
        for (int64_t step = 0; step < p.steps; step += kSteps) {
            add_chunk<kColumns>(rows, first, {step, std::min(step + kSteps, p.steps)}, totals, lane);
        }
    }

    template <int kColumns, int kRows, class Row>
    void add_chunk(const Row (&rows)[kRows], int64_t first, Range steps, Float (*totals)[kLanes], int lane) const {
        constexpr int kSlots = std::clamp(kSumsTogether / (kRows * kColumns), 1, kBlockVectors);
        Float sums[kRows][kColumns][kSlots] = {};
        for (int64_t step = steps.begin; step < steps.end;) {
            typename Row::Group groups[kRows];
            for (int row = 0; row < kRows; ++row) groups[row] = rows[row].group(step >> weight.group_shift);
            for (const int64_t end = step + (int64_t{1} << weight.group_shift); step < end; step += kCodeBlock) {
                add_block(rows, groups, first, step, sums);
            }
        }
        for (int row = 0; row < kRows; ++row) {
            for (int column = 0; column < kColumns; ++column) totals[column][lane + row] += add_up(sums[row][column]);
        }
    }

    template <int kRows, int kColumns, int kSlots, class Row, class Group>
    [[gnu::always_inline]] void add_block(const Row (&rows)[kRows], const Group (&groups)[kRows], int64_t first,
                                          int64_t step, Float (&sums)[kRows][kColumns][kSlots]) const {
        Float codes[kRows][kBlockVectors];
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
            load_codes(rows[row], step, codes[row]);
            // Rows end before the processor has begun to fetch ahead by itself: the same place of the rows to come. Zen
            // 5, 4096 x 14336, 8 bits, four rows of x: 3.0 ms without it, 2.3 with.
            rows[row].fetch(step + kRows * p.steps);
        }
#pragma GCC unroll 8
        for (int vector = 0; vector < kBlockVectors; ++vector) {
            Float elements[kRows];
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) elements[row] = groups[row](codes[row][vector]);
#pragma GCC unroll 8
            for (int column = 0; column < kColumns; ++column) {
                Float factor = load(vector_of(step + vector * kLanes, first + column));
                keep_in_register(factor);
#pragma GCC unroll 4
                for (int row = 0; row < kRows; ++row) sums[row][column][vector % kSlots] += elements[row] * factor;
            }
        }
    }
};

}  // namespace nearpeak::linear::NEARPEAK_ISA
