// The two matrix products of a prefill block, with vector multiply-adds in float32.
//
//     scores^T = key query^T     (keys x panel)       each key element is broadcast against a row of query^T
//     out^T   += value^T weights (head_dim x panel)   each value element is broadcast against a row of weights
//
// Both run in tiles of kTile x kPanel sums in registers. Neither needs keys or values transposed.
#pragma once

#include <algorithm>
#include <type_traits>

#include "memory.h"
#include "panel.h"
#include "register_tiles.h"

namespace nearpeak::attention::NEARPEAK_ISA {

template <class T>
class VectorProducts {
  public:
    // Keys per block, a multiple of every kTile: the weights of a panel and a tile of values fill less than half of a
    // 32 KiB first-level cache. Zen 3, float32, S 2048: 96 keys 82 % of the peak, 192 keys 81 %, 384 keys 73 %.
    static constexpr int64_t kBlock = 96;
    // The scale is in the query panels already.
    static constexpr bool kScoresAreScaled = true;

    VectorProducts(const Forward& parameters, const Task& this_task, Arena& arena) : p(parameters), task(this_task) {
        query = arena.take(panels_of(task) * p.head_dim * kPanel);
        widened = arena.take(kBlock * p.head_dim);
        // Packing a tile's last key writes up to a vector past it.
        value = arena.take(tiles() * (kBlock * kTile + kLanes));
    }

    // Rows of out^T that a panel needs.
    static int64_t out_rows(const Forward& p) { return p.head_dim; }

    // Transposes the panel's queries, scaled; lanes past its last row get zeros.
    void load_queries(int64_t panel) {
        const float factor = score_factor(p);
        for (int half = 0; half < kPanelVectors; ++half) {
            const QueryLanes<T> rows(p, task, PanelRows(task, panel), half);
            transpose_lanes(rows.lanes, p.head_dim, factor, query_panel(panel) + half * kLanes);
        }
    }

    void load_block(int64_t begin, int64_t end) {
        block_begin = begin;
        block_keys = end - begin;
        load_keys();
        pack_values();
    }

    // scores[key][query] of keys [begin, end) of the block's keys.
    void score(int64_t panel, int64_t begin, int64_t end, float* scores) {
        const float* rows = key + (begin - block_begin) * key_stride;
        const float* queries = query_panel(panel);
        int64_t k = 0;
        for (; k + kTile <= end - begin; k += kTile) {
            multiply_rows<kTile>(rows + k * key_stride, key_stride, queries, p.head_dim, scores + k * kPanel, kPanel);
        }
        if (k == end - begin) return;
        with_count(end - begin - k, [&](auto keys) {
            multiply_rows<keys>(rows + k * key_stride, key_stride, queries, p.head_dim, scores + k * kPanel, kPanel);
        });
    }

    // out = out * decay + value^T weights over keys [begin, end) of the block's keys.
    void add_values(int64_t begin, int64_t end, const float* weights, const Float (&decay)[kPanelVectors], float* out) {
        for (int64_t tile = 0; tile < tiles(); ++tile) {
            const float* from = value_tile(tile) + (begin - block_begin) * kTile;
            with_count(std::min<int64_t>(kTile, p.head_dim - tile * kTile), [&](auto dims) {
                multiply_tile<dims>(ColumnWise{from, kTile}, weights, kPanel, end - begin, out + tile * kTile * kPanel,
                                    kPanel,
                                    [&](Float before, Float sums, int half) { return before * decay[half] + sums; });
            });
        }
    }

  private:
    const Forward& p;
    const Task& task;
    float *query, *widened, *value;
    int64_t block_begin = 0, block_keys = 0;
    const float* key = nullptr;
    int64_t key_stride = 0;

    int64_t tiles() const { return (p.head_dim + kTile - 1) / kTile; }
    float* query_panel(int64_t panel) const { return query + panel * p.head_dim * kPanel; }
    float* value_tile(int64_t tile) const { return value + tile * (block_keys * kTile + kLanes); }

    // float32 keys are read where they are; others are widened once for all panels.
    void load_keys() {
        const T* from = key_rows<T>(p, task) + block_begin * p.key_strides.position;
        if constexpr (std::is_same_v<T, float>) {
            key = from;
            key_stride = p.key_strides.position;
        } else {
            key = widened;
            key_stride = p.head_dim;
            for (int64_t k = 0; k < block_keys; ++k) {
                for_each_vector(p.head_dim, [&](int64_t d, auto lanes, int) {
                    store(widened + k * p.head_dim + d, load(from + k * p.key_strides.position + d, lanes), lanes);
                });
            }
        }
    }

    // value as tiles of kTile columns, each tile key after key, so that one stream is read.
    void pack_values() {
        const T* from = value_rows<T>(p, task) + block_begin * p.value_strides.position;
        const int64_t tile_stride = value_tile(1) - value_tile(0);
        const int64_t whole = p.head_dim >= kStored ? (p.head_dim - kStored) / kTile + 1 : 0;
        for (int64_t k = 0; k < block_keys; ++k, from += p.value_strides.position) {
            float* to = value + k * kTile;
            for (int64_t tile = 0; tile < whole; ++tile)
                pack_tile(from + tile * kTile, to + tile * tile_stride, kStored);
            for (int64_t tile = whole; tile < tiles(); ++tile) {
                pack_tile(from + tile * kTile, to + tile * tile_stride, p.head_dim - tile * kTile);
            }
        }
    }

    // Stores a whole vector or two where the row has that many elements left; what spills over the tile's edge is
    // overwritten by the next key, or never read.
    static constexpr int64_t kStored = (kTile + kLanes - 1) / kLanes * kLanes;

    static void pack_tile(const T* from, float* to, int64_t count) {
        if (count == kStored) {
            for (int i = 0; i < kStored; i += kLanes) store(to + i, load(from + i));
        } else {
            for (int64_t i = 0; i < std::min<int64_t>(count, kTile); ++i) to[i] = load(from + i, int64_t{1})[0];
        }
    }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
