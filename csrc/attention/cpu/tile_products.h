// The two matrix products of a prefill block in bfloat16, with matrix units.
//
//     scores^T = key query^T     (keys x panel)       left: keys as they are, right: pairs of query^T
//     out^T   += value^T weights (head_dim x panel)   left: value^T, packed once per block, right: pairs of weights
//
// A panel is 32 queries, two tiles; keys and dimensions also go in twos of tiles, so that each factor that is loaded
// serves two products.
#pragma once

#include "../../cpu/arena.h"
#include "../../cpu/tiles.h"

#ifdef NEARPEAK_HAS_TILES
#include <algorithm>

#include "panel.h"

namespace nearpeak::attention::NEARPEAK_ISA {

class TileProducts {
  public:
    // Keys per block: a panel's scores and queries stay in a 48 KiB first-level cache, and stores of tiles that miss it
    // cost four times as much; longer blocks load and store `out` less often.
    static constexpr int64_t kBlock = 256;
    // Scaling queries would round them once more.
    static constexpr bool kScoresAreScaled = false;
    // Keys that only go together, and dimensions.
    static constexpr int64_t kStep = 2 * kTileRows;

    TileProducts(const Forward& parameters, const Task& this_task, Arena& arena) : p(parameters), task(this_task) {
        query = arena.take<bfloat16>(panels_of(task) * kPanel * padded_dim(p));
        key = arena.take<bfloat16>((kBlock + kStep) * padded_dim(p));
        value = arena.take<bfloat16>(kBlock * padded_value_dim(p));
        static_assert(kPanel == kStep && kPanelVectors == 2 && kBlock % kStep == 0);
    }

    static int64_t out_rows(const Forward& p) { return padded_value_dim(p); }

    // Per half panel and kTileDepth dimensions, a right factor: pairs (d, d + 1) x 16 queries.
    void load_queries(int64_t panel) {
        for (int half = 0; half < kPanelVectors; ++half) {
            const auto lanes = query_lanes<bfloat16>(p, task, PanelRows(task, panel), half);
            for (int64_t d = 0; d < padded_dim(p); d += kTileDepth) {
                Float block[kLanes];
                load_transposed_pairs(lanes, d, p.head_dim, block);
                store_factor(query_factor(panel, half, d), block);
            }
        }
    }

    void load_block(int64_t begin, int64_t end) {
        block_begin = begin;
        block_keys = end - begin;
        copy_keys();
        pack_values();
    }

    // scores[key][query] of keys [begin, end) of the block's keys, unscaled; whole steps of keys are written.
    void score(int64_t panel, int64_t begin, int64_t end, float* scores) {
        const int64_t stride = padded_dim(p);
        const bfloat16* rows = key + (begin - block_begin) * stride;
        finish_stores();
        for (int64_t k = 0; k < end - begin; k += kStep, rows += kStep * stride, scores += kStep * kPanel) {
            zero_all_sums();
            for (int64_t d = 0; d < stride; d += kTileDepth) {
                load_left<0>(rows + d, stride * 2);
                load_left<1>(rows + kTileRows * stride + d, stride * 2);
                load_right<0>(query_factor(panel, 0, d), kTileRowBytes);
                load_right<1>(query_factor(panel, 1, d), kTileRowBytes);
                multiply_all_tiles();
            }
            store_all_sums(scores, kPanel);
        }
    }

    static void store_weights(float* weights, int64_t k, int half, Float first, Float second) {
        store_weight_pairs(weights, k, half, first, second);
    }

    // out = out * decay + value^T weights over keys [begin, end) of the block's keys, the weights in pairs.
    void add_values(int64_t begin, int64_t end, const float* weights, const Float (&decay)[kPanelVectors], float* out) {
        const int64_t first = begin - block_begin;
        const auto* pairs = reinterpret_cast<const bfloat16*>(weights);
        scale(decay, out);
        finish_stores();
        for (int64_t d = 0; d < padded_value_dim(p); d += kStep) {
            float* sums = out + d * kPanel;
            load_all_sums(sums, kPanel);
            for (int64_t k = 0; k < end - begin; k += kStep) {
                load_left<0>(value_factor(d, first + k), kTileRowBytes);
                load_left<1>(value_factor(d + kTileRows, first + k), kTileRowBytes);
                load_right<0>(pairs + k * kPanel, kPanel * 4);
                load_right<1>(pairs + k * kPanel + kTileDepth, kPanel * 4);
                multiply_all_tiles();
            }
            store_all_sums(sums, kPanel);
        }
    }

  private:
    const Forward& p;
    const Task& task;
    TileUnit unit;
    bfloat16 *query, *key, *value;
    int64_t block_begin = 0, block_keys = 0;

    static int64_t padded(int64_t dim) { return (dim + kTileDepth - 1) / kTileDepth * kTileDepth; }
    static int64_t padded_dim(const Forward& p) { return padded(p.head_dim); }
    static int64_t padded_value_dim(const Forward& p) { return padded(p.value_dim); }

    bfloat16* query_factor(int64_t panel, int half, int64_t d) const {
        return query + ((panel * kPanelVectors + half) * (padded_dim(p) / kTileDepth) + d / kTileDepth) * kTileElements;
    }
    bfloat16* value_factor(int64_t d, int64_t k) const {
        return value + (d / kTileRows * (kBlock / kTileDepth) + k / kTileDepth) * kTileElements;
    }

    // Rows of padded_dim elements, zeros past head_dim and past the last key.
    void copy_keys() {
        const bfloat16* from = key_rows<bfloat16>(p, task) + block_begin * p.key_strides.position;
        const int64_t stride = padded_dim(p);
        for (int64_t k = 0; k < block_keys; ++k) {
            for (int64_t d = 0; d < stride; d += kTileDepth) {
                store(reinterpret_cast<float*>(key + k * stride + d),
                      load_some_pairs(from + k * p.key_strides.position, d, p.head_dim));
            }
        }
        std::memset(key + block_keys * stride, 0, kStep * stride * sizeof(bfloat16));
    }

    // value^T: per 16 dimensions and 32 keys a left factor, from a transposition of pairs of keys.
    void pack_values() {
        const bfloat16* from = value_rows<bfloat16>(p, task) + block_begin * p.value_strides.position;
        for (int64_t k = 0; k < block_keys; k += kTileDepth) {
            for (int64_t d = 0; d < padded_value_dim(p); d += kTileRows) {
                Float block[kLanes];
                for (int64_t row = 0; row < kLanes; ++row) {
                    const int64_t first = k + 2 * row;
                    block[row] = pair(value_bits(from, first, d), value_bits(from, first + 1, d));
                }
                transpose(block);
                store_factor(value_factor(d, k), block);
            }
        }
    }

    Short value_bits(const bfloat16* from, int64_t k, int64_t d) const {
        return load_some_bits(k < block_keys ? from + k * p.value_strides.position : nullptr, d, p.value_dim);
    }

    void scale(const Float (&decay)[kPanelVectors], float* out) const {
        Float change = {};
        for (const Float& each : decay) change += select(each == 1.0f, Float{}, broadcast(1.0f));
        if (sum(change) == 0.0f) return;
        for (int64_t i = 0; i < padded_value_dim(p) * kPanel; i += kPanel) {
            for (int half = 0; half < kPanelVectors; ++half) {
                float* at = out + i + half * kLanes;
                store(at, load(at) * decay[half]);
            }
        }
    }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
#endif
