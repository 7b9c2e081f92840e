// One block of a product, packed so that caches and registers are used over and over:
//
//     right   all steps of a chunk x the block's columns, in panels of kPanel columns      second-level cache
//             one panel of it                                                              first-level cache
//     left    kLeftRows rows x the steps of a chunk                                        second-level cache
//     sums    kTile rows x one panel, with matrix units 32 rows                            registers
//
// Each panel meets all rows of `left` before the next one, each chunk all panels. What a chunk gives is added in
// float32 in scratch memory, and rounded once when the last chunk is done.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../cpu/arena.h"
#include "../../cpu/register_tiles.h"
#include "../../cpu/tiles.h"
#include "pack.h"
#include "quantized.h"
#include "store.h"
#include "tile_step.h"

namespace nearpeak::linear::NEARPEAK_ISA {

// In steps of 32 bits. A panel of kSteps fills half of a 32 KiB first-level cache, kLeftRows of them 400 of 512 KiB in
// the second.
constexpr int64_t kSteps = 256, kLeftRows = 384;
// Of a single panel nothing is used again but the panel: then rows of the weight are read from end to end, a few at a
// time, as memory likes it.
constexpr int64_t kNarrowSteps = 1024, kNarrowLeftRows = 2 * kTile;

// Of a quantised weight, which is dequantised as it is packed, or of one in T.
template <class T, bool kQuantized>
class BlockProduct {
  public:
    BlockProduct(const Product& product, const Block& its_block, Arena& arena)
        : p(product),
          block(its_block),
          steps(round_up(std::clamp<int64_t>(in_steps<Step>(p.steps), 1, narrow() ? kNarrowSteps : kSteps), kStepUnit)),
          left_rows(std::min(round_up(narrow() ? kNarrowLeftRows : kLeftRows, kRowUnit), rows())),
          // Rows a power of two apart would fall into few sets of the cache.
          left_stride(round_up(steps, kLanes) + kPanel),
          right(arena.take(panels() * steps * kPanel)),
          left(arena.take(round_up(left_rows, std::max<int64_t>(kRowUnit, kLanes)) * left_stride)),
          sums(arena.take(panels() * round_up(rows(), kRowUnit) * kPanel)) {}

    void run() {
        [[maybe_unused]] const TileUnitFor<T> unit;
        multiply_factors(p.factors(), true);
        if constexpr (!kQuantized) {
            if (p.update) multiply_factors(*p.update, false);
        }
        if (p.out_matrix.transposed) {
            store_transposed();
        } else {
            store_rows();
        }
    }

  private:
    using Step = StepOf<T>;
    // Matrix units take so many steps, and rows, together: what a chunk's last ones lack is zeros, or is not stored.
    static constexpr int64_t kStepUnit = kInTiles<T> ? kLanes : 1, kRowUnit = kInTiles<T> ? 2 * kLanes : 1;

    const Product& p;
    const Block& block;
    const int64_t steps, left_rows, left_stride;
    float *const right, *const left, *const sums;

    bool narrow() const { return columns() <= kPanel; }
    int64_t rows() const { return block.row_end - block.row_begin; }
    int64_t columns() const { return block.column_end - block.column_begin; }
    int64_t panels() const { return (columns() + kPanel - 1) / kPanel; }
    float* sums_of(int64_t panel) const { return sums + panel * round_up(rows(), kRowUnit) * kPanel; }

    // Sums of a first pair begin with it.
    void multiply_factors(const Factors& factors, bool first) {
        for (int64_t element = 0; element == 0 || element < factors.steps; element += steps * Step::kElements) {
            const Range chunk{element, std::min(element + steps * Step::kElements, factors.steps)};
            const bool replaces = first && element == 0;
            pack_right(factors, chunk);
            for (int64_t row = 0; row < rows(); row += left_rows) {
                const int64_t count = std::min(left_rows, rows() - row);
                pack_left(factors, {block.row_begin + row, block.row_begin + row + count}, chunk);
                for (int64_t panel = 0; panel < panels(); ++panel) {
                    multiply_panel(count, chunk.size(), replaces, panel, sums_of(panel) + row * kPanel);
                }
            }
        }
    }

    void pack_right(const Factors& factors, Range chunk) {
        const Stored<T> from{static_cast<const T*>(factors.right), factors.right_rows};
        for (int64_t panel = 0; panel < panels(); ++panel) {
            const int64_t first = block.column_begin + panel * kPanel;
            const Range its_columns{first, std::min(first + kPanel, block.column_end)};
            float* to = right + panel * steps * kPanel;
            if (p.right_matrix.transposed) {
                transpose_panel<Step>(from, its_columns, chunk, to);
            } else {
                copy_panel<Step>(from, its_columns, chunk, to);
            }
            const int64_t size = in_steps<Step>(chunk.size());
            std::fill(to + size * kPanel, to + round_up(size, kStepUnit) * kPanel, 0.0f);
        }
    }

