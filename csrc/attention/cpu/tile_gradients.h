// The five matrix products of backward in bfloat16, with matrix units (tiles.h). All but the sums for query are as in
// pair_gradients.h; the sums for keys and values are transposed, so that what changes with every block, P and dScore,
// is never transposed, but in pairs of rows a right factor as it is:
//
//     scores    = Q K^T             d_scores   = dOut V^T    left: rows as they are,  right: pairs of dimensions
//     d_value^T += dOut^T P         d_key^T   += Q^T dScore  left: rows transposed,   right: pairs of rows
//     d_query   += dScore K                                  left: rows as they are,  right: pairs of keys
#pragma once

#include "../../cpu/arena.h"
#include "../../cpu/tiles.h"

#ifdef NEARPEAK_HAS_TILES
#include <algorithm>

#include "backward_view.h"
#include "pair_weights.h"

namespace nearpeak::attention::NEARPEAK_ISA {

class TileGradients {
  public:
    // Rows of a block: the sums over them are loaded and stored once a block, which costs as much as some products.
    static constexpr int64_t kRows = 2 * kBlockRows;
    static constexpr bool kScoresAreScaled = false, kSumsAreTransposed = true;

    TileGradients(const BackwardView& its_view, Arena& arena)
        : view(its_view),
          p(its_view.p),
          query(p.head_dim, arena),
          grad_out(p.value_dim, arena),
          key_columns(arena.take<bfloat16>(kBlockKeys * query.width)),
          value_columns(arena.take<bfloat16>(kBlockKeys * grad_out.width)),
          key_pairs(arena.take<bfloat16>(kBlockKeys * query.width)),
          pairs(kRows, kStep, arena) {
        static_assert(kBlockRows % kStep == 0 && kBlockKeys % kStep == 0 && kPanel == kStep);
    }

    void load_keys() {
        for (int64_t k = 0; k < in_steps(view.keys); k += kTileRows) {
            load_columns(k, query.width, p.head_dim, key_columns, [&](int64_t row) { return view.key<bfloat16>(row); });
            load_columns(k, grad_out.width, p.value_dim, value_columns,
                         [&](int64_t row) { return view.value<bfloat16>(row); });
        }
        const auto bits_of = [&](int64_t k, int64_t d) {
            return load_some_bits(k < view.keys ? view.key<bfloat16>(k) : nullptr, d, p.head_dim);
        };
        for (int64_t k = 0; k < in_steps(view.keys); k += kTileDepth) {
            for (int64_t d = 0; d < query.width; d += kTileRows) {
                Float block[kLanes];
                for (int64_t i = 0; i < kLanes; ++i) block[i] = pair(bits_of(k + 2 * i, d), bits_of(k + 2 * i + 1, d));
                store_factor(pairs_of_keys(k, d), block);
            }
        }
    }

    void load_rows() {
        query.load(view.rows, [&](int64_t row) { return view.query<bfloat16>(row); });
        grad_out.load(view.rows, [&](int64_t row) { return view.grad_out<bfloat16>(row); });
    }

    void multiply_keys(float* scores, float* d_scores) const {
        finish_stores();
        for (int64_t k = 0; k < view.keys; k += kStep) {
            const RowRange seen = view.rows_that_see(k, k + kStep);
            for (int64_t row = seen.begin / kStep * kStep; row < seen.end; row += kStep) {
                multiply_columns(query, key_columns, row, k, scores);
                multiply_columns(grad_out, value_columns, row, k, d_scores);
            }
        }
    }

    void load_weights(const float* of_rows, const float* gradients_of_rows) {
        pairs.load(view.rows, of_rows, gradients_of_rows);
        finish_stores();
    }

    void add_to_values(float* d_value) const { add_to_keys(grad_out, pairs.weights, d_value); }
    void add_to_keys(float* d_key) const { add_to_keys(query, pairs.d_scores, d_key); }

    // d_query[row][d] += sum over keys of dScore[row][key] * key[key][d]
    void add_to_rows(float* d_query) const {
        constexpr int64_t kStride = PairWeights::kRowStride;
        for (int64_t row = 0; row < view.rows; row += kStep) {
            const auto [begin, end] = view.keys_seen_by(row, row + kStep);
            if (begin == end) continue;
            const bfloat16* const left = pairs.d_score_rows + row * kStride;
            for (int64_t d = 0; d < query.width; d += kStep) {
                float* const sums = d_query + row * p.padded_dim() + d;
                load_all_sums(sums, p.padded_dim());
                for (int64_t k = begin / kStep * kStep; k < end; k += kStep) {
                    load_left<0>(left + k, kStride * 2);
                    load_left<1>(left + kTileRows * kStride + k, kStride * 2);
                    load_right<0>(pairs_of_keys(k, d), kTileRowBytes);
                    load_right<1>(pairs_of_keys(k, d + kTileRows), kTileRowBytes);
                    multiply_all_tiles();
                }
                store_all_sums(sums, p.padded_dim());
            }
        }
    }

