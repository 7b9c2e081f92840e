// y^T = W x^T + b for few rows of x and a quantised W: like few_columns.h, a quarter or an eighth of the bytes.
//
// Codes become numbers in registers, and meet the rows of x, which stay in the caches, in float32. What makes weights
// of numbers is applied once to the sum of a block (row_of_numbers.h):
//
//     y[m, n] = bias[n] + sum over g of scale[n, g] * (sum over k in g of number[n, k] x[m, k]
//                                                      - offset[n, g] * sum over k in g of x[m, k])
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../cpu/arena.h"
#include "../../cpu/register_tiles.h"
#include "few_columns.h"
#include "quantized.h"

namespace nearpeak::linear::NEARPEAK_ISA {

// From here on blocks, which dequantise once for all rows of x, are as fast: in bfloat16 they take pairs, or tiles.
// Gflop/s of few columns / of blocks, 2048 x 640 in 8 bits, two threads, Zen 3: 8 rows of x 58 / 58, 12 64 / 68, 16
// 60 / 88.
template <class T>
constexpr int64_t kFewQuantizedColumns = std::is_same_v<StepOf<T>, Pairs> ? 8
                                         : kLanes == 16                   ? 16
                                                                          : 12;
// Two rows of the weight with four of x: each x is loaded once for both. Gflop/s of one thread, 4096 x 4096 in 8 bits,
// eight rows of x (Zen 5): four together 120, eight with one row of the weight 69.
constexpr int kQuantizedTogether = 4;

// Rows are fetched so many steps ahead at least: of short ones the next come before memory has delivered them. Q8_0,
// 640 x 262144, one row of x, one thread (Zen 3): 30 ms with the next rows fetched, 24 ms so.
constexpr int64_t kStepsAhead = 8192;

class QuantizedColumns {
  public:
    // Sums of a block's numbers, up to 2^37 each, must not overflow before scale makes them small; nor may the offset's
    // share of an infinity take the whole away. Blocks dequantise first, and serve such x.
    static bool serves(const Product& p) {
        constexpr float kMost = 0x1p80f;
        bool all = true;
        with_type(p.dtype, [&](auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            const Stored<T> x{static_cast<const T*>(p.right), p.right_matrix.rows};
            for (int64_t column = 0; column < p.columns; ++column) {
                Int is_beyond{};
                for (int64_t step = 0; step < p.steps; step += kLanes) {
                    is_beyond |= ~(magnitude(load(x.row(column) + step)) <= kMost);
                }
                all &= !any(is_beyond);
            }
        });
        return all;
    }

    QuantizedColumns(const Product& product, Arena& arena)
        : p(product),
          weight(*product.quantized),
          x(arena.take(p.columns * p.steps)),
          x_sums(arena.take(p.columns * blocks() * kLanes)) {}

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
    float* const x;       // vectors of steps as numbers have them, those of all columns next to each other
    float* const x_sums;  // of each block, lane by lane, likewise

    int64_t blocks() const { return p.steps / kCodeBlock; }
    float* x_of(int64_t block, int j, int64_t column) const {
        return x + ((block * kBlockVectors + j) * p.columns + column) * kLanes;
    }
    float* sum_of(int64_t block, int64_t column) const { return x_sums + (block * p.columns + column) * kLanes; }

    template <class T>
    void widen_x() {
        const Stored<T> from{static_cast<const T*>(p.right), p.right_matrix.rows};
        for (int64_t column = 0; column < p.columns; ++column) {
            const T* at = from.row(column);
            for (int64_t block = 0; block < blocks(); ++block, at += kCodeBlock) {
                Float steps[kBlockVectors], vectors[kBlockVectors];
                for (int i = 0; i < kBlockVectors; ++i) steps[i] = load(at + i * kLanes);
                put_side_by_side(steps, vectors);
                for (int j = 0; j < kBlockVectors; ++j) store(x_of(block, j, column), vectors[j]);
                store(sum_of(block, column), add_up(vectors));
            }
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

    // Rows end before the processor has begun to fetch ahead by itself: the same place of the rows to come. Zen 5, 4096
    // x 14336, 8 bits, four rows of x: 3.0 ms without it, 2.3 with.
    template <int kRows>
    int64_t steps_ahead() const {
        return kRows * p.steps * std::max<int64_t>(1, kStepsAhead / (kRows * p.steps));
    }

    // A few rows of y^T, as sums of short chains of blocks, for which see kChain.
    template <int kColumns, int kRows, class Row>
    void add_rows(Row (&rows)[kRows], int64_t first, Float (*totals)[kLanes], int lane) const {
        for (int row = 0; row < kRows; ++row) {
            for (int column = 0; column < kColumns; ++column) totals[column][lane + row] = Float{};
        }
        for (int64_t begin = 0; begin < blocks(); begin += kChain) {
            Float chains[kRows][kColumns] = {};
            for (int64_t block = begin; block < std::min(begin + kChain, blocks()); ++block) {
                if (block % kEnterEvery == 0) {
                    for (int row = 0; row < kRows; ++row) rows[row].enter(block);
                }
                add_block(rows, first, block, chains);
            }
            for (int row = 0; row < kRows; ++row) {
                for (int column = 0; column < kColumns; ++column) totals[column][lane + row] += chains[row][column];
            }
        }
    }

    template <int kRows, int kColumns, class Row>
    [[gnu::always_inline]] void add_block(const Row (&rows)[kRows], int64_t first, int64_t block,
                                          Float (&chains)[kRows][kColumns]) const {
        Float sums[kRows][kColumns] = {};
        decltype(rows[0].block(0)) blocks_of[kRows];
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
            rows[row].fetch(block * kCodeBlock + steps_ahead<kRows>());
            blocks_of[row] = rows[row].block(block * kCodeBlock);
        }
#pragma GCC unroll 8
        for (int j = 0; j < kBlockVectors; ++j) {
            Float numbers[kRows];
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) numbers[row] = Row::number(blocks_of[row], j);
#pragma GCC unroll 4
            for (int column = 0; column < kColumns; ++column) {
                Float factor = load(x_of(block, j, first + column));
                keep_in_register(factor);
#pragma GCC unroll 4
                for (int row = 0; row < kRows; ++row) sums[row][column] += numbers[row] * factor;
            }
        }
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
            const auto factors = rows[row].factors(block);
#pragma GCC unroll 4
            for (int column = 0; column < kColumns; ++column) {
                const Float x_sum = Row::kNeedsSums ? load(sum_of(block, first + column)) : Float{};
                factors.add(chains[row][column], sums[row][column], x_sum);
            }
        }
    }
};

}  // namespace nearpeak::linear::NEARPEAK_ISA
