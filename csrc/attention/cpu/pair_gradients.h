// The five matrix products of backward in bfloat16, with dot products of pairs: as in vector_gradients.h, where a step
// is now a pair, along whatever is summed:
//
//     scores   = Q K^T             d_scores  = dOut V^T      pairs of dimensions
//     d_value += P^T dOut          d_key    += dScore^T Q    pairs of rows
//     d_query += dScore K                                    pairs of keys
#pragma once

#include <algorithm>

#include "../../cpu/arena.h"
#include "backward_view.h"
#include "pair_weights.h"

namespace nearpeak::attention::NEARPEAK_ISA {

class PairGradients {
  public:
    static constexpr int64_t kRows = kBlockRows;
    static constexpr bool kScoresAreScaled = true, kSumsAreTransposed = false;

    PairGradients(const BackwardView& its_view, Arena& arena)
        : view(its_view),
          p(its_view.p),
          query(p.head_dim, arena),
          grad_out(p.value_dim, arena),
          key_columns(arena.take(kBlockKeys * query.dim_pairs)),
          value_columns(arena.take(kBlockKeys * grad_out.dim_pairs)),
          key_pairs(arena.take(kBlockKeys / 2 * in_panels(p.head_dim))),
          pairs(kBlockRows, kTile, arena) {
        static_assert(kBlockRows % (2 * kTile) == 0 && kBlockKeys % kTile == 0 && kBlockKeys % kPanel == 0);
    }

    void load_keys() {
        for (int64_t k = 0; k < view.keys; k += kLanes) {
            transpose_block(k, p.head_dim, key_columns, [&](int64_t row) { return view.key<bfloat16>(row); });
            transpose_block(k, p.value_dim, value_columns, [&](int64_t row) { return view.value<bfloat16>(row); });
        }
        const auto key_of = [&](int64_t k) { return k < view.keys ? view.key<bfloat16>(k) : nullptr; };
        for (int64_t k = 0; k < kBlockKeys; k += 2) {
            for (int64_t d = 0; d < in_panels(p.head_dim); d += kLanes) {
                store(key_pairs + d / kPanel * (kBlockKeys / 2 * kPanel) + k / 2 * kPanel + d % kPanel,
                      pair(load_some_bits(key_of(k), d, p.head_dim), load_some_bits(key_of(k + 1), d, p.head_dim)));
            }
        }
    }

    void load_rows() {
        query.load(view.rows, [&](int64_t row) { return view.query<bfloat16>(row); });
        grad_out.load(view.rows, [&](int64_t row) { return view.grad_out<bfloat16>(row); });
    }

    void multiply_keys(float* scores, float* d_scores_of_rows) const {
        const float factor = score_factor(p);
        for (int64_t k = 0; k < view.keys; k += kPanel) {
            const RowRange seen = view.rows_that_see(k, k + kPanel);
            multiply_panel(query, key_columns, k, seen, scores, [&](Float, Float sums, int) { return sums * factor; });
            multiply_panel(grad_out, value_columns, k, seen, d_scores_of_rows, kReplace);
        }
    }

    void load_weights(const float* of_rows, const float* gradients_of_rows) {
        pairs.load(view.rows, of_rows, gradients_of_rows);
    }

    void add_to_values(float* d_value) const { add_to_keys(pairs.weights, grad_out, in_panels(p.value_dim), d_value); }
    void add_to_keys(float* d_key) const { add_to_keys(pairs.d_scores, query, in_panels(p.head_dim), d_key); }

    // d_query[row][d] += sum over keys of dScore[row][key] * key[key][d]
    void add_to_rows(float* d_query) const {
        for (int64_t d = 0; d < in_panels(p.head_dim); d += kPanel) {
            for (int64_t row = 0; row < view.rows; row += kTile) {
                const KeyRange seen = view.keys_seen_by(row, row + kTile);
                const int64_t begin = seen.begin / 2, end = (seen.end + 1) / 2;
                multiply_tile<kTile, kPanelVectors, Pairs>(
                    RowWise<kTile, bfloat16>(pairs.d_score_rows + row * PairWeights::kRowStride + 2 * begin,
                                             PairWeights::kRowStride),
                    key_pairs + d * (kBlockKeys / 2) + begin * kPanel, kPanel, end - begin,
                    d_query + row * p.padded_dim() + d, p.padded_dim(), kAdd);
            }
        }
    }

