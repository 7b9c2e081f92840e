// What backward does once per row, before and after the blocks of keys.
//
//     delta = rowsum(dOut out), which is rowsum(P dP)
//     d_query = scale * its sums
//
// How far P = 2^(score - lse) is from the exact softmax depends on lse, a float32: half a unit in the last place of an
// lse of 1000 is an error of 3e-5, in all probabilities of the row alike. So where float32 results would show it, the
// row's scores are computed once more for the exact one: its maximum and its sum.
#pragma once

#include <cmath>
#include <type_traits>

#include "../../cpu/tiles.h"
#include "backward_view.h"
#include "pair_products.h"
#include "prefill.h"
#include "vector_products.h"

namespace nearpeak::attention::NEARPEAK_ISA {

// Where rounding lse would show beside the other errors of a gradient: in base 2, beyond these magnitudes; in float32
// also where so few keys are seen that exact softmax makes hardly any, and where PyTorch has no fused backward: the
// error that is allowed here is that one's.
template <class T>
constexpr float kLargestRoundedLse = std::is_same_v<T, float> ? 16.0f : 4096.0f;

template <class T>
class BackwardRows {
  public:
    BackwardRows(const Backward& parameters, const Task& this_task, Arena& arena)
        : p(parameters), task(this_task), pass(describe(parameters)), softmax(pass, task, arena) {}

    void prepare() {
        bool rounded = true;
        for (int64_t row = task.row_begin; row < task.row_end; row += kLanes) set_delta(row);
        for (int64_t row = task.row_begin; row < task.row_end; ++row) {
            RowStatistics& statistics = statistics_of(row);
            const int64_t number = number_of(p, task, row);
            set_lse(statistics, p.lse[number]);
            statistics.grad_lse = p.grad_lse ? p.grad_lse[number] : 0.0f;
            rounded &= may_be_rounded(row);
            std::fill_n(sums_of(row), p.padded_dim(), 0.0f);
        }
        if (!rounded) set_exact_lse();
    }

    void finish() {
        for (int64_t row = task.row_begin; row < task.row_end; ++row) {
            const float* sums = sums_of(row);
            T* to = row_in(static_cast<T*>(p.d_query), p.d_query_strides, p, task, row);
            for_each_vector(p.head_dim,
                            [&](int64_t d, auto lanes, int) { store(to + d, load(sums + d, lanes) * p.scale, lanes); });
        }
    }

  private:
    using Scores = std::conditional_t<kInPairs<T>, PairScores, VectorScores<T>>;

    const Backward& p;
    const Task& task;
    const Forward pass;
    Prefill<T, Scores> softmax;

    static Forward describe(const Backward& p) {
        Forward forward{};
        static_cast<Call&>(forward) = p;
        return forward;
    }

    int64_t number_in_all(int64_t row) const { return p.number_of(task.sequence, task.key_head, row); }
    RowStatistics& statistics_of(int64_t row) const { return p.statistics[number_in_all(row)]; }
    float* sums_of(int64_t row) const { return p.d_query_sums + number_in_all(row) * p.padded_dim(); }

    // In the very order in which dP is summed: so that a row that sees one key only, whose dP is delta, gets the zero
    // that it should.
    void set_delta(int64_t row) {
        const auto lanes_in = [&](const void* tensor, const Strides& strides) {
            return lanes_of<T>(row, task.row_end, [&](int64_t each) {
                return row_in(static_cast<const T*>(tensor), strides, p, task, each);
            });
        };
        const Lanes<T> out = lanes_in(p.out, p.out_strides), grad_out = lanes_in(p.grad_out, p.grad_out_strides);
        Float delta = {};
        if constexpr (kInTiles<T>) {
            delta = products_in_tiles(grad_out, out);
        } else if constexpr (kInPairs<T>) {
            delta = products_of_pairs(grad_out, out);
        } else {
            delta = products_in_chains(grad_out, out);
        }
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, task.row_end - row); ++i) {
            statistics_of(row + i).delta = delta[i];
        }
    }

    Float products_of_pairs(const Lanes<bfloat16>& grad_out, const Lanes<bfloat16>& out) const {
        Float delta = {};
        for (int64_t d = 0; d < p.value_dim; d += 2 * kLanes) {
            Float g[kLanes], o[kLanes];
            load_transposed_pairs(grad_out, d, p.value_dim, g);
            load_transposed_pairs(out, d, p.value_dim, o);
            const int64_t pairs = std::min<int64_t>(kLanes, (p.value_dim - d + 1) / 2);
            for (int64_t i = 0; i < pairs; ++i) delta = multiply_add_pairs(g[i], o[i], delta);
        }
        return delta;
    }

    // See tiles.h.
    Float products_in_tiles(const Lanes<bfloat16>& grad_out, const Lanes<bfloat16>& out) const {
        Float delta = {};
        for (int64_t d = 0; d < p.value_dim; d += 2 * kLanes) {
            Float g[kLanes], o[kLanes], even = {}, odd = {};
            load_transposed_pairs(grad_out, d, p.value_dim, g);
            load_transposed_pairs(out, d, p.value_dim, o);
            const auto evens = [](Float pairs) { return bitcast<Float>(bitcast<Unsigned>(pairs) << 16); };
            const auto odds = [](Float pairs) { return bitcast<Float>(bitcast<Unsigned>(pairs) & 0xffff0000u); };
            for (int i = 0; i < kLanes; ++i) {
                even += evens(g[i]) * evens(o[i]);
                odd += odds(g[i]) * odds(o[i]);
            }
            delta += even + odd;
        }
        return delta;
    }

    Float products_in_chains(const Lanes<T>& grad_out, const Lanes<T>& out) const {
        Float chain = {}, delta = {};
        for_each_vector(p.value_dim, [&](int64_t d, auto count, int) {
            Float o[kLanes], g[kLanes];
            out.load_transposed(d, count, o);
            grad_out.load_transposed(d, count, g);
            if (d % kChain == 0) delta += std::exchange(chain, Float{});
            const int64_t elements = std::min<int64_t>(kLanes, p.value_dim - d);
            for (int64_t i = 0; i < elements; ++i) chain += g[i] * o[i];
        });
        return delta + chain;
    }

    // From natural logarithm to base 2, without erring as much again as lse itself does.
    static void set_lse(RowStatistics& statistics, float natural) {
        constexpr double kLog2EExactly = 1.4426950408889634;
        const double lse = std::isfinite(natural) ? natural * kLog2EExactly : 0.0;
        statistics.lse = static_cast<float>(lse);
        // 2^-rest, the rest being less than a unit in the last place.
        statistics.factor = 1.0f - kLn2 * static_cast<float>(lse - statistics.lse);
    }

    bool may_be_rounded(int64_t row) const {
        const KeyRange keys = allowed_keys(p, task.sequence, row / p.group());
        if (keys.begin == keys.end) return true;
        const bool small = std::abs(statistics_of(row).lse) <= kLargestRoundedLse<T>;
        if (!std::is_same_v<T, float>) return small;
        return small && !p.eager_elsewhere() && count_seen(p, task, row, keys) > kFewKeys;
    }

    void set_exact_lse() {
        softmax.sum();
        for (int64_t row = task.row_begin; row < task.row_end; ++row) {
            RowStatistics& statistics = statistics_of(row);
            if (may_be_rounded(row)) continue;
            const Softmax exact = softmax.softmax_of(row);
            if (exact.total == 0.0f) continue;
            statistics.lse = exact.maximum;
            statistics.factor = 1.0f / exact.total;
        }
    }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
