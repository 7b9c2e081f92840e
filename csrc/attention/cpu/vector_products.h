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

namespace nearpeak::attention::NEARPEAK_ISA {

constexpr int kTile = kLanes == 16 ? 12 : 6;

// Dimensions that are summed in one chain. Longer ones round more: at head_dim 256, one chain errs twice as much as
// PyTorch's matrix product; chains of 64 do not.
constexpr int64_t kChain = 64;

// scores[key][query] (+)= key . query over up to kChain dimensions, for kKeys keys. `panel` is query^T, dims x kPanel.
template <int kKeys>
inline void multiply_chain(const float* key, int64_t key_stride, const float* panel, int64_t dims, bool add,
                           float* scores) {
    Float sums[kKeys][kPanelVectors] = {};
    const float* rows[kKeys];
    for (int k = 0; k < kKeys; ++k) rows[k] = key + k * key_stride;
    for (int64_t d = 0; d < dims; ++d, panel += kPanel) {
        const Float first = load(panel), second = load(panel + kLanes);
#pragma GCC unroll 16
        for (int k = 0; k < kKeys; ++k) {
            const Float element = broadcast(rows[k][d]);
            sums[k][0] += element * first;
            sums[k][1] += element * second;
        }
    }
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) {
        float* at = scores + k * kPanel;
        store(at, add ? load(at) + sums[k][0] : sums[k][0]);
        store(at + kLanes, add ? load(at + kLanes) + sums[k][1] : sums[k][1]);
    }
}

// scores[key][query] = key . query for kKeys keys.
template <int kKeys>
inline void multiply_keys(const float* key, int64_t key_stride, const float* panel, int64_t head_dim, float* scores) {
    for (int64_t d = 0; d < head_dim; d += kChain) {
        multiply_chain<kKeys>(key + d, key_stride, panel + d * kPanel, std::min(kChain, head_dim - d), d > 0, scores);
    }
}

// out[d][query] = out[d][query] * decay[query] + sum over keys of value[key][d] * weights[key][query], for kDims d.
// `value` holds kTile elements per key. The block is summed on its own and added last: short sums round less.
template <int kDims>
inline void multiply_values(const float* value, const float* weights, int64_t keys, const Float (&decay)[2],
                            float* out) {
    Float sums[kDims][kPanelVectors] = {};
    for (int64_t k = 0; k < keys; ++k, value += kTile, weights += kPanel) {
        const Float first = load(weights), second = load(weights + kLanes);
#pragma GCC unroll 16
        for (int d = 0; d < kDims; ++d) {
            const Float element = broadcast(value[d]);
            sums[d][0] += element * first;
            sums[d][1] += element * second;
        }
    }
#pragma GCC unroll 16
    for (int d = 0; d < kDims; ++d) {
        float* at = out + d * kPanel;
        store(at, load(at) * decay[0] + sums[d][0]);
        store(at + kLanes, load(at + kLanes) * decay[1] + sums[d][1]);
    }
}

// Calls function(std::integral_constant<int, count>) for a count in [1, kTile] known only at run time.
template <class Function, int kCount = kTile>
inline void with_count(int64_t count, Function function) {
    if constexpr (kCount > 1) {
        if (count != kCount) return with_count<Function, kCount - 1>(count, function);
    }
    function(std::integral_constant<int, kCount>{});
}

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
            float* to = query_panel(panel) + half * kLanes;
            for_each_vector(p.head_dim, [&](int64_t d, auto lanes, int) {
                Float block[kLanes];
                for (int lane = 0; lane < kLanes; ++lane) {
                    block[lane] = rows.lanes[lane] ? load(rows.lanes[lane] + d, lanes) * factor : Float{};
                }
                transpose(block);
                for (int64_t i = 0; i < std::min<int64_t>(kLanes, p.head_dim - d); ++i) {
                    store(to + (d + i) * kPanel, block[i]);
                }
            });
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
            multiply_keys<kTile>(rows + k * key_stride, key_stride, queries, p.head_dim, scores + k * kPanel);
        }
        if (k == end - begin) return;
        with_count(end - begin - k, [&](auto keys) {
            multiply_keys<keys>(rows + k * key_stride, key_stride, queries, p.head_dim, scores + k * kPanel);
        });
    }

    // out = out * decay + value^T weights over keys [begin, end) of the block's keys.
    void add_values(int64_t begin, int64_t end, const float* weights, const Float (&decay)[kPanelVectors], float* out) {
        for (int64_t tile = 0; tile < tiles(); ++tile) {
            const float* from = value_tile(tile) + (begin - block_begin) * kTile;
            with_count(std::min<int64_t>(kTile, p.head_dim - tile * kTile), [&](auto dims) {
                multiply_values<dims>(from, weights, end - begin, decay, out + tile * kTile * kPanel);
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

    // value as tiles of kTile columns, each tile key after key, so that multiply_values reads one stream.
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
