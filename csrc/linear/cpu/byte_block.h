// One block of y^T = W x^T + b, of many rows of x in 8 bits. As block.h, packed so that caches and registers are used
// over and over:
//
//     x       all steps of a chunk x the block's columns, in panels of kPanel columns      second-level cache
//             one panel of it                                                              first-level cache
//     codes   kLeftRows rows x the steps of a chunk                                        second-level cache
//     sums    kTile rows x one panel, of a group's steps                                   registers
//
// Integers meet their scales at the end of every group, and are added up in float32 in scratch memory.
#pragma once

#include "block.h"
#include "byte_x.h"

namespace nearpeak::linear::NEARPEAK_ISA {

// Rows of codes, with what makes weights of sums over each group.
template <class Coefficients>
struct ByteRows {
    const int32_t* steps;
    int64_t stride;
    const Coefficients* coefficients;
    int64_t coefficients_stride;
};

// A panel of x: its steps; for each group and column, the scale and the sum times -kMiddle.
struct BytePanel {
    const int32_t* steps;
    const float* scales;
    const int32_t* less_middle;
};

// out[row][column] += x_scale[column] * share of the sum over `steps` steps, one group.
template <int kRows, int kMiddle, class Coefficients>
[[gnu::noinline]] void multiply_group(ByteRows<Coefficients> rows, BytePanel panel, int64_t steps, float* out) {
    Int sums[kRows][kPanelVectors];
#pragma GCC unroll 24
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int vector = 0; vector < kPanelVectors; ++vector) {
            sums[row][vector] = ByteStep::kTakesCodes ? load_ints(panel.less_middle + vector * kLanes) : Int{};
        }
    }
    for (int64_t step = 0; step < steps; ++step) {
        const int32_t* const at = panel.steps + step * kPanel;
        const Int x[kPanelVectors] = {load_ints(at), load_ints(at + kLanes)};
#pragma GCC unroll 24
        for (int row = 0; row < kRows; ++row) {
            const Int codes = broadcast(rows.steps[row * rows.stride + step]);
#pragma GCC unroll 4
            for (int vector = 0; vector < kPanelVectors; ++vector) {
                sums[row][vector] = ByteStep::multiply_add(codes, x[vector], sums[row][vector]);
            }
        }
    }
#pragma GCC unroll 4
    for (int vector = 0; vector < kPanelVectors; ++vector) {
        const Float scale = load(panel.scales + vector * kLanes);
        const Float x_sum = to_float(load_ints(panel.less_middle + vector * kLanes)) * (-1.0f / kMiddle);
#pragma GCC unroll 24
        for (int row = 0; row < kRows; ++row) {
            float* const at = out + row * kPanel + vector * kLanes;
            const Coefficients& coefficients = rows.coefficients[row * rows.coefficients_stride];
            store(at, load(at) + coefficients.of(to_float(sums[row][vector]), x_sum) * scale);
        }
    }
}

class ByteBlockProduct {
  public:
    ByteBlockProduct(const Product& product, const Block& its_block, Arena& arena)
        : p(product),
          block(its_block),
          chunk_steps(round_up(std::min<int64_t>(kSteps, p.steps / kElements), kLanes)),
          left_rows(std::min(panels() == 1 ? kNarrowLeftRows : kLeftRows, rows())),
          // Rows a power of two apart would fall into few sets of the cache.
          left_stride(chunk_steps + kPanel),
          x(arena.take<int32_t>(panels() * chunk_steps * kPanel)),
          x_scales(arena.take(panels() * groups_at_most() * kPanel)),
          less_middle(arena.take<int32_t>(panels() * groups_at_most() * kPanel)),
          left(arena.take<int32_t>(left_rows * left_stride)),
          coefficients(arena.take<ScaleFromZero>(left_rows * groups_at_most())),
          sums(arena.take(panels() * rows() * kPanel)) {}

    void run() const {
        std::fill_n(sums, panels() * rows() * kPanel, 0.0f);
        with_rows(*p.quantized, p.steps, [&](auto row_of) { multiply(row_of); });
        with_type(p.dtype, [&](auto* t) {
            for (int64_t panel = 0; panel < panels(); ++panel) {
                store_panel_transposed<std::remove_pointer_t<decltype(t)>>(
                    p, sums_of(panel), {block.row_begin, block.row_end}, columns_of(panel));
            }
        });
    }

  private:
    static constexpr int64_t kElements = ByteStep::kElements, kHalfBlock = kCodeBlock / 2;

    const Product& p;
    const Block& block;
    const int64_t chunk_steps, left_rows, left_stride;
    int32_t* const x;
    float* const x_scales;
    int32_t* const less_middle;
    int32_t* const left;
    ScaleFromZero* const coefficients;  // or others, none of them larger
    float* const sums;

    int64_t rows() const { return block.row_end - block.row_begin; }
    int64_t panels() const { return (block.column_end - block.column_begin + kPanel - 1) / kPanel; }
    int64_t groups_at_most() const { return chunk_steps * kElements / kHalfBlock; }
    float* sums_of(int64_t panel) const { return sums + panel * rows() * kPanel; }
    Range columns_of(int64_t panel) const {
        const int64_t first = block.column_begin + panel * kPanel;
        return {first, std::min(first + kPanel, block.column_end)};
    }

