// Gradients of attention. With P = 2^(score - lse), which is recomputed, and delta = rowsum(P dP):
//
//     dP = dOut V^T      dScore = P (dP - delta + dLse)
//     dV = P^T dOut      dQ = scale dScore K      dK = scale dScore^T Q
//
// With dropout, dP is multiplied by what P was, and dV is of P so multiplied.
//
// A task holds a block of keys and walks the blocks of rows that see it. Five products: dQ is summed over the tasks of
// all keys, in turn (turn.h), where a second pass for it would need seven. It comes last, so that a task waits for
// another's fifth product only. The products are `Gradients`' business: vector_gradients.h, pair_gradients.h or
// tile_gradients.h.
#pragma once

#include <algorithm>

#include "../../cpu/arena.h"
#include "../../cpu/math.h"
#include "backward_view.h"
#include "dropout.h"
#include "score_program.h"

namespace nearpeak::attention::NEARPEAK_ISA {

template <class T, class Gradients>
class BackwardBlock {
  public:
    BackwardBlock(const Backward& parameters, const Task& this_task, Arena& arena)
        : p(parameters),
          task(this_task),
          view(parameters, this_task),
          gradients(view, arena),
          width(in_panels(p.head_dim)),
          value_width(in_panels(p.value_dim)),
          scores(arena.take(Gradients::kRows * kScoreStride)),
          d_scores(arena.take(Gradients::kRows * kScoreStride)),
          d_key(arena.take(kScoreStride * width)),
          d_value(arena.take(kScoreStride * value_width)),
          bias_sums(sums_rows_of_bias() ? arena.take(p.group() * kBlockKeys) : nullptr) {}

    void run(const Order& order) {
        gradients.load_keys();
        std::fill_n(d_key, kScoreStride * width, 0.0f);
        std::fill_n(d_value, kScoreStride * value_width, 0.0f);
        if (p.blocks.starts) {
            for (int64_t i = 0; i < order.visit_count; ++i) {
                add_rows(order.visits[i].row, kBlockRows, order.turns, order.visits[i].before, order.own);
            }
        } else {
            for (int64_t row = task.row_begin; row < task.row_end; row += Gradients::kRows) {
                add_rows(row, Gradients::kRows, order.turns, order.before, order.own);
            }
        }
        store_keys(static_cast<T*>(p.d_key), p.d_key_strides, p.head_dim, d_key, width, p.scale);
        store_keys(static_cast<T*>(p.d_value), p.d_value_strides, p.value_dim, d_value, value_width, 1.0f);
    }

  private:
    const Backward& p;
    const Task& task;
    BackwardView view;
    Gradients gradients;
    const int64_t width, value_width;      // a row's elements, in whole panels: of query and key, of value
    float *const scores, *const d_scores;  // rows x kBlockKeys
    float *const d_key, *const d_value;    // kBlockKeys x width, x value_width; transposed, the rows kScoreStride apart
    float* const bias_sums;                // group x kBlockKeys, or null

    // All that rows [row, row + count) add to anything, in turn where other tasks add to the same.
    void add_rows(int64_t row, int64_t count, Turn* turns, int64_t before, int64_t own) {
        view.look_at(row, std::min(count, task.row_end - row));
        gradients.load_rows();
        gradients.multiply_keys(scores, d_scores);
        differentiate();
        gradients.load_weights(scores, d_scores);
        gradients.add_to_values(d_value);
        gradients.add_to_keys(d_key);
        if (before >= 0) turns[before].wait_for(row + view.rows);
        gradients.add_to_rows(sums_of(row));
        turns[own].finish(row + view.rows);
    }

    // One bias for all positions: its gradient sums all rows, block by block, since short sums round less.
    bool sums_rows_of_bias() const { return p.d_bias && p.d_bias_strides.position == 0; }