  private:
    static constexpr int64_t kStep = 2 * kTileRows;  // of rows, of keys, and of dimensions

    static int64_t in_steps(int64_t count) { return (count + kStep - 1) / kStep * kStep; }

    // A block of rows of query or of dOut, in whole steps with zeros: as they are, and transposed.
    struct Rows {
        Rows(int64_t its_dim, Arena& arena)
            : dim(its_dim),
              width(in_steps(dim)),
              stride(2 * spread(width / 2)),
              rows(arena.take<bfloat16>(kRows * stride)),
              transposed(arena.take<bfloat16>(kRows * width)) {}

        template <class Row>
        void load(int64_t count, Row row_of) {
            for (int64_t row = 0; row < in_steps(count); ++row) {
                const bfloat16* from = row < count ? row_of(row) : nullptr;
                for (int64_t d = 0; d < width; d += kTileDepth) {
                    store(reinterpret_cast<float*>(rows + row * stride + d), load_some_pairs(from, d, dim));
                }
            }
            for (int64_t row = 0; row < in_steps(count); row += kTileDepth) {
                for (int64_t d = 0; d < width; d += kTileRows) transpose_factor(row, d);
            }
        }

        // 16 dimensions x 32 rows.
        bfloat16* factor(int64_t d, int64_t row) const {
            return transposed + (d / kTileRows * (kRows / kTileDepth) + row / kTileDepth) * kTileElements;
        }

        void transpose_factor(int64_t row, int64_t d) {
            Float block[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                const bfloat16* first = rows + (row + 2 * i) * stride + d;
                block[i] = pair(load_bits(first), load_bits(first + stride));
            }
            transpose(block);
            store_factor(factor(d, row), block);
        }

        const int64_t dim, width;
        const int64_t stride;  // elements from one row to the next
        bfloat16 *const rows, *const transposed;
    };

    const BackwardView& view;
    const Backward& p;
    TileUnit unit;
    Rows query, grad_out;
    bfloat16 *const key_columns, *const value_columns;  // 32 dimensions x 16 keys, all dimensions of some keys together
    bfloat16* const key_pairs;                          // 32 keys x 16 dimensions, all dimensions of some keys together
    PairWeights pairs;

    static bfloat16* columns_factor(bfloat16* columns, int64_t width, int64_t k, int64_t d) {
        return columns + (k / kTileRows * (width / kTileDepth) + d / kTileDepth) * kTileElements;
    }
    bfloat16* pairs_of_keys(int64_t k, int64_t d) const {
        return key_pairs + (k / kTileDepth * (query.width / kTileRows) + d / kTileRows) * kTileElements;
    }

    template <class Row>
    void load_columns(int64_t k, int64_t width, int64_t dim, bfloat16* columns, Row row_of) {
        const auto lanes = lanes_of<bfloat16>(k, view.keys, row_of);
        for (int64_t d = 0; d < width; d += kTileDepth) {
            Float block[kLanes];
            load_transposed_pairs(lanes, d, dim, block);
            store_factor(columns_factor(columns, width, k, d), block);
        }
    }

    // out[row][key] of a step of rows and a step of keys.
    static void multiply_columns(const Rows& left, bfloat16* columns, int64_t row, int64_t k, float* out) {
        const bfloat16* const rows = left.rows + row * left.stride;
        zero_all_sums();
        for (int64_t d = 0; d < left.width; d += kTileDepth) {
            load_left<0>(rows + d, left.stride * 2);
            load_left<1>(rows + kTileRows * left.stride + d, left.stride * 2);
            load_right<0>(columns_factor(columns, left.width, k, d), kTileRowBytes);
            load_right<1>(columns_factor(columns, left.width, k + kTileRows, d), kTileRowBytes);
            multiply_all_tiles();
        }
        store_all_sums(out + row * kScoreStride + k, kScoreStride);
    }

    // sums[d][key] += sum over rows of left[row][d] * right[row][key]
    void add_to_keys(const Rows& left, const float* right, float* sums) const {
        for (int64_t k = 0; k < view.keys; k += kStep) {
            const RowRange seen = view.rows_that_see(k, k + kStep);
            if (seen.begin == seen.end) continue;
            for (int64_t d = 0; d < left.width; d += kStep) {
                float* const at = sums + d * kScoreStride + k;
                load_all_sums(at, kScoreStride);
                for (int64_t row = seen.begin / kStep * kStep; row < seen.end; row += kStep) {
                    const auto* factor = reinterpret_cast<const bfloat16*>(right + row / 2 * kScoreStride + k);
                    load_left<0>(left.factor(d, row), kTileRowBytes);
                    load_left<1>(left.factor(d + kTileRows, row), kTileRowBytes);
                    load_right<0>(factor, kScoreStride * 4);
                    load_right<1>(factor + kTileDepth, kScoreStride * 4);
                    multiply_all_tiles();
                }
                store_all_sums(at, kScoreStride);
            }
        }
    }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
#endif