  private:
    // A block of rows of query or of dOut: as they are, padded to whole pairs of dimensions, and as pairs of rows.
    struct Rows {
        Rows(int64_t its_dim, Arena& arena)
            : dim(its_dim),
              dim_pairs((dim + 1) / 2),
              stride(2 * spread(dim_pairs)),
              pair_stride(spread(in_panels(dim))),
              rows(arena.take<bfloat16>(kBlockRows * stride)),
              pairs(arena.take(kBlockRows / 2 * pair_stride)) {}

        template <class Row>
        void load(int64_t count, Row row_of) {
            for (int64_t row = 0; row < count; row += 2) {
                const bfloat16* first = row_of(row);
                const bfloat16* second = row + 1 < count ? row_of(row + 1) : nullptr;
                for (int64_t d = 0; d < in_panels(dim); d += kLanes) {
                    store(pairs + row / 2 * pair_stride + d,
                          pair(load_some_bits(first, d, dim), load_some_bits(second, d, dim)));
                }
                for (int64_t d = 0; d < stride; d += 2 * kLanes) {
                    store(reinterpret_cast<float*>(rows + row * stride + d), load_some_pairs(first, d, dim));
                    store(reinterpret_cast<float*>(rows + (row + 1) * stride + d), load_some_pairs(second, d, dim));
                }
            }
        }

        const int64_t dim, dim_pairs;
        const int64_t stride, pair_stride;  // elements from one row, floats from one pair of rows to the next
        bfloat16* const rows;
        float* const pairs;
    };

    const BackwardView& view;
    const Backward& p;
    Rows query, grad_out;
    float *const key_columns, *const value_columns;  // panels of kPanel keys, pairs of dimensions
    float* const key_pairs;                          // panels of kPanel dimensions, pairs of keys
    PairWeights pairs;

    template <class Row>
    void transpose_block(int64_t k, int64_t dim, float* columns, Row row) {
        const int64_t dim_pairs = (dim + 1) / 2;
        transpose_pairs(lanes_of<bfloat16>(k, view.keys, row), dim,
                        columns + k / kPanel * (dim_pairs * kPanel) + k % kPanel);
    }

    // out[row][key] of the rows that see a key of the panel that begins with key k.
    template <class Combine>
    static void multiply_panel(const Rows& left, const float* columns, int64_t k, RowRange seen, float* out,
                               Combine combine) {
        for (int64_t row = seen.begin / kTile * kTile; row < seen.end; row += kTile) {
            multiply_tile<kTile, kPanelVectors, Pairs>(
                RowWise<kTile, bfloat16>(left.rows + row * left.stride, left.stride), columns + k * left.dim_pairs,
                kPanel, left.dim_pairs, out + row * kScoreStride + k, kScoreStride, combine);
        }
    }

    // sums[key][d] += sum over rows of left[row][key] * right[row][d]
    void add_to_keys(const float* left, const Rows& right, int64_t width, float* sums) const {
        for (int64_t k = 0; k < view.keys; k += kTile) {
            const RowRange seen = view.rows_that_see(k, k + kTile);
            const int64_t begin = seen.begin / 2, end = (seen.end + 1) / 2;
            for (int64_t d = 0; begin < end && d < width; d += kPanel) {
                multiply_tile<kTile, kPanelVectors, Pairs>(ColumnWise{left + begin * kScoreStride + k, kScoreStride},
                                                           right.pairs + begin * right.pair_stride + d,
                                                           right.pair_stride, end - begin, sums + k * width + d, width,
                                                           kAdd);
            }
        }
    }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