    // Turns scores into P, and dP into dScore; both become zero where a row may not look.
    void differentiate() {
        const RowStatistics* statistics = statistics_of(view.first_row);
        if (bias_sums) std::fill_n(bias_sums, p.group() * kBlockKeys, 0.0f);
        for (int64_t row = 0; row < view.rows; ++row) {
            float* const weights = scores + row * kScoreStride;
            float* const gradient = d_scores + row * kScoreStride;
            RowStatistics of_row = statistics[row];
            const KeyRange seen = view.keys_seen_by(row, row + 1);
            float slopes[kBlockKeys], kept[kBlockKeys], own_slopes[kBlockKeys];
            if (!Gradients::kScoresAreScaled && !weights_are_scaled_late()) scale(weights);
            if (p.softcap > 0) cap(weights, slopes);
            if (p.has_program()) {
                modify_row(p, task, view.first_row + row, task.key_begin, kBlockKeys, weights, own_slopes);
            }
            if (p.has_terms()) add_terms(p, task, view.first_row + row, task.key_begin, task.key_end, weights);
            if (!view.whole) hide(view.first_row + row, weights, gradient, p.softcap > 0 ? slopes : nullptr);
            if (p.drops()) {
                dropout_factors(p, task, view.first_row + row, task.key_begin, task.key_begin + kBlockKeys, kept);
                multiply(gradient, kept);
            }
            if (std::is_same_v<T, float> && task.sequence.key_length <= (p.eager_elsewhere() ? kBlockKeys : kFewKeys)) {
                of_row.delta = delta_of(weights, gradient, of_row, seen);
            }
            if (seen.begin == 0 && seen.end == kBlockKeys) {
                differentiate_row<false>(weights, gradient, of_row, seen);
            } else {
                differentiate_row<true>(weights, gradient, of_row, seen);
            }
            if (p.drops()) multiply(weights, kept);
            if (bias_sums) {
                add(gradient, kBlockKeys, bias_sums + (view.first_row + row) % p.group() * kBlockKeys);
            } else if (p.d_bias) {
                add(gradient, view.keys, bias_gradient(view.first_row + row));
            }
            if (p.has_program()) multiply_by_slopes(gradient, own_slopes);
            if (p.softcap > 0) multiply(gradient, slopes);
        }
        for (int64_t head = 0; bias_sums && head < p.group(); ++head) {
            add(bias_sums + head * kBlockKeys, view.keys, bias_gradient(head));
        }
        // The rest of the last tile of rows.
        const int64_t end = (view.rows + kTile - 1) / kTile * kTile;
        std::fill(d_scores + view.rows * kScoreStride, d_scores + end * kScoreStride, 0.0f);
    }

    // Where a block mask forbids, scores become -infinity, whatever they were: blocks that no row sees are not
    // computed.
    void hide(int64_t row, float* weights, float* gradient, float* slopes) const {
        uint8_t allowed[kBlockKeys] = {};
        write_permissions(p, task, row, task.key_begin, task.key_end, allowed);
        for (int64_t k = 0; k < kBlockKeys; k += kLanes) {
            const Float permission = load(reinterpret_cast<const Permission*>(allowed) + k);
            const Int visible = permission == 0.0f;
            store(weights + k, select(visible, load(weights + k), permission));
            store(gradient + k, select(visible, load(gradient + k), Float{}));
            if (slopes) store(slopes + k, select(visible, load(slopes + k), Float{}));
        }
    }

    // Whether unscaled scores become scaled only as they become P. -infinity keeps its sign only by a positive scale.
    bool weights_are_scaled_late() const {
        return !Gradients::kScoresAreScaled && !p.shapes_scores() && (view.whole || p.scale > 0);
    }
    void scale(float* weights) const {
        for (int64_t k = 0; k < kBlockKeys; k += kLanes) store(weights + k, load(weights + k) * score_factor(p));
    }

    // A slope is not a number where a score is none: there the gradient is zero, and stays so.
    static void multiply_by_slopes(float* gradient, const float* slopes) {
        for (int64_t k = 0; k < kBlockKeys; k += kLanes) {
            const Float own = load(gradient + k);
            store(gradient + k, select(own == 0.0f, own, own * load(slopes + k)));
        }
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
    void differentiate_row(float* weights, float* gradients, RowStatistics of_row, KeyRange seen) const {
        const float factor = weights_are_scaled_late() ? score_factor(p) : 1.0f;
        const Int begin = broadcast(static_cast<int32_t>(seen.begin)), end = broadcast(static_cast<int32_t>(seen.end));
        Int number = lane_numbers();
        for (int64_t k = 0; k < kBlockKeys; k += kLanes, number += kLanes) {
            Float weight = exp2_rounded_to<T>(load(weights + k) * factor - of_row.lse) * of_row.factor;
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

    void store_keys(T* tensor, const Strides& strides, int64_t dim, const float* sums, int64_t sums_width,
                    float factor) const {
        T* const to = rows_in(tensor, strides, task) + task.key_begin * strides.position;
        for (int64_t k = 0; k < view.keys; k += kLanes) {
            const int64_t keys = std::min<int64_t>(kLanes, view.keys - k);
            for_each_vector(dim, [&](int64_t d, auto lanes, int) {
                Float block[kLanes];
                if constexpr (Gradients::kSumsAreTransposed) {
                    for (int64_t i = 0; i < kLanes; ++i) block[i] = load(sums + (d + i) * kScoreStride + k);
                    transpose(block);
                } else {
                    for (int64_t i = 0; i < keys; ++i) block[i] = load(sums + (k + i) * sums_width + d);
                }
                for (int64_t i = 0; i < keys; ++i) store(to + (k + i) * strides.position + d, block[i] * factor, lanes);
            });
        }
    }

    int64_t number_in_all(int64_t row) const { return p.number_of(task.sequence, task.key_head, row); }
    const RowStatistics* statistics_of(int64_t row) const { return p.statistics + number_in_all(row); }
    float* sums_of(int64_t row) const { return p.d_query_sums + number_in_all(row) * p.padded_dim(); }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
