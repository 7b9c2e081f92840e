// The five matrix products of backward, with vector multiply-adds in float32. Keys lie across the lanes:
//
//     scores   = Q K^T             d_scores  = dOut V^T      (rows x keys)    right: K^T and V^T, transposed per task
//     d_value += P^T dOut          d_key    += dScore^T Q    (keys x dims)    right: rows as they are
//     d_query += dScore K          (rows x dims)                              right: K as it is
//
// so that nothing is transposed in the loop.
#pragma once

#include <algorithm>

#include "../../cpu/arena.h"
#include "backward_view.h"

namespace nearpeak::attention::NEARPEAK_ISA {

template <class T>
class VectorGradients {
  public:
    static constexpr int64_t kRows = kBlockRows;  // of a block
    // Whether multiply_keys scales, and whether the sums for keys and values lie with dimensions as their rows.
    static constexpr bool kScoresAreScaled = true, kSumsAreTransposed = false;

    VectorGradients(const BackwardView& its_view, Arena& arena)
        : view(its_view),
          p(its_view.p),
          width(in_panels(p.head_dim)),
          value_width(in_panels(p.value_dim)),
          row_stride(spread(width)),
          value_row_stride(spread(value_width)),
          key_columns(arena.take(kBlockKeys * p.head_dim)),
          value_columns(arena.take(kBlockKeys * p.value_dim)),
          key_panels(arena.take(kBlockKeys * width)),
          query(arena.take(kBlockRows * row_stride)),
          scaled_query(arena.take(kBlockRows * row_stride)),
          grad_out(arena.take(kBlockRows * value_row_stride)) {
        static_assert(kBlockRows % kTile == 0 && kBlockKeys % kTile == 0 && kBlockKeys % kPanel == 0);
    }

    void load_keys() {
        for (int64_t k = 0; k < view.keys; k += kLanes) {
            transpose_block(k, p.head_dim, key_columns, [&](int64_t row) { return view.key<T>(row); });
            transpose_block(k, p.value_dim, value_columns, [&](int64_t row) { return view.value<T>(row); });
        }
        std::fill_n(key_panels, kBlockKeys * width, 0.0f);
        for (int64_t k = 0; k < view.keys; ++k) {
            const T* from = view.key<T>(k);
            for_each_vector(p.head_dim, [&](int64_t d, auto lanes, int) {
                store(key_panels + d / kPanel * (kBlockKeys * kPanel) + k * kPanel + d % kPanel, load(from + d, lanes));
            });
        }
        for (float* rows : {query, scaled_query}) std::fill_n(rows, kBlockRows * row_stride, 0.0f);
        std::fill_n(grad_out, kBlockRows * value_row_stride, 0.0f);
    }

    void load_rows() {
        const float factor = score_factor(p);
        for (int64_t row = 0; row < view.rows; ++row) {
            const T* q = view.query<T>(row);
            const T* g = view.grad_out<T>(row);
            for_each_vector(p.head_dim, [&](int64_t d, auto lanes, int) {
                const Float elements = load(q + d, lanes);
                store(query + row * row_stride + d, elements);
                store(scaled_query + row * row_stride + d, elements * factor);
            });
            for_each_vector(p.value_dim, [&](int64_t d, auto lanes, int) {
                store(grad_out + row * value_row_stride + d, load(g + d, lanes));
            });
        }
    }

    void multiply_keys(float* scores, float* d_scores) const {
        for (int64_t k = 0; k < view.keys; k += kPanel) {
            const RowRange seen = view.rows_that_see(k, k + kPanel);
            for (int64_t row = seen.begin / kTile * kTile; row < seen.end; row += kTile) {
                multiply_rows<kTile>(scaled_query + row * row_stride, row_stride, key_columns + k * p.head_dim,
                                     p.head_dim, scores + row * kScoreStride + k, kScoreStride);
            }
            for (int64_t row = seen.begin / kTile * kTile; row < seen.end; row += kTile) {
                multiply_rows<kTile>(grad_out + row * value_row_stride, value_row_stride,
                                     value_columns + k * p.value_dim, p.value_dim, d_scores + row * kScoreStride + k,
                                     kScoreStride);
            }
        }
    }

    // Takes P and dScore, which have zeros where a row may not look.
    void load_weights(const float* weights, const float* gradients) {
        scores = weights;
        d_scores = gradients;
    }

    void add_to_values(float* d_value) const { add_to_keys(scores, grad_out, value_row_stride, d_value, value_width); }
    void add_to_keys(float* d_key) const { add_to_keys(d_scores, query, row_stride, d_key, width); }

    // d_query[row][d] += sum over keys of d_scores[row][key] * key[key][d]
    void add_to_rows(float* d_query) const {
        KeyRange seen[kBlockRows / kTile];
        for (int64_t row = 0; row < view.rows; row += kTile) seen[row / kTile] = view.keys_seen_by(row, row + kTile);
        for (int64_t d = 0; d < width; d += kPanel) {
            for (int64_t row = 0; row < view.rows; row += kTile) {
                const auto [begin, end] = seen[row / kTile];
                multiply_tile<kTile>(RowWise<kTile>(d_scores + row * kScoreStride + begin, kScoreStride),
                                     key_panels + d * kBlockKeys + begin * kPanel, kPanel, end - begin,
                                     d_query + row * p.padded_dim() + d, p.padded_dim(), kAdd);
            }
        }
    }

  private:
    static constexpr int64_t kShortChain = 16;

    const BackwardView& view;
    const Backward& p;
    const int64_t width, value_width;            // a row's elements, in whole panels: of query and key, of value
    const int64_t row_stride, value_row_stride;  // and from one row to the next
    float *const key_columns, *const value_columns, *const key_panels;  // all panels of kPanel columns
    float *const query, *const scaled_query;                            // kBlockRows x row_stride
    float* const grad_out;                                              // kBlockRows x value_row_stride
    const float *scores = nullptr, *d_scores = nullptr;

    template <class Row>
    void transpose_block(int64_t k, int64_t dim, float* columns, Row row) {
        lanes_of<T>(k, view.keys, row).transpose_to(dim, 1.0f, columns + k / kPanel * (dim * kPanel) + k % kPanel);
    }

    // sums[key][d] += sum over rows of left[row][key] * right[row][d]
    void add_to_keys(const float* left, const float* right, int64_t right_stride, float* sums,
                     int64_t sums_width) const {
        RowRange seen[kBlockKeys / kTile];
        for (int64_t k = 0; k < view.keys; k += kTile) seen[k / kTile] = view.rows_that_see(k, k + kTile);
        // Few rows are not summed in one chain: the plain layer sums each head alone, and rounds less.
        const int64_t chain = p.rows(view.task.sequence) <= kBlockRows ? kShortChain : kBlockRows;
        for (int64_t d = 0; d < sums_width; d += kPanel) {
            for (int64_t k = 0; k < view.keys; k += kTile) {
                const auto [first, last] = seen[k / kTile];
                for (int64_t begin = first; begin < last; begin += chain) {
                    multiply_tile<kTile>(ColumnWise{left + begin * kScoreStride + k, kScoreStride},
                                         right + begin * right_stride + d, right_stride, std::min(chain, last - begin),
                                         sums + k * sums_width + d, sums_width, kAdd);
                }
            }
        }
    }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
