// Gradients of attention. With P = 2^(score - lse), which is recomputed, and delta = rowsum(P dP):
//
//     dP = dOut V^T      dScore = P (dP - delta + dLse)
//     dV = P^T dOut      dQ = scale dScore K      dK = scale dScore^T Q
//
// With dropout, dP is multiplied by what P was, and dV is of P so multiplied.
//
// A task holds a block of keys and walks the blocks of rows that see it. Keys lie across the lanes:
//
//     scores   = Q K^T             d_scores  = dOut V^T      (rows x keys)    right: K^T and V^T, transposed per task
//     d_value += P^T dOut          d_key    += dScore^T Q    (keys x dims)    right: rows as they are
//     d_query += dScore K          (rows x dims)                              right: K as it is
//
// so that nothing is transposed in the loop. Five products: dQ is summed over the tasks of all keys, in turn (turn.h),
// where a second pass for it would need seven. It comes last, so that a task waits for another's fifth product only.
#pragma once

#include <algorithm>

#include "../../cpu/arena.h"
#include "../../cpu/math.h"
#include "dropout.h"
#include "mask.h"
#include "panel.h"
#include "score_terms.h"

namespace nearpeak::attention::NEARPEAK_ISA {

template <class T>
class BackwardBlock {
  public:
    BackwardBlock(const Backward& parameters, const Task& this_task, Arena& arena)
        : p(parameters),
          task(this_task),
          keys(task.key_end - task.key_begin),
          width(in_panels(p.head_dim)),
          value_width(in_panels(p.value_dim)),
          row_stride(spread(width)),
          value_row_stride(spread(value_width)),
          key_columns(arena.take(kBlockKeys * p.head_dim)),
          value_columns(arena.take(kBlockKeys * p.value_dim)),
          key_panels(arena.take(kBlockKeys * width)),
          query(arena.take(kBlockRows * row_stride)),
          scaled_query(arena.take(kBlockRows * row_stride)),
          grad_out(arena.take(kBlockRows * value_row_stride)),
          scores(arena.take(kBlockRows * kScoreStride)),
          d_scores(arena.take(kBlockRows * kScoreStride)),
          d_key(arena.take(kBlockKeys * width)),
          d_value(arena.take(kBlockKeys * value_width)),
          bias_sums(sums_rows_of_bias() ? arena.take(p.group() * kBlockKeys) : nullptr) {
        static_assert(kBlockRows % kTile == 0 && kBlockKeys % kTile == 0 && kBlockKeys % kPanel == 0);
    }

    void run(const Turn* before, Turn* own) {
        load_keys();
        std::fill_n(d_key, kBlockKeys * width, 0.0f);
        std::fill_n(d_value, kBlockKeys * value_width, 0.0f);
        for (float* rows : {query, scaled_query}) std::fill_n(rows, kBlockRows * row_stride, 0.0f);
        std::fill_n(grad_out, kBlockRows * value_row_stride, 0.0f);
        for (first_row = task.row_begin; first_row < task.row_end; first_row += kBlockRows) {
            rows = std::min(kBlockRows, task.row_end - first_row);
            load_rows();
            multiply_keys();
            differentiate();
            add_to_keys(scores, grad_out, value_row_stride, d_value, value_width);
            add_to_keys(d_scores, query, row_stride, d_key, width);
            if (before) before->wait_for(first_row + rows);
            add_to_rows();
            own->finish(first_row + rows);
        }
        store_keys(static_cast<T*>(p.d_key), p.d_key_strides, p.head_dim, d_key, width, p.scale);
        store_keys(static_cast<T*>(p.d_value), p.d_value_strides, p.value_dim, d_value, value_width, 1.0f);
    }

  private:
    static constexpr int64_t kLine = 16;  // floats of a cache line
    static constexpr int64_t kShortChain = 16;
    static constexpr int64_t kScoreStride = kBlockKeys + kLine;

    const Backward& p;
    const Task& task;
    const int64_t keys;
    static int64_t in_panels(int64_t dim) { return (dim + kPanel - 1) / kPanel * kPanel; }
    // An odd number of cache lines from one row to the next spreads rows over all sets of a cache.
    static int64_t spread(int64_t row) { return ((row + kLine - 1) / kLine | 1) * kLine; }

    const int64_t width, value_width;            // a row's elements, in whole panels: of query and key, of value
    const int64_t row_stride, value_row_stride;  // and from one row to the next
    float *const key_columns, *const value_columns, *const key_panels;  // all panels of kPanel columns
    float *const query, *const scaled_query;                            // kBlockRows x row_stride
    float* const grad_out;                                              // kBlockRows x value_row_stride
    float *const scores, *const d_scores;                               // kBlockRows x kBlockKeys
    float *const d_key, *const d_value;                                 // kBlockKeys x width, x value_width
    float* const bias_sums;                                             // group x kBlockKeys, or null
    int64_t first_row = 0, rows = 0;

    // One bias for all positions: its gradient sums all rows, block by block, since short sums round less.
    bool sums_rows_of_bias() const { return p.d_bias && p.d_bias_strides.position == 0; }

