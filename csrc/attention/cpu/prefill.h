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

#include "../../cpu/arena.h"
#include "../../cpu/math.h"
#include "mask.h"
#include "panel.h"

namespace nearpeak::attention::NEARPEAK_ISA {

template <class T, class Products>
class Prefill {
  public:
    Prefill(const Forward& parameters, const Task& this_task, Arena& arena)
        : p(parameters), task(this_task), products(parameters, this_task, arena) {
        out = arena.take(panels_of(task) * Products::out_rows(p) * kPanel);
        maximum = arena.take(panels_of(task) * kPanel);
        total = arena.take(panels_of(task) * kPanel);
        scores = arena.take(Products::kBlock * kPanel);
    }

    void run() {
        sum();
        for (int64_t panel = 0; panel < panels_of(task); ++panel) finish_panel(panel);
    }

    // All but the outputs: the sums over the keys.
    void sum() {
        const int64_t panels = panels_of(task);
        for (int64_t panel = 0; panel < panels; ++panel) start_panel(panel);
        for (int64_t begin = task.key_begin; begin < task.key_end; begin += Products::kBlock) {
            const int64_t end = std::min(begin + Products::kBlock, task.key_end);
            products.load_block(begin, end);
            for (int64_t panel = 0; panel < panels; ++panel) add_block(panel, begin, end);
        }
    }

    // What `sum` found for a row of the task: the maximum of its scores, in base 2, and the sum of 2^(score - maximum).
    float maximum_of(int64_t row) const { return maximum[row - task.row_begin]; }
    float total_of(int64_t row) const { return total[row - task.row_begin]; }

  private:
    const Forward& p;
    const Task& task;
    Products products;
    float *out, *maximum, *total, *scores;

    float* out_panel(int64_t panel) const { return out + panel * Products::out_rows(p) * kPanel; }

    void start_panel(int64_t panel) {
        products.load_queries(panel);
        std::fill_n(out_panel(panel), Products::out_rows(p) * kPanel, 0.0f);
        std::fill_n(maximum + panel * kPanel, kPanel, -kInfinity);
        std::fill_n(total + panel * kPanel, kPanel, 0.0f);
    }

    void add_block(int64_t panel, int64_t block_begin, int64_t block_end) {
        const PanelRows rows(task, panel);
        const KeyRange first = allowed_keys(p, rows.begin / p.group());
        const KeyRange last = allowed_keys(p, (rows.end - 1) / p.group());
        const int64_t begin = std::max(block_begin, first.begin), end = std::min(block_end, last.end);
        if (begin >= end) return;
        products.score(panel, begin, end, scores);
        if (!Products::kScoresAreScaled) scale_scores(end - begin);
        if (p.softcap > 0) cap_scores(end - begin);
        // Rows of a panel see the same keys of this block, but where a window's edge passes.
        if (begin < last.begin || end > first.end) mask_scores(rows, begin, end);
        Float decay[kPanelVectors];
        softmax(panel, end - begin, decay);
        products.add_values(begin, end, scores, decay, out_panel(panel));
    }

    void scale_scores(int64_t keys) {
        const float factor = score_factor(p);
        for (int64_t i = 0; i < keys * kPanel; i += kLanes) store(scores + i, load(scores + i) * factor);
    }

    void cap_scores(int64_t keys) {
        for (int64_t i = 0; i < keys * kPanel; i += kLanes) store(scores + i, capped(p, load(scores + i)));
    }

    void mask_scores(PanelRows rows, int64_t begin, int64_t end) {
        for (int half = 0; half < kPanelVectors; ++half) {
            Int first, last;
            for (int lane = 0; lane < kLanes; ++lane) {
                const int64_t row = std::min(rows.begin + half * kLanes + lane, rows.end - 1);
                const KeyRange allowed = allowed_keys(p, row / p.group());
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

    // Turns scores into weights 2^(score - maximum); `decay` is what earlier sums shrink by as the maximum grows.
    void softmax(int64_t panel, int64_t keys, Float (&decay)[kPanelVectors]) {
        float* const panel_maximum = maximum + panel * kPanel;
        float* const panel_total = total + panel * kPanel;
        Float now[kPanelVectors], sums[kPanelVectors] = {};
        for (int half = 0; half < kPanelVectors; ++half) now[half] = load(panel_maximum + half * kLanes);
        for (int64_t k = 0; k < keys; ++k) {
            for (int half = 0; half < kPanelVectors; ++half) {
                now[half] = max(now[half], load(scores + k * kPanel + half * kLanes));
            }
        }
        for (int half = 0; half < kPanelVectors; ++half) {
            const Float before = load(panel_maximum + half * kLanes);
            store(panel_maximum + half * kLanes, now[half]);
            // A row that has seen no key yet must not compute -inf - -inf.
            now[half] = select(now[half] == -kInfinity, Float{}, now[half]);
            decay[half] = exp2(before - now[half]);
        }
        for (int64_t k = 0; k < keys; ++k) {
            for (int half = 0; half < kPanelVectors; ++half) {
                float* at = scores + k * kPanel + half * kLanes;
                const Float weight = exp2(load(at) - now[half]);
                sums[half] += weight;
                store(at, weight);
            }
        }
        for (int half = 0; half < kPanelVectors; ++half) {
            float* at = panel_total + half * kLanes;
            store(at, load(at) * decay[half] + sums[half]);
        }
    }

    void finish_panel(int64_t panel) {
        const PanelRows panel_rows(task, panel);
        for (int half = 0; half < kPanelVectors; ++half) {
            const int64_t row = panel_rows.begin + half * kLanes;
            const int64_t rows = std::min<int64_t>(kLanes, panel_rows.end - row);
            if (rows <= 0) return;
            const float* row_maximum = maximum + panel * kPanel + half * kLanes;
            const float* row_total = total + panel * kPanel + half * kLanes;
            const Float sums = load(row_total);
            const Float inverse = select(sums == 0.0f, Float{}, 1.0f / sums);
            const float* from = out_panel(panel) + half * kLanes;
            T* to[kLanes];
            for (int64_t r = 0; r < rows; ++r) to[r] = out_row<T>(p, task, row + r);
            for_each_vector(p.head_dim, [&](int64_t d, auto lanes, int) {
                Float block[kLanes];
                for (int64_t i = 0; i < kLanes; ++i) {
                    block[i] = d + i < p.head_dim ? load(from + (d + i) * kPanel) * inverse : Float{};
                }
                transpose(block);
                for (int64_t r = 0; r < rows; ++r) store(to[r] + d, block[r], lanes);
            });
            for (int64_t r = 0; r < rows; ++r) write_lse(p, task, row + r, row_maximum[r], row_total[r]);
        }
    }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
