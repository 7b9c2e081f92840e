// The two matrix products of a prefill block, with vector multiply-adds in float32.
//
//     scores^T = key query^T     (keys x panel)       each key element is broadcast against a row of query^T
//     out^T   += value^T weights (head_dim x panel)   each value element is broadcast against a row of weights
//
// Neither needs keys or values transposed.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../cpu/arena.h"
#include "panel.h"

namespace nearpeak::attention::NEARPEAK_ISA {

// The first product alone.
template <class T>
class VectorScores {
  public:
    // Keys per block, a multiple of every kTile: the weights of a panel and a tile of values fill less than half of a
    // 32 KiB first-level cache. Zen 3, float32, S 2048: 96 keys 82 % of the peak, 192 keys 81 %, 384 keys 73 %.
    // Without fused multiply-adds sums round twice as often: shorter ones make up for it.
    static constexpr int64_t kBlock = kLanes == 4 ? 48 : 96;
    // The scale is in the query panels already.
    static constexpr bool kScoresAreScaled = true;
    // Keys that only go together.
    static constexpr int64_t kStep = 1;

    VectorScores(const Forward& parameters, const Task& this_task, Arena& arena)
        : p(parameters),
          task(this_task),
          query(arena.take(panels_of(task) * p.head_dim * kPanel)),
          widened(arena.take(kBlock * p.head_dim)) {}

    // Rows of out^T that a panel needs.
    static int64_t out_rows(const Forward&) { return 0; }

    // Transposes the panel's queries, scaled; lanes past its last row get zeros.
    void load_queries(int64_t panel) {
        for (int half = 0; half < kPanelVectors; ++half) {
            query_lanes<T>(p, task, PanelRows(task, panel), half)
                .transpose_to(p.head_dim, score_factor(p), query_panel(panel) + half * kLanes);
        }
    }

    // float32 keys are read where they are; others are widened once for all panels.
    void load_block(int64_t begin, int64_t end) {
        block_begin = begin;
        block_keys = end - begin;
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

    static void store_weights(float* weights, int64_t k, int half, Float weight) {
        store(weights + k * kPanel + half * kLanes, weight);
    }

    void add_values(int64_t, int64_t, const float*, const Float (&)[kPanelVectors], float*) {}

  protected:
    const Forward& p;
    const Task& task;
    int64_t block_begin = 0, block_keys = 0;

  private:
    float *const query, *const widened;
    const float* key = nullptr;
    int64_t key_stride = 0;

    float* query_panel(int64_t panel) const { return query + panel * p.head_dim * kPanel; }
};

template <class T>
class VectorProducts : public VectorScores<T> {
  public:
    using VectorScores<T>::kBlock;

    VectorProducts(const Forward& parameters, const Task& this_task, Arena& arena)
        // Packing a tile's last key writes up to a vector past it.
        : VectorScores<T>(parameters, this_task, arena), value(arena.take(tiles() * (kBlock * kTile + kLanes))) {}

    static int64_t out_rows(const Forward& p) { return p.value_dim; }

    void load_block(int64_t begin, int64_t end) {
        VectorScores<T>::load_block(begin, end);
        pack_values();
    }

    // out = out * decay + value^T weights over keys [begin, end) of the block's keys. The block is summed on its own
    // and added last: short sums round less.
    void add_values(int64_t begin, int64_t end, const float* weights, const Float (&decay)[kPanelVectors], float* out) {
        for (int64_t tile = 0; tile < tiles(); ++tile) {
            const float* from = value_tile(tile) + (begin - block_begin) * kTile;
            with_count(std::min<int64_t>(kTile, p.value_dim - tile * kTile), [&](auto dims) {
                multiply_tile<dims>(ColumnWise{from, kTile}, weights, kPanel, end - begin, out + tile * kTile * kPanel,
                                    kPanel,
                                    [&](Float before, Float sums, int half) { return before * decay[half] + sums; });
            });
        }
    }

  private:
    using VectorScores<T>::p;
    using VectorScores<T>::task;
    using VectorScores<T>::block_begin;
    using VectorScores<T>::block_keys;
    float* const value;

    int64_t tiles() const { return (p.value_dim + kTile - 1) / kTile; }
    float* value_tile(int64_t tile) const { return value + tile * (block_keys * kTile + kLanes); }

    // value as tiles of kTile columns, each tile key after key, so that one stream is read.
    void pack_values() {
        const T* from = value_rows<T>(p, task) + block_begin * p.value_strides.position;
        const int64_t tile_stride = value_tile(1) - value_tile(0);
        const int64_t whole = p.value_dim >= kStored ? (p.value_dim - kStored) / kTile + 1 : 0;
        for (int64_t k = 0; k < block_keys; ++k, from += p.value_strides.position) {
            float* to = value + k * kTile;
            for (int64_t tile = 0; tile < whole; ++tile)
                pack_tile(from + tile * kTile, to + tile * tile_stride, kStored);
            for (int64_t tile = whole; tile < tiles(); ++tile) {
                pack_tile(from + tile * kTile, to + tile * tile_stride, p.value_dim - tile * kTile);
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
