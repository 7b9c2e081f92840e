// How backward's keys are cut into tasks, which rows each of them visits, and in which order they add to a row.
#pragma once

#include <utility>
#include <vector>

#include "../../cpu/tensors.h"
#include "block_mask.h"

namespace nearpeak::attention {

// Keys that some row in [row_begin, row_end) may look at lie within.
inline KeyRange keys_of_rows(const Call& p, const Sequence& sequence, int64_t key_head, int64_t row_begin,
                             int64_t row_end) {
    const KeyRange allowed = allowed_keys(p, sequence, row_begin, row_end);
    if (!p.blocks.starts) return allowed;
    const KeyRange listed = listed_keys(p, sequence, key_head, row_begin, row_end);
    const int64_t begin = std::max(allowed.begin, listed.begin);
    return {begin, std::max(begin, std::min(allowed.end, listed.end))};
}

// A block of a pair's keys, and in which order it adds to rows: see Order.
struct KeyBlock {
    Task task;
    int64_t before;
    std::vector<Visit> visits;
};

// Which blocks of a pair's rows may look at which blocks of its keys, by a block mask.
class SeenGrid {
  public:
    SeenGrid(const Call& p, const Sequence& sequence, int64_t key_head)
        : columns(divide_up(sequence.key_length, kBlockKeys)),
          latest(divide_up(p.rows(sequence), kBlockRows), -1),
          seen(latest.size() * columns) {
        for (size_t block = 0; block < latest.size(); ++block) {
            const int64_t row = static_cast<int64_t>(block) * kBlockRows;
            const int64_t end = std::min(row + kBlockRows, p.rows(sequence));
            for_each_list(p, sequence, key_head, row, end, [&](BlockEntries all) {
                const BlockEntries entries = from_key(p, all, sequence.key_begin);
                for (const BlockEntry* entry = entries.first; entry != entries.last; ++entry) {
                    const auto [first, last] = keys_of_block(p, sequence, entry->block, 0, sequence.key_length);
                    for (int64_t key = first / kBlockKeys; key * kBlockKeys < last; ++key) {
                        seen[block * columns + key] = true;
                    }
                }
            });
        }
    }

    // Visits of the blocks of rows in `rows` by the task of number `own`, which holds keys from `key` on.
    std::vector<Visit> visits(int64_t key, RowRange rows, int64_t own) {
        std::vector<Visit> result;
        for (int64_t row = rows.begin / kBlockRows * kBlockRows; row < rows.end; row += kBlockRows) {
            const int64_t block = row / kBlockRows;
            if (!seen[block * columns + key / kBlockKeys]) continue;
            result.push_back({row, std::exchange(latest[block], own)});
        }
        return result;
    }

  private:
    const int64_t columns;
    std::vector<int64_t> latest;  // task that visits a block of rows
    std::vector<uint8_t> seen;    // blocks of rows x blocks of keys
};

// All pairs' first keys come before any pair's second: under a causal mask those with the most rows first, and as far
// as can be from the task whose turn is before theirs.
inline std::vector<KeyBlock> key_blocks(const Backward& p, const std::vector<int64_t>& pairs) {
    std::vector<KeyBlock> blocks;
    std::vector<int64_t> latest(pairs.size(), -1);
    std::vector<SeenGrid> grids;
    for (size_t index = 0; p.blocks.starts && index < pairs.size(); ++index) {
        grids.emplace_back(p, p.sequences[pairs[index] / p.key_heads], pairs[index] % p.key_heads);
    }
    for (int64_t key = 0; key < p.key_length; key += kBlockKeys) {
        for (size_t index = 0; index < pairs.size(); ++index) {
            const Sequence& sequence = p.sequences[pairs[index] / p.key_heads];
            if (key >= sequence.key_length) continue;
            const int64_t end = std::min(key + kBlockKeys, sequence.key_length);
            const RowRange rows = allowed_rows(p, sequence, key, end);
            const Task task{sequence, pairs[index] % p.key_heads, rows.begin / kBlockRows * kBlockRows, rows.end, key,
                            end};
            const int64_t own = static_cast<int64_t>(blocks.size()), before = std::exchange(latest[index], own);
            blocks.push_back(
                {task, before, grids.empty() ? std::vector<Visit>() : grids[index].visits(key, rows, own)});
        }
    }
    return blocks;
}

}  // namespace nearpeak::attention