    void pack_left(const Factors& factors, Range its_rows, Range chunk) {
        if constexpr (kQuantized) {
            dequantize_left<Step>(*p.quantized, p.steps, its_rows, chunk, left, left_stride);
        } else {
            const Stored<T> from{static_cast<const T*>(factors.left), factors.left_rows};
            if (p.left_matrix.transposed) {
                transpose_left<Step>(from, its_rows, chunk, left, left_stride);
            } else {
                copy_left<Step>(from, its_rows, chunk, left, left_stride);
            }
        }
    }

    // All left rows with one panel. Of a panel whose columns fill one vector only, that one is multiplied.
    void multiply_panel(int64_t count, int64_t elements, bool replaces, int64_t panel, float* out) const {
        const float* from = right + panel * steps * kPanel;
        const auto multiply_vectors = [&](auto vectors) {
            if constexpr (kInTiles<T>) {
                this->template multiply_in_tiles<vectors>(count, elements, replaces, from, out);
            } else {
                multiply_rows<vectors>(count, elements, replaces, from, out);
            }
        };
        if (columns() - panel * kPanel <= kLanes) {
            multiply_vectors(std::integral_constant<int, 1>{});
        } else {
            multiply_vectors(std::integral_constant<int, kPanelVectors>{});
        }
    }

#ifdef NEARPEAK_HAS_TILES
    template <int kVectors>
    void multiply_in_tiles(int64_t count, int64_t elements, bool replaces, const float* panel, float* out) const {
        const auto pairs = [](const float* at) { return reinterpret_cast<const bfloat16*>(at); };
        const int64_t size = in_steps<Step>(elements);
        finish_stores();
        for (int64_t row = 0; row < count; row += kRowUnit) {
            const float* from = left + row * left_stride;
            float* const at = out + row * kPanel;
            if (replaces) {
                zero_all_sums();
            } else {
                load_all_sums(at, kPanel);
            }
            for (int64_t step = 0; step < size; step += kStepUnit) {
                multiply_step<kVectors>(pairs(from + step), 2 * left_stride, panel + step * kPanel);
            }
            store_all_sums(at, kPanel);
        }
    }
#endif

    template <int kVectors>
    void multiply_rows(int64_t count, int64_t elements, bool replaces, const float* panel, float* out) const {
        constexpr int kRows = kTile * kPanelVectors / kVectors;
        int64_t row = 0;
        const auto multiply_from = [&](auto rows) {
            multiply<rows, kVectors>(row, elements, replaces, panel, out + row * kPanel);
        };
        for (; row + kRows <= count; row += kRows) multiply_from(std::integral_constant<int, kRows>{});
        for (; row < count; row += kTile) with_count(std::min<int64_t>(kTile, count - row), multiply_from);
    }

    // Chains need not be short where the result is rounded to 16 bits.
    template <int kRows, int kVectors>
    void multiply(int64_t row, int64_t elements, bool replaces, const float* panel, float* out) const {
        const int64_t chain = std::is_same_v<T, float> ? kChain : steps;
        const float* from = left + row * left_stride;
        const int64_t size = in_steps<Step>(elements);
        for (int64_t step = 0; step == 0 || step < size; step += chain) {
            const RowWise<kRows> rows(from + step, left_stride);
            const float* at = panel + step * kPanel;
            const int64_t count = std::min(chain, size - step);
            if (replaces && step == 0) {
                multiply_tile<kRows, kVectors, Step>(rows, at, kPanel, count, out, kPanel, kReplace);
            } else {
                multiply_tile<kRows, kVectors, Step>(rows, at, kPanel, count, out, kPanel, kAdd);
            }
        }
    }

    T* out_row(int64_t row) const { return static_cast<T*>(p.out) + p.out_matrix.rows(row); }

    void store_rows() const {
        for (int64_t row = 0; row < rows(); ++row) {
            T* to = out_row(block.row_begin + row) + block.column_begin;
            for_each_vector(columns(), [&](int64_t column, auto lanes, int) {
                store(to + column, load(sums_of(column / kPanel) + row * kPanel + column % kPanel) * p.scale, lanes);
            });
        }
    }

    void store_transposed() const {
        for (int64_t panel = 0; panel < panels(); ++panel) {
            const int64_t first = block.column_begin + panel * kPanel;
            store_panel_transposed<T>(p, sums_of(panel), {block.row_begin, block.row_end},
                                      {first, std::min(first + kPanel, block.column_end)});
        }
    }
};

}  // namespace nearpeak::linear::NEARPEAK_ISA
