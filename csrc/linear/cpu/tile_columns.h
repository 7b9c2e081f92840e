// y^T = W x^T + b for some rows of x, with matrix units: like few_columns.h, but of so many rows that vectors would
// take longer to multiply than memory takes to deliver the weight.
//
// The weight streams through once, as it lies: 32 rows of it and 32 rows of x at a time over all of in_features. x is
// packed once per task. Fetching the weight ahead gained nothing: 32 rows are streams enough.
#pragma once

#include "../../cpu/arena.h"
#include "../../cpu/tiles.h"

#ifdef NEARPEAK_HAS_TILES
#include <algorithm>

#include "pack.h"
#include "store.h"
#include "tile_step.h"

namespace nearpeak::linear::NEARPEAK_ISA {

class TileColumns {
  public:
    TileColumns(const Product& product, Arena& arena)
        : p(product),
          whole(p.steps / kTileDepth * kTileDepth),
          width(round_up(p.steps, kTileDepth)),
          x(arena.take(panels() * width / 2 * kPanel)),
          last_rows(arena.take<bfloat16>(kRows * (width + kTileDepth))),
          last_steps(arena.take<bfloat16>(kRows * kTileDepth)),
          sums(arena.take(kRows * kPanel)) {}

    // Rows [begin, end) of y^T.
    void run(int64_t begin, int64_t end) {
        [[maybe_unused]] const TileUnit unit;
        pack_x();
        for (int64_t row = begin; row < end; row += kRows) {
            const int64_t count = std::min(kRows, end - row);
            const Left left = left_of(row, count);
            for (int64_t panel = 0; panel < panels(); ++panel) {
                multiply(left, panel);
                const Range columns{panel * kPanel, std::min((panel + 1) * kPanel, p.columns)};
                store_panel_transposed<bfloat16>(p, sums, {row, row + count}, columns);
            }
        }
    }

  private:
    static constexpr int64_t kRows = 2 * kTileRows;

    // 32 rows of the weight; where they are not all there, a copy.
    struct Left {
        const bfloat16* rows;
        int64_t stride;
    };

    const Product& p;
    const int64_t whole, width;  // in_features in whole steps of a tile: rounded down, and up
    float* const x;              // panels of kPanel rows of x, in pairs across them
    bfloat16 *const last_rows, *const last_steps;
    float* const sums;

    int64_t panels() const { return (p.columns + kPanel - 1) / kPanel; }
    float* panel_of(int64_t panel) const { return x + panel * (width / 2 * kPanel); }

    void pack_x() {
        const Stored<bfloat16> from{static_cast<const bfloat16*>(p.right), p.right_matrix.rows};
        for (int64_t panel = 0; panel < panels(); ++panel) {
            const Range columns{panel * kPanel, std::min((panel + 1) * kPanel, p.columns)};
            const int64_t steps = in_steps<Pairs>(p.steps);
            transpose_panel<Pairs>(from, columns, {0, p.steps}, panel_of(panel));
            std::fill(panel_of(panel) + steps * kPanel, panel_of(panel + 1), 0.0f);
        }
    }

    Left left_of(int64_t row, int64_t count) {
        const Stored<bfloat16> weight{static_cast<const bfloat16*>(p.left), p.left_matrix.rows};
        Left left{weight.row(row), count > 1 ? weight.row(row + 1) - weight.row(row) : 0};
        if (count < kRows) {
            left = {last_rows, width + kTileDepth};
            std::fill_n(last_rows, kRows * left.stride, bfloat16{});
            for (int64_t i = 0; i < count; ++i) std::copy_n(weight.row(row + i), p.steps, last_rows + i * left.stride);
        }
        for (int64_t i = 0; whole < p.steps && i < kRows; ++i) {
            std::fill_n(last_steps + i * kTileDepth, kTileDepth, bfloat16{});
            std::copy_n(left.rows + i * left.stride + whole, p.steps - whole, last_steps + i * kTileDepth);
        }
        finish_stores();
        return left;
    }

    void multiply(const Left& left, int64_t panel) {
        const bool two_vectors = p.columns - panel * kPanel > kLanes;
        if (two_vectors) {
            multiply<kPanelVectors>(left, panel_of(panel));
        } else {
            multiply<1>(left, panel_of(panel));
        }
        store_all_sums(sums, kPanel);
    }

    template <int kVectors>
    void multiply(const Left& left, const float* panel) const {
        zero_all_sums();
        for (int64_t step = 0; step < whole; step += kTileDepth) {
            multiply_step<kVectors>(left.rows + step, left.stride, panel + step / 2 * kPanel);
        }
        if (whole < p.steps) multiply_step<kVectors>(last_steps, kTileDepth, panel + whole / 2 * kPanel);
    }
};

}  // namespace nearpeak::linear::NEARPEAK_ISA
#endif
