// What a block of rows and a block of keys see of each other in backward.
#pragma once

#include <algorithm>

#include "block_mask.h"
#include "panel.h"

namespace nearpeak::attention::NEARPEAK_ISA {

// From one row's scores to the next, spread as below.
constexpr int64_t kScoreStride = kBlockKeys + 16;

inline int64_t in_panels(int64_t dim) { return (dim + kPanel - 1) / kPanel * kPanel; }

// An odd number of cache lines from one row to the next spreads rows over all sets of a cache.
inline int64_t spread(int64_t row) {
    constexpr int64_t kFloatsPerLine = 16;
    return ((row + kFloatsPerLine - 1) / kFloatsPerLine | 1) * kFloatsPerLine;
}

// Rows [first_row, first_row + rows) of the task with all its keys.
struct BackwardView {
    BackwardView(const Backward& parameters, const Task& this_task)
        : p(parameters),
          task(this_task),
          keys(this_task.key_end - this_task.key_begin),
          first_key_block((this_task.sequence.key_begin + this_task.key_begin) / std::max<int64_t>(1, p.blocks.keys)) {}

    const Backward& p;
    const Task& task;
    const int64_t keys;
    int64_t first_row = 0, rows = 0;
    bool whole = true;  // whether no block mask hides any of the keys from any of the rows

    void look_at(int64_t row, int64_t count) {
        first_row = row;
        rows = count;
        if (p.blocks.starts) look_at_blocks();
    }

    // Rows of the block, from its first, that may look at one of the block's keys [begin, end).
    RowRange rows_that_see(int64_t begin, int64_t end) const {
        const RowRange all =
            allowed_rows(p, task.sequence, task.key_begin + begin, task.key_begin + std::min(end, keys));
        const RowRange within{std::clamp<int64_t>(all.begin - first_row, 0, rows),
                              std::clamp<int64_t>(all.end - first_row, 0, rows)};
        return whole ? within : listed_rows(within, begin, std::min(end, keys));
    }

    // Keys of the block, from its first, that one of the block's rows [begin, end) may look at.
    KeyRange keys_seen_by(int64_t begin, int64_t end) const {
        const KeyRange all = allowed_keys(p, task.sequence, first_row + begin, first_row + std::min(end, rows));
        const KeyRange within{std::clamp<int64_t>(all.begin - task.key_begin, 0, keys),
                              std::clamp<int64_t>(all.end - task.key_begin, 0, keys)};
        return whole ? within : listed_keys_of(within, begin, std::min(end, rows));
    }

    template <class T>
    const T* query(int64_t row) const {
        return query_row<T>(p, task, first_row + row);
    }
    template <class T>
    const T* grad_out(int64_t row) const {
        return row_in(static_cast<const T*>(p.grad_out), p.grad_out_strides, p, task, first_row + row);
    }
    template <class T>
    const T* key(int64_t k) const {
        return key_rows<T>(p, task) + (task.key_begin + k) * p.key_strides.position;
    }
    template <class T>
    const T* value(int64_t k) const {
        return value_rows<T>(p, task) + (task.key_begin + k) * p.value_strides.position;
    }

  private:
    // Of a block mask's blocks of queries and of keys that rows and keys lie in, whether one sees the other.
    static constexpr int64_t kMostBlocks = 2 * kBlockRows + 1, kMostKeyBlocks = kBlockKeys + 1;
    const int64_t first_key_block;
    int64_t first_block = 0;
    uint8_t seen[kMostBlocks * kMostKeyBlocks];

    int64_t block_of(int64_t row) const {
        return (task.sequence.query_begin + (first_row + row) / p.group()) / p.blocks.rows - first_block;
    }
    int64_t key_block_of(int64_t k) const {
        return (task.sequence.key_begin + task.key_begin + k) / p.blocks.keys - first_key_block;
    }
    // Where a block begins, counted as the view counts.
    int64_t first_row_of(int64_t block) const {
        return ((first_block + block) * p.blocks.rows - task.sequence.query_begin) * p.group() - first_row;
    }
    int64_t first_key_of(int64_t block) const {
        return (first_key_block + block) * p.blocks.keys - task.sequence.key_begin - task.key_begin;
    }

    void look_at_blocks() {
        first_block = 0;
        first_block = block_of(0);
        whole = true;
        for (int64_t block = 0; block <= block_of(rows - 1); ++block) {
            const int64_t begin = std::max<int64_t>(first_row_of(block), 0);
            const int64_t end = std::min(first_row_of(block + 1), rows);
            const SeenBlocks keys_of(p, task, first_row + begin, first_row + end, task.key_begin, task.key_end);
            for (int64_t k = keys_of.first; k < keys_of.last; ++k) {
                seen[block * kMostKeyBlocks + k - first_key_block] = keys_of.is_seen(k);
            }
            whole = whole && keys_of.all_whole();
        }
    }

    // Those of the rows between the first and the last that see one of keys [begin, end), to whole blocks.
    RowRange listed_rows(RowRange within, int64_t begin, int64_t end) const {
        const auto sees = [&](int64_t block) {
            const uint8_t* const blocks = seen + block * kMostKeyBlocks;
            return std::any_of(blocks + key_block_of(begin), blocks + key_block_of(end - 1) + 1,
                               [](uint8_t each) { return each; });
        };
        if (within.begin >= within.end) return {0, 0};
        int64_t first = block_of(within.begin), last = block_of(within.end - 1);
        while (first <= last && !sees(first)) ++first;
        while (first <= last && !sees(last)) --last;
        if (first > last) return {0, 0};
        return {std::max(within.begin, first_row_of(first)), std::min(within.end, first_row_of(last + 1))};
    }

    // Likewise of the keys, those that one of rows [begin, end) sees.
    KeyRange listed_keys_of(KeyRange within, int64_t begin, int64_t end) const {
        const auto is_seen = [&](int64_t key_block) {
            for (int64_t block = block_of(begin); block <= block_of(end - 1); ++block) {
                if (seen[block * kMostKeyBlocks + key_block]) return true;
            }
            return false;
        };
        if (within.begin >= within.end) return {0, 0};
        int64_t first = key_block_of(within.begin), last = key_block_of(within.end - 1);
        while (first <= last && !is_seen(first)) ++first;
        while (first <= last && !is_seen(last)) --last;
        if (first > last) return {0, 0};
        return {std::max(within.begin, first_key_of(first)), std::min(within.end, first_key_of(last + 1))};
    }
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
