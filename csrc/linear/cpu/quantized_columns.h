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
// Rows are fetched so many steps ahead at least: of short ones the next come before memory has delivered them. Q8_0,
// 640 x 262144, one row of x, one thread (Zen 3): 30 ms with the next rows fetched, 24 ms so.
constexpr int64_t kStepsAhead = 8192;

// Two rows of the weight with four of x: each x is loaded once for both. Gflop/s of one thread, 4096 x 4096 in 8 bits,
// eight rows of x (Zen 5): four together 120, eight with one row of the weight 69.
constexpr int kQuantizedTogether = 4;

// What the products need of each block of each column of x, a Block: those of columns that are multiplied together
// next to each other. And the sums of each column's eight blocks and eight, block by block.
template <class Block>
class BlocksOfX {
  public:
    BlocksOfX(const Product& p, Arena& arena)
        : columns(p.columns),
          blocks(p.steps / kCodeBlock),
          eights((blocks + 7) / 8),
          all(arena.take<Block>(columns * blocks)),
          sums(arena.take<Eight>(columns * eights)) {}

    // The first block of the columns from `first` on.
    const Block* of_columns(int64_t first) const { return all + first * blocks; }
    const Eight* sums_of_column(int64_t column) const { return sums + column * eights; }

    void set(int64_t column, int64_t block, const Block& value, float sum) const {
        const int64_t first = column / kQuantizedTogether * kQuantizedTogether;
        const int64_t count = std::min<int64_t>(kQuantizedTogether, columns - first);
        all[first * blocks + block * count + column - first] = value;
        sums[column * eights + block / 8][block % 8] = sum;
    }

  private:
    const int64_t columns, blocks, eights;
    Block* const all;
    Eight* const sums;
};

// A block of a row of x in floats.
struct FloatBlock {
    Float vectors[kBlockVectors];  // as number() gives those that they meet
    Float sum;                     // lane by lane
};

class FloatX {
  public:
    using Sum = Float;

    static Float in_lanes(Float sum) { return sum; }
    static Float as_sum(Eight sum) { return in_lanes_of(sum); }

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

    FloatX(const Product& product, Arena& arena) : blocks(product, arena), p(product) {}

    const BlocksOfX<FloatBlock> blocks;

    template <class Row>
    void prepare() {
        with_type(p.dtype, [&](auto* t) { widen<Row, std::remove_pointer_t<decltype(t)>>(); });
    }

    // Adds a block, the unit's number i.
    template <int kRows, int kColumns, class Row>
    [[gnu::always_inline]] static void add_block(const Row (&rows)[kRows], const FloatBlock* x, int i, int64_t group,
                                                 Float (&chains)[kRows][kColumns]) {
        Float sums[kRows][kColumns] = {};
        decltype(rows[0].block(0)) blocks_of[kRows];
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) blocks_of[row] = rows[row].block(i);
#pragma GCC unroll 8
        for (int j = 0; j < kBlockVectors; ++j) {
            Float numbers[kRows];
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) numbers[row] = Row::number(blocks_of[row], j);
#pragma GCC unroll 4
            for (int column = 0; column < kColumns; ++column) {
                Float factor = x[column].vectors[j];
                keep_in_register(factor);
#pragma GCC unroll 4
                for (int row = 0; row < kRows; ++row) sums[row][column] += numbers[row] * factor;
            }
        }
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
            const auto coefficients = coefficients_in_units(rows[row], i, group).without_shift();
#pragma GCC unroll 4
            for (int column = 0; column < kColumns; ++column) {
                const Float x_sum = Row::kNeedsSums ? x[column].sum : Float{};
                chains[row][column] += coefficients.of(sums[row][column], x_sum);
            }
        }
    }

  private:
    const Product& p;

    template <class Row, class T>
    void widen() const {
        const Stored<T> from{static_cast<const T*>(p.right), p.right_matrix.rows};
        for (int64_t column = 0; column < p.columns; ++column) {
            const T* at = from.row(column);
            for (int64_t block = 0; block < p.steps / kCodeBlock; ++block, at += kCodeBlock) {
                Float steps[kBlockVectors];
                FloatBlock its;
                for (int i = 0; i < kBlockVectors; ++i) steps[i] = load(at + i * kLanes);
                put_side_by_side(steps, its.vectors);
                its.sum = add_up(its.vectors);
                blocks.set(column, block, its, Row::kHasShifts ? sum(its.sum) : 0.0f);
            }
        }
    }
};

