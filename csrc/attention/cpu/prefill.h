// Attention for many query rows: flash attention with the queries across the lanes.
//
// A task holds some rows in panels of kPanel queries and walks the keys in blocks. Per block and panel:
//
//     scores^T = key query^T     (keys x panel)
//     softmax over the keys      down the columns: no lane ever talks to another
//     out^T   += value^T weights (head_dim x panel)
//
// The products are `Products`' business: vector_products.h, or tile_products.h where there are matrix units. Only
// queries and outputs, touched once, are transposed.
#pragma once

#include <utility>

#include "../../cpu/arena.h"
#include "../../cpu/math.h"
#include "block_mask.h"
#include "dropout.h"
#include "panel.h"
#include "panel_mask.h"
#include "score_program.h"

namespace nearpeak::attention::NEARPEAK_ISA {

template <class T, class Products>
class Prefill {
  public:
    Prefill(const Forward& parameters, const Task& this_task, Arena& arena)
        : p(parameters), task(this_task), products(parameters, this_task, arena), block_mask(arena) {
        out = arena.take(panels_of(task) * Products::out_rows(p) * kPanel);
        maximum = arena.take(panels_of(task) * kPanel);
        total = arena.take(panels_of(task) * kPanel);
        scores = arena.take(Products::kBlock * kPanel);
        if (p.has_terms()) terms = arena.take(kLanes * kTermStride);
    }

    void run() {
        sum();
        for (int64_t panel = 0; panel < panels_of(task); ++panel) finish_panel(panel);
    }

    // All but the outputs: the sums over the keys.
    void sum() {
        const int64_t panels = panels_of(task);
        for (int64_t panel = 0; panel < panels; ++panel) start_panel(panel);
        // Blocks are the sequence's, not the task's: sums must not depend on how rows are shared out over threads.
        const int64_t first = task.key_begin / Products::kBlock * Products::kBlock;
        for (int64_t begin = first; begin < task.key_end; begin += Products::kBlock) {
            const int64_t end = std::min(begin + Products::kBlock, task.key_end);
            bool loaded = false;
            for (int64_t panel = 0; panel < panels; ++panel) {
                const PanelRows rows(task, panel);
                for_each_run(p, task, rows.begin, rows.end, begin, end, Products::kStep,
                             [&](int64_t first, int64_t last, bool whole) {
                                 if (!std::exchange(loaded, true)) products.load_block(begin, end);
                                 add_run(panel, begin, {first, last}, whole);
                             });
            }
        }
    }

    // What `sum` found for a row of the task.
    Softmax softmax_of(int64_t row) const {
        return with_sink(p, task, row, maximum[row - task.row_begin], total[row - task.row_begin]);
    }

  private:
    const Forward& p;
    const Task& task;
    Products products;
    PanelMask block_mask;
    float *out, *maximum, *total, *scores, *terms = nullptr;

    // From one row's terms to the next, an odd number of vectors, which spreads rows over all sets of a cache.
    static constexpr int64_t kTermStride = Products::kBlock + (Products::kBlock / kLanes % 2 ? 2 : 1) * kLanes;

    static constexpr int64_t kTogether = std::min<int64_t>(2, Products::kStep);  // weights that are stored together

    float* out_panel(int64_t panel) const { return out + panel * Products::out_rows(p) * kPanel; }

    void start_panel(int64_t panel) {
        products.load_queries(panel);
        std::fill_n(out_panel(panel), Products::out_rows(p) * kPanel, 0.0f);
        std::fill_n(maximum + panel * kPanel, kPanel, -kInfinity);
        std::fill_n(total + panel * kPanel, kPanel, 0.0f);
    }

