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
          main(p.factors(), p.columns, arena),
          update(p.update ? *p.update : Factors{}, p.columns, arena),
          sums(arena.take(kRows * kPanel)) {}

    // Rows [begin, end) of y^T.
    void run(int64_t begin, int64_t end) {
        [[maybe_unused]] const TileUnit unit;
        main.pack_x(p.columns);
        if (p.update) update.pack_x(p.columns);
        for (int64_t row = begin; row < end; row += kRows) {
            const int64_t count = std::min(kRows, end - row);
            const Left left = main.left_of(row, count);
            const Left update_left = p.update ? update.left_of(row, count) : Left{};
            for (int64_t panel = 0; panel < panels_of(p.columns); ++panel) {
                if (p.columns - panel * kPanel > kLanes) {
                    multiply<kPanelVectors>(left, update_left, panel);
                } else {
                    multiply<1>(left, update_left, panel);
                }
                store_all_sums(sums, kPanel);
                const Range columns{panel * kPanel, std::min((panel + 1) * kPanel, p.columns)};
                store_panel_transposed<bfloat16>(p, sums, {row, row + count}, columns);
            }
        }
    }

  private:
    static constexpr int64_t kRows = 2 * kTileRows;

    static int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

    // 32 rows of the weight; where they are not all there, a copy.
    struct Left {
        const bfloat16* rows;
        int64_t stride;
    };

    struct Pair {
        Stored<bfloat16> weight, given_x;
        int64_t steps, whole, width;  // whole steps of a tile: rounded down, and up
        float* x;                     // panels of kPanel rows of x, in pairs across them
        bfloat16 *last_rows, *last_steps;

        Pair(const Factors& factors, int64_t columns, Arena& arena)
            : weight{static_cast<const bfloat16*>(factors.left), factors.left_rows},
              given_x{static_cast<const bfloat16*>(factors.right), factors.right_rows},
              steps(factors.steps),
              whole(steps / kTileDepth * kTileDepth),
              width(round_up(steps, kTileDepth)),
              x(arena.take(panels_of(columns) * width / 2 * kPanel)),
              last_rows(arena.take<bfloat16>(kRows * (width + kTileDepth))),
              last_steps(arena.take<bfloat16>(kRows * kTileDepth)) {}

        float* panel_of(int64_t panel) const { return x + panel * (width / 2 * kPanel); }

        void pack_x(int64_t all) const {
            for (int64_t panel = 0; panel < panels_of(all); ++panel) {
                const Range columns{panel * kPanel, std::min((panel + 1) * kPanel, all)};
                transpose_panel<Pairs>(given_x, columns, {0, steps}, panel_of(panel));
                std::fill(panel_of(panel) + in_steps<Pairs>(steps) * kPanel, panel_of(panel + 1), 0.0f);
            }
        }

        Left left_of(int64_t row, int64_t count) const {
            Left left{weight.row(row), count > 1 ? weight.row(row + 1) - weight.row(row) : 0};
            if (count < kRows) {
                left = {last_rows, width + kTileDepth};
                std::fill_n(last_rows, kRows * left.stride, bfloat16{});
                for (int64_t i = 0; i < count; ++i)
                    std::copy_n(weight.row(row + i), steps, last_rows + i * left.stride);
            }
            for (int64_t i = 0; whole < steps && i < kRows; ++i) {
                std::fill_n(last_steps + i * kTileDepth, kTileDepth, bfloat16{});
                std::copy_n(left.rows + i * left.stride + whole, steps - whole, last_steps + i * kTileDepth);
            }
            finish_stores();
            return left;
        }

        template <int kVectors>
        void multiply(const Left& left, int64_t panel) const {
            const float* const right = panel_of(panel);
            for (int64_t step = 0; step < whole; step += kTileDepth) {
                multiply_step<kVectors>(left.rows + step, left.stride, right + step / 2 * kPanel);
            }
            if (whole < steps) multiply_step<kVectors>(last_steps, kTileDepth, right + whole / 2 * kPanel);
        }
    };

    const Product& p;
    const Pair main, update;
    float* const sums;

    template <int kVectors>
    void multiply(const Left& left, const Left& update_left, int64_t panel) const {
        zero_all_sums();
        main.multiply<kVectors>(left, panel);
        if (p.update) update.multiply<kVectors>(update_left, panel);
    }
};

}  // namespace nearpeak::linear::NEARPEAK_ISA
#endif