// X is FloatX, or ByteX of byte_columns.h.
template <class X>
class QuantizedColumns {
  public:
    QuantizedColumns(const Product& product, Arena& arena) : p(product), x(product, arena) {}

    // Rows [begin, end) of y^T.
    void run(int64_t begin, int64_t end) {
        with_rows(*p.quantized, p.steps, [&](auto row_of) {
            x.template prepare<decltype(row_of(0))>();
            for (int64_t row = begin; row < end; row += kLanes) multiply_rows(row, end, row_of);
        });
    }

  private:
    using Sum = typename X::Sum;

    const Product& p;
    X x;

    // kLanes rows of y^T, so that all their sums over lanes are taken together. Rows past the end are the last one's.
    template <class RowOf>
    void multiply_rows(int64_t first, int64_t end, RowOf row_of) const {
        for (int64_t column = 0; column < p.columns; column += kQuantizedTogether) {
            with_count<kQuantizedTogether>(std::min<int64_t>(kQuantizedTogether, p.columns - column), [&](auto count) {
                constexpr int kRows = std::min(4, std::max(1, kSumsTogether / count));
                Float totals[count][kLanes];
                for (int lane = 0; lane < kLanes; lane += kRows) {
                    add_rows<count, kRows>(row_of, first + lane, end - 1, column, totals, lane);
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
    template <int kRows, class Row>
    int64_t bytes_ahead() const {
        const int64_t steps = kRows * p.steps * std::max<int64_t>(1, kStepsAhead / (kRows * p.steps));
        return steps / (Row::kUnitBlocks * kCodeBlock) * Row::kUnitBytes;
    }

    // A few rows of y^T, as sums of short chains of blocks, for which see kChain. A function of its own, so that all
    // that is known of its rows is in registers.
    template <int kColumns, int kRows, class RowOf>
    [[gnu::noinline]] void add_rows(RowOf row_of, int64_t first_row, int64_t last_row, int64_t first,
                                    Float (*totals)[kLanes], int lane) const {
        using Row = decltype(row_of(0));
        constexpr int64_t kChainUnits = kChain / Row::kUnitBlocks;
        Row rows[kRows];
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) rows[row] = row_of(std::min(first_row + row, last_row));
        Sum sums[kRows][kColumns] = {};
        const int64_t blocks = p.steps / kCodeBlock, units = blocks / Row::kUnitBlocks;
        const int64_t ahead = bytes_ahead<kRows, Row>();
        const int blocks_shift = p.quantized->group_shift - kBlockShift;
        const auto* its_x = x.blocks.of_columns(first);
        const auto enter = [&](int64_t unit) {
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) rows[row].enter(unit, unit * Row::kUnitBlocks >> blocks_shift);
        };
        for (int64_t begin = 0; begin < units; begin += kChainUnits) {
            Sum chains[kRows][kColumns] = {};
            for (int64_t unit = begin; unit < std::min(begin + kChainUnits, units); ++unit) {
                enter(unit);
#pragma GCC unroll 4
                for (int row = 0; row < kRows; ++row) rows[row].fetch(ahead);
#pragma GCC unroll 8
                for (int i = 0; i < Row::kUnitBlocks; ++i, its_x += kColumns) {
                    X::add_block(rows, its_x, i, i >> blocks_shift, chains);
                }
                if constexpr (Row::kHasShifts) add_shifts(rows, first, unit, chains);
            }
            for (int row = 0; row < kRows; ++row) {
                for (int column = 0; column < kColumns; ++column) sums[row][column] += chains[row][column];
            }
        }
        if (blocks % Row::kUnitBlocks > 0) {
            enter(units);
            for (int i = 0; i < blocks % Row::kUnitBlocks; ++i, its_x += kColumns) {
                X::add_block(rows, its_x, i, i >> blocks_shift, sums);
            }
        }
        for (int row = 0; row < kRows; ++row) {
            for (int column = 0; column < kColumns; ++column) {
                totals[column][lane + row] = X::in_lanes(sums[row][column]);
            }
        }
    }

    template <int kColumns, int kRows, class Row>
    [[gnu::always_inline]] void add_shifts(const Row (&rows)[kRows], int64_t first, int64_t unit,
                                           Sum (&chains)[kRows][kColumns]) const {
#pragma GCC unroll 4
        for (int column = 0; column < kColumns; ++column) {
            const Eight x_sums = x.blocks.sums_of_column(first + column)[unit];
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) chains[row][column] += X::as_sum(rows[row].shifts() * x_sums);
        }
    }
};

}  // namespace nearpeak::linear::NEARPEAK_ISA
