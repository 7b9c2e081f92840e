// The two matrix products of a prefill block in bfloat16, with dot products of pairs: half the instructions of
// vector_products.h.
//
//     scores^T = key query^T     (keys x panel)       each pair of a key's dimensions is broadcast against query^T's
//     out^T   += value^T weights (head_dim x panel)   each pair of keys' values is broadcast against their weights
//
// Weights are rounded to bfloat16, as matrix units and plain layers do too.
#pragma once

#include <algorithm>

#include "../../cpu/arena.h"
#include "../../cpu/pairs.h"
#include "panel.h"

namespace nearpeak::attention::NEARPEAK_ISA {

// The first product alone.
class PairScores {
  public:
    // Keys per block, a multiple of kTile and even.
    static constexpr int64_t kBlock = 192;
    // The scale goes into the scores as they leave their registers: scaled queries would be rounded once more.
    static constexpr bool kScoresAreScaled = true;
    // Keys that only go together.
    static constexpr int64_t kStep = 2;

    PairScores(const Forward& parameters, const Task& this_task, Arena& arena)
        : p(parameters),
          task(this_task),
          query(arena.take(panels_of(task) * dim_pairs() * kPanel)),
          padded_key(keys_are_whole_pairs() ? nullptr : arena.take<bfloat16>(kBlock * 2 * dim_pairs())) {
        static_assert(kBlock % kTile == 0 && kBlock % kStep == 0);
    }

    // Rows of out^T that a panel needs.
    static int64_t out_rows(const Forward&) { return 0; }

    // Transposes the panel's queries, pair by pair; lanes past its last row get zeros.
    void load_queries(int64_t panel) {
        for (int half = 0; half < kPanelVectors; ++half) {
            const auto lanes = query_lanes<bfloat16>(p, task, PanelRows(task, panel), half);
            transpose_pairs(lanes, p.head_dim, query_panel(panel) + half * kLanes);
        }
    }

    // Keys are read where they are, but for those of an odd head_dim.
    void load_block(int64_t begin, int64_t end) {
        block_begin = begin;
        block_keys = end - begin;
        key = key_rows<bfloat16>(p, task) + begin * p.key_strides.position;
        key_stride = p.key_strides.position;
        if (!keys_are_whole_pairs()) pad_keys();
    }

    // scores[key][query] of keys [begin, end) of the block's keys.
    void score(int64_t panel, int64_t begin, int64_t end, float* scores) {
        const float factor = score_factor(p);
        const bfloat16* rows = key + (begin - block_begin) * key_stride;
        for (int64_t k = 0; k < end - begin; k += kTile) {
            with_count(std::min<int64_t>(kTile, end - begin - k), [&](auto keys) {
                multiply_tile<keys, kPanelVectors, Pairs>(
                    RowWise<keys, bfloat16>(rows + k * key_stride, key_stride), query_panel(panel), kPanel, dim_pairs(),
                    scores + k * kPanel, kPanel, [&](Float, Float sums, int) { return sums * factor; });
            });
        }
    }

    static void store_weights(float* weights, int64_t k, int half, Float first, Float second) {
        store_weight_pairs(weights, k, half, first, second);
    }

    void add_values(int64_t, int64_t, const float*, const Float (&)[kPanelVectors], float*) {}

  protected:
    const Forward& p;
    const Task& task;
    int64_t block_begin = 0, block_keys = 0;

  private:
    float* const query;
    bfloat16* const padded_key;
    const bfloat16* key = nullptr;
    int64_t key_stride = 0;

    int64_t dim_pairs() const { return (p.head_dim + 1) / 2; }
    bool keys_are_whole_pairs() const { return p.head_dim % 2 == 0; }
    float* query_panel(int64_t panel) const { return query + panel * dim_pairs() * kPanel; }

    void pad_keys() {
        for (int64_t k = 0; k < block_keys; ++k) {
            bfloat16* to = padded_key + k * 2 * dim_pairs();
            std::memcpy(to, key + k * key_stride, p.head_dim * sizeof(bfloat16));
            to[p.head_dim] = {};
        }
        key = padded_key;
        key_stride = 2 * dim_pairs();
    }
};

class PairProducts : public PairScores {
  public:
    PairProducts(const Forward& parameters, const Task& this_task, Arena& arena)
        : PairScores(parameters, this_task, arena), value(arena.take(tiles() * kTileFloats)) {}

    static int64_t out_rows(const Forward& p) { return p.value_dim; }

    void load_block(int64_t begin, int64_t end) {
        PairScores::load_block(begin, end);
        pack_values();
    }

    // out = out * decay + value^T weights over keys [begin, end) of the block's keys, the weights in pairs.
    void add_values(int64_t begin, int64_t end, const float* weights, const Float (&decay)[kPanelVectors], float* out) {
        const int64_t first = (begin - block_begin) / 2, last = (end - block_begin + 1) / 2;
        for (int64_t tile = 0; tile < tiles(); ++tile) {
            const float* from = value + tile * kTileFloats + first * kTile;
            with_count(std::min<int64_t>(kTile, p.value_dim - tile * kTile), [&](auto dims) {
                multiply_tile<dims, kPanelVectors, Pairs>(
                    ColumnWise{from, kTile}, weights, kPanel, last - first, out + tile * kTile * kPanel, kPanel,
                    [&](Float before, Float sums, int half) { return before * decay[half] + sums; });
            });
        }
    }

  private:
    // Packing a tile's last keys writes up to a vector past them.
    static constexpr int64_t kTileFloats = kBlock / 2 * kTile + kLanes;

    float* const value;

    int64_t tiles() const { return (p.value_dim + kTile - 1) / kTile; }

    // Tiles of kTile columns, each tile pair of keys after pair, so that one stream is read.
    void pack_values() {
        const bfloat16* rows = value_rows<bfloat16>(p, task) + block_begin * p.value_strides.position;
        for (int64_t k = 0; k < block_keys; k += 2) {
            const bfloat16* first = rows + k * p.value_strides.position;
            const bfloat16* second = k + 1 < block_keys ? first + p.value_strides.position : nullptr;
            for (int64_t tile = 0; tile < tiles(); ++tile) {
                const int64_t d = tile * kTile;
                // What spills over the tile's edge is overwritten by the next pair, or never read.
                store(value + tile * kTileFloats + k / 2 * kTile,
                      pair(load_some_bits(first, d, p.value_dim), load_some_bits(second, d, p.value_dim)));
            }
        }
    }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