    template <class RowOf>
    void multiply(RowOf row_of) const {
        using Row = decltype(row_of(0));
        using Each = decltype(coefficients_of_group(row_of(0), 0, 0, false));
        static_assert(sizeof(Each) <= sizeof(ScaleFromZero));
        auto* const its_coefficients = reinterpret_cast<Each*>(coefficients);
        const int64_t group = Row::kHasHalves ? kHalfBlock : p.quantized->group_size();
        for (int64_t begin = 0; begin < p.steps; begin += chunk_steps * kElements) {
            const Range chunk{begin, std::min(begin + chunk_steps * kElements, p.steps)};
            for (int64_t panel = 0; panel < panels(); ++panel) pack_x<Row::kMiddle>(panel, chunk, group);
            for (int64_t row = 0; row < rows(); row += left_rows) {
                const int64_t count = std::min(left_rows, rows() - row);
                for (int64_t i = 0; i < count; ++i) {
                    pack_row(row_of(block.row_begin + row + i), chunk, group, left + i * left_stride,
                             its_coefficients + i * groups_at_most());
                }
                for (int64_t panel = 0; panel < panels(); ++panel) {
                    multiply_panel<Row::kMiddle>(its_coefficients, count, chunk.size(), group, panel,
                                                 sums_of(panel) + row * kPanel);
                }
            }
        }
    }

    template <int kMiddle>
    void pack_x(int64_t panel, Range chunk, int64_t group) const {
        const Range columns = columns_of(panel);
        const int64_t at = panel * groups_at_most() * kPanel;
        for (int64_t i = 0; i < kPanel; ++i) {
            if (i < columns.size()) {
                pack_groups<kMiddle>(columns.begin + i, chunk, group, at + i);
            } else {
                for (int64_t g = 0; g < chunk.size() / group; ++g) {
                    x_scales[at + i + g * kPanel] = 0.0f;
                    less_middle[at + i + g * kPanel] = 0;
                }
            }
        }
        transpose_codes(columns, chunk, x + panel * chunk_steps * kPanel);
    }

    // A group of half a block has x's scale in common with the next one.
    template <int kMiddle>
    void pack_groups(int64_t column, Range chunk, int64_t group, int64_t at) const {
        const int x_shift = p.quantized->group_shift;
        const float* const scales = p.rounded->scales + column * (p.steps >> x_shift);
        for (int64_t step = chunk.begin; step < chunk.end; step += group, at += kPanel) {
            x_scales[at] = scales[step >> x_shift];
            less_middle[at] = -kMiddle * sum_of_codes(p.rounded->codes + column * p.steps + step, group);
        }
    }

    // x's codes as steps of 32 bits across the panel: zeros past the last column, and past the last step.
    void transpose_codes(Range columns, Range chunk, int32_t* to) const {
        for (int half = 0; half < kPanelVectors; ++half, to += kLanes) {
            for (int64_t step = chunk.begin; step < chunk.end; step += kLanes * kElements) {
                Float steps[kLanes];
                for (int lane = 0; lane < kLanes; ++lane) {
                    const int64_t column = columns.begin + half * kLanes + lane;
                    steps[lane] = column < columns.end ? load_codes(column, step) : Float{};
                }
                transpose(steps);
                int32_t* const first = to + (step - chunk.begin) / kElements * kPanel;
                for (int i = 0; i < kLanes; ++i) store_ints(first + i * kPanel, bitcast<Int>(steps[i]));
            }
        }
    }

    Float load_codes(int64_t column, int64_t step) const {
        const int8_t* const from = p.rounded->codes + column * p.steps + step;
        constexpr int64_t kCount = kLanes * kElements;
        if (step + kCount <= p.steps) return ByteStep::load_x(from);
        int8_t codes[kCount] = {};
        std::copy_n(from, p.steps - step, codes);
        return ByteStep::load_x(codes);
    }

    template <class Row, class Each>
    void pack_row(Row row, Range chunk, int64_t group, int32_t* to, Each* its_coefficients) const {
        const int blocks_shift = p.quantized->group_shift - kBlockShift;
        for (int64_t step = chunk.begin; step < chunk.end; step += kCodeBlock, to += kCodeBlock / kElements) {
            const int64_t number = step / kCodeBlock;
            const int i = static_cast<int>(number % Row::kUnitBlocks);
            if (i == 0) row.enter(number / Row::kUnitBlocks, number >> blocks_shift);
            const UnsignedBytes codes = row.codes(i);
            if constexpr (ByteStep::kTakesCodes) {
                std::memcpy(to, &codes, sizeof(codes));
            } else {
                const auto numbers = __builtin_convertvector(numbers_of<Row::kMiddle>(codes), BlockOfShorts);
                std::memcpy(to, &numbers, sizeof(numbers));
            }
            for (int64_t at = 0; at < kCodeBlock; at += group) {
                if ((step - chunk.begin) % group == 0) {
                    *its_coefficients++ = coefficients_of_group(row, i, i >> blocks_shift, at > 0);
                }
            }
        }
    }

    template <int kMiddle, class Each>
    void multiply_panel(const Each* its_coefficients, int64_t count, int64_t elements, int64_t group, int64_t panel,
                        float* out) const {
        const int64_t steps = group / kElements;
        for (int64_t row = 0; row < count; row += kTile, out += kTile * kPanel) {
            with_count(std::min<int64_t>(kTile, count - row), [&](auto rows) {
                for (int64_t i = 0; i < elements / group; ++i) {
                    const ByteRows<Each> from{left + row * left_stride + i * steps, left_stride,
                                              its_coefficients + row * groups_at_most() + i, groups_at_most()};
                    const int64_t at = (panel * groups_at_most() + i) * kPanel;
                    const BytePanel right{x + (panel * chunk_steps + i * steps) * kPanel, x_scales + at,
                                          less_middle + at};
                    multiply_group<rows, kMiddle>(from, right, steps, out);
                }
            });
        }
    }
};

}  // namespace nearpeak::linear::NEARPEAK_ISA