    // Keys `run` of the block that begins with key block_begin. `whole`: no block mask hides any of them from a row.
    void add_run(int64_t panel, int64_t block_begin, KeyRange run, bool whole) {
        const PanelRows rows(task, panel);
        const KeyRange first = allowed_keys(p, task.sequence, rows.begin / p.group());
        const KeyRange last = allowed_keys(p, task.sequence, (rows.end - 1) / p.group());
        auto [allowed_begin, end] =
            allowed_by_mask(p, task, std::max(run.begin, first.begin), std::min(run.end, last.end));
        if (allowed_begin >= end) return;
        const auto step_of = [&](int64_t key) { return key - (key - block_begin) % Products::kStep; };
        int64_t begin = step_of(allowed_begin);
        if (!whole) {
            block_mask.look_at(p, task, rows, begin, end);
            const KeyRange seen = block_mask.seen(allowed_begin, end);
            if (seen.begin >= seen.end) return;
            begin = step_of(seen.begin);
            end = seen.end;
        }
        products.score(panel, begin, end, scores);
        if (!Products::kScoresAreScaled && !softmax_scales()) scale_scores(end - begin);
        if (p.softcap > 0) cap_scores(end - begin);
        if (p.has_program()) {
            for (int half = 0; half < kPanelVectors; ++half) modify_scores(rows, half, begin, end);
        }
        if (p.has_terms()) {
            for (int half = 0; half < kPanelVectors; ++half) add_terms_of(rows, half, begin, end);
        }
        if (!whole) {
            const KeyRange hidden = block_mask.hidden(begin, end);
            float* const from = scores + (hidden.begin - begin) * kPanel;
            for (int half = 0; half < kPanelVectors; ++half) block_mask.hide(half, hidden.begin, hidden.end, from);
        }
        // Rows of a panel see the same keys of this block, but where a window's edge passes.
        if (begin < last.begin || end > first.end) mask_scores(rows, begin, end);
        const int64_t steps = (end - begin + Products::kStep - 1) / Products::kStep;
        std::fill(scores + (end - begin) * kPanel, scores + steps * Products::kStep * kPanel, -kInfinity);
        Float decay[kPanelVectors];
        if (p.drops()) {
            softmax<true>(rows, panel, begin, steps * Products::kStep, decay);
        } else {
            softmax<false>(rows, panel, begin, steps * Products::kStep, decay);
        }
        products.add_values(begin, end, scores, decay, out_panel(panel));
    }

    // Whether softmax is given unscaled scores, and scales them on the way. A factor that is not positive would turn
    // the maximum around.
    bool softmax_scales() const { return !Products::kScoresAreScaled && score_factor(p) > 0 && !p.shapes_scores(); }

    void scale_scores(int64_t keys) {
        const float factor = score_factor(p);
        for (int64_t i = 0; i < keys * kPanel; i += kLanes) store(scores + i, load(scores + i) * factor);
    }

    void cap_scores(int64_t keys) {
        for (int64_t i = 0; i < keys * kPanel; i += kLanes) store(scores + i, capped(p, load(scores + i)));
    }

    void modify_scores(PanelRows rows, int half, int64_t begin, int64_t end) {
        ScoreRunner run(p.score_program);
        ScorePlaces places = places_of_lanes(
            p, task, [&](int lane) { return std::min(rows.begin + half * kLanes + lane, rows.end - 1); });
        for (int64_t key = begin; key < end; key += kVectorsTogether) {
            const int count = static_cast<int>(std::min<int64_t>(kVectorsTogether, end - key));
            float* const at = scores + (key - begin) * kPanel + half * kLanes;
            Float block[kVectorsTogether];
            for (int i = 0; i < count; ++i) {
                places.key[i] = broadcast(static_cast<int32_t>(task.sequence.key_begin + key + i));
                block[i] = load(at + i * kPanel);
            }
            run(places, block, nullptr, count);
            for (int i = 0; i < count; ++i) store(at + i * kPanel, block[i]);
        }
    }

    void add_terms_of(PanelRows rows, int half, int64_t begin, int64_t end) {
        const int64_t first = rows.begin + half * kLanes, last = std::min<int64_t>(first + kLanes, rows.end);
        for (int64_t row = first; row < last; ++row) {
            float* const of_row = terms + (row - first) * kTermStride;
            std::fill_n(of_row, end - begin, 0.0f);
            add_terms(p, task, row, begin, end, of_row);
        }
        const auto lanes =
            lanes_of<float>(first, last, [&](int64_t row) { return terms + (row - first) * kTermStride; });
        for_each_vector(end - begin, [&](int64_t k, auto count, int) {
            Float block[kLanes];
            lanes.load_transposed(k, count, block);
            const int64_t keys = std::min<int64_t>(kLanes, end - begin - k);
            for (int64_t i = 0; i < keys; ++i) {
                float* at = scores + (k + i) * kPanel + half * kLanes;
                store(at, load(at) + block[i]);
            }
        });
    }