    void load_keys() {
        const T* key = key_rows<T>(p, task);
        const T* value = value_rows<T>(p, task);
        for (int64_t k = 0; k < keys; k += kLanes) {
            transpose_block(key, p.key_strides.position, k, p.head_dim, key_columns);
            transpose_block(value, p.value_strides.position, k, p.value_dim, value_columns);
        }
        std::fill_n(key_panels, kBlockKeys * width, 0.0f);
        for (int64_t k = 0; k < keys; ++k) {
            const T* from = key + (task.key_begin + k) * p.key_strides.position;
            for_each_vector(p.head_dim, [&](int64_t d, auto lanes, int) {
                store(key_panels + d / kPanel * (kBlockKeys * kPanel) + k * kPanel + d % kPanel, load(from + d, lanes));
            });
        }
    }

    void transpose_block(const T* from, int64_t stride, int64_t k, int64_t dim, float* columns) {
        lanes_of<T>(k, keys, [&](int64_t row) {
            return from + (task.key_begin + row) * stride;
        }).transpose_to(dim, 1.0f, columns + k / kPanel * (dim * kPanel) + k % kPanel);
    }

    void load_rows() {
        const float factor = score_factor(p);
        for (int64_t row = 0; row < rows; ++row) {
            const T* q = query_row<T>(p, task, first_row + row);
            const T* g = row_in(static_cast<const T*>(p.grad_out), p.grad_out_strides, p, task, first_row + row);
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

    // Rows of the block, from its first, that may look at one of the block's keys [begin, end).
    RowRange rows_that_see(int64_t begin, int64_t end) const {
        const RowRange all =
            allowed_rows(p, task.sequence, task.key_begin + begin, task.key_begin + std::min(end, keys));
        return {std::clamp<int64_t>(all.begin - first_row, 0, rows), std::clamp<int64_t>(all.end - first_row, 0, rows)};
    }

    // Keys of the block, from its first, that one of the block's rows [begin, end) may look at.
    KeyRange keys_seen_by(int64_t begin, int64_t end) const {
        const KeyRange all = allowed_keys(p, task.sequence, first_row + begin, first_row + std::min(end, rows));
        return {std::clamp<int64_t>(all.begin - task.key_begin, 0, keys),
                std::clamp<int64_t>(all.end - task.key_begin, 0, keys)};
    }

    void multiply_keys() {
        for (int64_t k = 0; k < keys; k += kPanel) {
            const RowRange seen = rows_that_see(k, k + kPanel);
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

    // Turns scores into P, and dP into dScore; both become zero where a row may not look.
    void differentiate() {
        const RowStatistics* statistics = statistics_of(first_row);
        if (bias_sums) std::fill_n(bias_sums, p.group() * kBlockKeys, 0.0f);
        for (int64_t row = 0; row < rows; ++row) {
            float* const weights = scores + row * kScoreStride;
            float* const gradients = d_scores + row * kScoreStride;
            RowStatistics of_row = statistics[row];
            const KeyRange seen = keys_seen_by(row, row + 1);
            float slopes[kBlockKeys], kept[kBlockKeys];
            if (p.softcap > 0) cap(weights, slopes);
            if (p.has_terms()) add_terms(p, task, first_row + row, task.key_begin, task.key_end, weights);
            if (p.drops()) {
                dropout_factors(p, task, first_row + row, task.key_begin, task.key_begin + kBlockKeys, kept);
                multiply(gradients, kept);
            }
            if (std::is_same_v<T, float> && task.sequence.key_length <= (p.eager_elsewhere() ? kBlockKeys : kFewKeys)) {
                of_row.delta = delta_of(weights, gradients, of_row, seen);
            }
            if (seen.begin == 0 && seen.end == kBlockKeys) {
                differentiate_row<false>(weights, gradients, of_row, seen);
            } else {
                differentiate_row<true>(weights, gradients, of_row, seen);
            }
            if (p.drops()) multiply(weights, kept);
            if (bias_sums) {
                add(gradients, kBlockKeys, bias_sums + (first_row + row) % p.group() * kBlockKeys);
            } else if (p.d_bias) {
                add(gradients, keys, bias_gradient(first_row + row));
            }
            if (p.softcap > 0) multiply(gradients, slopes);
        }
        for (int64_t head = 0; bias_sums && head < p.group(); ++head) {
            add(bias_sums + head * kBlockKeys, keys, bias_gradient(head));
        }
        // The rest of the last tile of rows.
        const int64_t end = (rows + kTile - 1) / kTile * kTile;
        std::fill(d_scores + rows * kScoreStride, d_scores + end * kScoreStride, 0.0f);
    }

    // rowsum(P dP) as it is defined. With few keys, float32 gradients show how far rowsum(dOut out) is from it, whose
    // `out` was rounded: of 2 or 3 keys they erred 1.6 times as much as plain softmax's.
    static float delta_of(const float* logits, const float* gradients, const RowStatistics& of_row, KeyRange seen) {
        const Int begin = broadcast(static_cast<int32_t>(seen.begin)), end = broadcast(static_cast<int32_t>(seen.end));
        Int number = lane_numbers();
        Float sums = {};
        for (int64_t k = 0; k < kBlockKeys; k += kLanes, number += kLanes) {
            const Float weight = exp2(load(logits + k) - of_row.lse) * of_row.factor;
            const Int visible = (number >= begin) & (number < end);
            sums += select(visible, weight * load(gradients + k), Float{});
        }
        return sum(sums);
    }

    // dScore / P, before the softcap: the difference first, which is zero where a row sees one key.
    static Float difference(Float gradient, const RowStatistics& of_row) {
        return (gradient - of_row.delta) + of_row.grad_lse;
    }

    // score = softcap tanh(product / softcap), and its slope. A loop of its own: else the compiler fuses the last
    // multiplication with what follows, and the score is not the one that forward summed up.
    void cap(float* weights, float* slopes) const {
        for (int64_t k = 0; k < kBlockKeys; k += kLanes) {
            const auto [t, slope] = tanh_and_slope(load(weights + k) * before_cap(p));
            store(weights + k, t * after_cap(p));
            store(slopes + k, slope);
        }
    }

    static void multiply(float* row, const float* factors) {
        for (int64_t k = 0; k < kBlockKeys; k += kLanes) store(row + k, load(row + k) * load(factors + k));
    }

    float* bias_gradient(int64_t row) const {
        return row_in(p.d_bias, p.d_bias_strides, p, task, row) + task.sequence.key_begin + task.key_begin;
    }

    static void add(const float* elements, int64_t count, float* sums) {
        for_each_vector(count, [&](int64_t k, auto lanes, int) {
            store(sums + k, load(sums + k, lanes) + load(elements + k), lanes);
        });
    }

    template <bool kMasked>
    static void differentiate_row(float* weights, float* gradients, RowStatistics of_row, KeyRange seen) {
        const Int begin = broadcast(static_cast<int32_t>(seen.begin)), end = broadcast(static_cast<int32_t>(seen.end));
        Int number = lane_numbers();
        for (int64_t k = 0; k < kBlockKeys; k += kLanes, number += kLanes) {
            Float weight = exp2(load(weights + k) - of_row.lse) * of_row.factor;
            Float gradient = weight * difference(load(gradients + k), of_row);
            if constexpr (kMasked) {
                const Int visible = (number >= begin) & (number < end);
                weight = select(visible, weight, Float{});
                gradient = select(visible, gradient, Float{});
            }
            store(weights + k, weight);
            store(gradients + k, gradient);
        }
    }

    // sums[key][d] += sum over rows of left[row][key] * right[row][d]
    void add_to_keys(const float* left, const float* right, int64_t right_stride, float* sums, int64_t sums_width) {
        RowRange seen[kBlockKeys / kTile];
        for (int64_t k = 0; k < keys; k += kTile) seen[k / kTile] = rows_that_see(k, k + kTile);
        // Few rows are not summed in one chain: the plain layer sums each head alone, and rounds less.
        const int64_t chain = p.rows(task.sequence) <= kBlockRows ? kShortChain : kBlockRows;
        for (int64_t d = 0; d < sums_width; d += kPanel) {
            for (int64_t k = 0; k < keys; k += kTile) {
                const auto [first, last] = seen[k / kTile];
                for (int64_t begin = first; begin < last; begin += chain) {
                    multiply_tile<kTile>(ColumnWise{left + begin * kScoreStride + k, kScoreStride},
                                         right + begin * right_stride + d, right_stride, std::min(chain, last - begin),
                                         sums + k * sums_width + d, sums_width, kAdd);
                }
            }
        }
    }

    // d_query[row][d] += sum over keys of d_scores[row][key] * key[key][d]
    void add_to_rows() {
        KeyRange seen[kBlockRows / kTile];
        for (int64_t row = 0; row < rows; row += kTile) seen[row / kTile] = keys_seen_by(row, row + kTile);
        float* const sums = sums_of(first_row);
        for (int64_t d = 0; d < width; d += kPanel) {
            for (int64_t row = 0; row < rows; row += kTile) {
                const auto [begin, end] = seen[row / kTile];
                multiply_tile<kTile>(RowWise<kTile>(d_scores + row * kScoreStride + begin, kScoreStride),
                                     key_panels + d * kBlockKeys + begin * kPanel, kPanel, end - begin,
                                     sums + row * p.padded_dim() + d, p.padded_dim(), kAdd);
            }
        }
    }

    void store_keys(T* tensor, const Strides& strides, int64_t dim, const float* sums, int64_t sums_width,
                    float factor) const {
        T* const to = rows_in(tensor, strides, task) + task.key_begin * strides.position;
        for (int64_t k = 0; k < keys; ++k) {
            for_each_vector(dim, [&](int64_t d, auto lanes, int) {
                store(to + k * strides.position + d, load(sums + k * sums_width + d) * factor, lanes);
            });
        }
    }

    int64_t number_in_all(int64_t row) const { return p.number_of(task.sequence, task.key_head, row); }
    const RowStatistics* statistics_of(int64_t row) const { return p.statistics + number_in_all(row); }
    float* sums_of(int64_t row) const { return p.d_query_sums + number_in_all(row) * p.padded_dim(); }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