    void mask_scores(PanelRows rows, int64_t begin, int64_t end) {
        for (int half = 0; half < kPanelVectors; ++half) {
            Int first, last;
            for (int lane = 0; lane < kLanes; ++lane) {
                const int64_t row = std::min(rows.begin + half * kLanes + lane, rows.end - 1);
                const KeyRange allowed = allowed_keys(p, task.sequence, row / p.group());
                first[lane] = static_cast<int32_t>(std::clamp<int64_t>(allowed.begin - begin, 0, Products::kBlock));
                last[lane] = static_cast<int32_t>(std::clamp<int64_t>(allowed.end - begin, 0, Products::kBlock));
            }
            for (int64_t k = 0; k < end - begin; ++k) {
                float* at = scores + k * kPanel + half * kLanes;
                const Int number = broadcast(static_cast<int32_t>(k));
                store(at, select((number >= first) & (number < last), load(at), broadcast(-kInfinity)));
            }
        }
    }

    // Turns scores into weights 2^(score - maximum), as `products` keeps them; `decay` is what earlier sums shrink by
    // as the maximum grows.
    template <bool kDrops>
    void softmax(PanelRows rows, int64_t panel, int64_t begin, int64_t keys, Float (&decay)[kPanelVectors]) {
        float* const panel_maximum = maximum + panel * kPanel;
        float* const panel_total = total + panel * kPanel;
        const float factor = softmax_scales() ? score_factor(p) : 1.0f;
        Float now[kPanelVectors], sums[kPanelVectors] = {};
        largest_scores(keys, now);
        for (int half = 0; half < kPanelVectors; ++half) {
            const Float before = load(panel_maximum + half * kLanes);
            now[half] = max(before, now[half] * factor);
            store(panel_maximum + half * kLanes, now[half]);
            // A row that has seen no key yet must not compute -inf - -inf.
            now[half] = select(now[half] == -kInfinity, Float{}, now[half]);
            decay[half] = exp2(before - now[half]);
        }
        for (int half = 0; half < kPanelVectors; ++half) {
            const WeightFilter<kDrops> kept(p, task, rows.begin + half * kLanes, begin);
            const auto weight_of = [&](int64_t k) {
                return exp2_rounded_to<T>(load(scores + k * kPanel + half * kLanes) * factor - now[half]);
            };
            for (int64_t k = 0; k < keys; k += kTogether) {
                const Float first = weight_of(k);
                if constexpr (kTogether == 1) {
                    sums[half] += first;
                    Products::store_weights(scores, k, half, kept(k, first));
                } else {
                    const Float second = weight_of(k + 1);
                    sums[half] += first + second;
                    Products::store_weights(scores, k, half, kept(k, first), kept(k + 1, second));
                }
            }
        }
        for (int half = 0; half < kPanelVectors; ++half) {
            float* at = panel_total + half * kLanes;
            store(at, load(at) * decay[half] + sums[half]);
        }
    }

    // Of the panel's rows over the keys; in chains of their own, since a maximum takes some cycles.
    void largest_scores(int64_t keys, Float (&largest)[kPanelVectors]) const {
        constexpr int kChains = 4;
        for (int half = 0; half < kPanelVectors; ++half) {
            Float chains[kChains];
            for (Float& chain : chains) chain = broadcast(-kInfinity);
            int64_t k = 0;
            const auto score_at = [&](int64_t key) { return load(scores + key * kPanel + half * kLanes); };
            for (; k + kChains <= keys; k += kChains) {
                for (int i = 0; i < kChains; ++i) chains[i] = max(chains[i], score_at(k + i));
            }
            for (; k < keys; ++k) chains[0] = max(chains[0], score_at(k));
            largest[half] = max(max(chains[0], chains[1]), max(chains[2], chains[3]));
        }
    }

    void finish_panel(int64_t panel) {
        const PanelRows panel_rows(task, panel);
        for (int half = 0; half < kPanelVectors; ++half) {
            const int64_t row = panel_rows.begin + half * kLanes;
            const int64_t rows = std::min<int64_t>(kLanes, panel_rows.end - row);
            if (rows <= 0) return;
            Float inverse = {};
            for (int64_t r = 0; r < rows; ++r) {
                const Softmax softmax = softmax_of(row + r);
                inverse[r] = out_factor(p, softmax);
                write_lse(p, task, row + r, softmax.maximum, softmax.total);
            }
            const float* from = out_panel(panel) + half * kLanes;
            T* to[kLanes];
            for (int64_t r = 0; r < rows; ++r) to[r] = out_row<T>(p, task, row + r);
            for_each_vector(p.value_dim, [&](int64_t d, auto lanes, int) {
                Float block[kLanes];
                for (int64_t i = 0; i < kLanes; ++i) {
                    block[i] = d + i < p.value_dim ? load(from + (d + i) * kPanel) * inverse : Float{};
                }
                transpose(block);
                for (int64_t r = 0; r < rows; ++r) store(to[r] + d, block[r], lanes);
            });
        }
    }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
