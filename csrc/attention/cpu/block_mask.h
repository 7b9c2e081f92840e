// Which keys a row may look at by a block mask: tables that list, for each block of queries, the blocks of keys that it
// sees, and of each whether it is seen whole or what of it (kernels/nearpeak/attention/block_mask.py).
//
// The tables count queries and keys in the tensors; here, as everywhere else, both are counted in their sequence.
#pragma once

#include <algorithm>
#include <cstring>

#include "mask.h"

namespace nearpeak::attention {

struct BlockEntries {
    const BlockEntry *first, *last;
};

inline BlockEntries entries_of(const Call& p, int64_t batch, int64_t head, int64_t block) {
    const int64_t* at = p.blocks.starts + batch * p.blocks.batch_stride + head * p.blocks.head_stride + block;
    return {p.blocks.entries + at[0], p.blocks.entries + at[1]};
}

// Without those of keys before `key` of the tensor.
inline BlockEntries from_key(const Call& p, BlockEntries entries, int64_t key) {
    const auto before = [](const BlockEntry& entry, int64_t block) { return entry.block < block; };
    return {std::lower_bound(entries.first, entries.last, key / p.blocks.keys, before), entries.last};
}

// Keys of a block, of the sequence's keys [begin, end).
inline KeyRange keys_of_block(const Call& p, const Sequence& sequence, int64_t block, int64_t begin, int64_t end) {
    const int64_t first = block * p.blocks.keys - sequence.key_begin;
    return {std::clamp(first, begin, end), std::clamp(first + p.blocks.keys, begin, end)};
}

// Calls function(entries) for all blocks of queries, and heads, that rows [row_begin, row_end) lie in.
template <class Function>
void for_each_list(const Call& p, const Sequence& sequence, int64_t key_head, int64_t row_begin, int64_t row_end,
                   Function function) {
    const int64_t heads = p.blocks.head_stride == 0 ? 1 : p.group();
    const int64_t first = (sequence.query_begin + row_begin / p.group()) / p.blocks.rows;
    const int64_t last = (sequence.query_begin + (row_end - 1) / p.group()) / p.blocks.rows;
    for (int64_t block = first; block <= last; ++block) {
        for (int64_t head = 0; head < heads; ++head) {
            function(entries_of(p, sequence.batch, key_head * p.group() + head, block));
        }
    }
}

// Keys outside of which the rows may look at none.
inline KeyRange listed_keys(const Call& p, const Sequence& sequence, int64_t key_head, int64_t row_begin,
                            int64_t row_end) {
    KeyRange keys{sequence.key_length, 0};
    for_each_list(p, sequence, key_head, row_begin, row_end, [&](BlockEntries all) {
        const BlockEntries entries = from_key(p, all, sequence.key_begin);
        if (entries.first == entries.last) return;
        const auto keys_of = [&](const BlockEntry& entry) {
            return keys_of_block(p, sequence, entry.block, 0, sequence.key_length);
        };
        keys = {std::min(keys.begin, keys_of(*entries.first).begin), std::max(keys.end, keys_of(entries.last[-1]).end)};
    });
    return keys.begin < keys.end ? keys : KeyRange{0, 0};
}

// Of the blocks of keys that keys [begin, end) of a sequence lie in, kMostKeys keys at most: how many of some rows'
// lists have them, and how many have them whole.
class SeenBlocks {
  public:
    static constexpr int64_t kMostKeys = 256;

    SeenBlocks(const Call& p, const Task& task, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end)
        : first((task.sequence.key_begin + begin) / p.blocks.keys),
          last((task.sequence.key_begin + end - 1) / p.blocks.keys + 1) {
        std::fill_n(seen, last - first, 0);
        std::fill_n(whole, last - first, 0);
        for_each_list(p, task.sequence, task.key_head, row_begin, row_end, [&](BlockEntries all) {
            ++lists;
            const BlockEntries entries = from_key(p, all, task.sequence.key_begin + begin);
            for (const BlockEntry* entry = entries.first; entry != entries.last && entry->block < last; ++entry) {
                ++seen[entry->block - first];
                whole[entry->block - first] += entry->part < 0;
            }
        });
    }

    const int64_t first, last;
    bool is_seen(int64_t block) const { return seen[block - first] > 0; }
    bool is_whole(int64_t block) const { return whole[block - first] == lists; }

    // Whether all rows see all keys.
    bool all_whole() const {
        return std::all_of(whole, whole + (last - first), [&](int64_t count) { return count == lists; });
    }

  private:
    int64_t lists = 0;
    int16_t seen[kMostKeys + 1], whole[kMostKeys + 1];
};

// Calls function(first, last, whole) for the runs of keys of [begin, end) that some of the rows see, `whole` where all
// rows see all of them. Runs begin a multiple of `step` after `begin`, with keys that none sees if need be.
template <class Function>
void for_each_run(const Call& p, const Task& task, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
                  int64_t step, Function function) {
    if (!p.blocks.starts) return function(begin, end, true);
    const SeenBlocks blocks(p, task, row_begin, row_end, begin, end);
    KeyRange run{begin, begin};
    bool whole = true;
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
        if (!blocks.is_seen(block)) continue;
        const KeyRange keys = keys_of_block(p, task.sequence, block, begin, end);
        const int64_t stepped = begin + (keys.begin - begin) / step * step;
        const bool starts = run.begin == run.end, goes_on = keys.begin == run.end || stepped < run.end;
        if (starts || !goes_on) {
            if (!starts) function(run.begin, run.end, whole);
            run.begin = run.end = stepped;
            whole = true;
        }
        whole = whole && keys.begin == run.end && blocks.is_whole(block);
        run.end = keys.end;
    }
    if (run.end > run.begin) function(run.begin, run.end, whole);
}

// Calls function(first, count, bits) for the pieces of keys [begin, end) that a row's blocks see: all keys from `first`
// on where `bits` is null, else those whose byte is 1.
template <class Function>
void for_each_piece(const Call& p, const Task& task, int64_t row, int64_t begin, int64_t end, Function function) {
    const auto& [starts, entries, bits, batch_stride, head_stride, rows, keys] = p.blocks;
    const int64_t position = task.sequence.query_begin + row / p.group(), shift = task.sequence.key_begin;
    const int64_t head = task.key_head * p.group() + row % p.group();
    const BlockEntries all = entries_of(p, task.sequence.batch, head, position / rows);
    const BlockEntries listed = from_key(p, all, shift + begin);
    for (const BlockEntry* entry = listed.first; entry != listed.last; ++entry) {
        const auto [first, last] = keys_of_block(p, task.sequence, entry->block, begin, end);
        if (first >= last) break;
        const int64_t at = (entry->part * rows + position % rows) * keys + (shift + first) % keys;
        function(first, last - first, entry->part < 0 ? nullptr : bits + at);
    }
}

// to[k - begin] = 1 where a row may look at key k of [begin, end), else 0.
inline void write_permissions(const Call& p, const Task& task, int64_t row, int64_t begin, int64_t end, uint8_t* to) {
    std::memset(to, 0, end - begin);
    for_each_piece(p, task, row, begin, end, [&](int64_t first, int64_t count, const uint8_t* bits) {
        if (bits) {
            std::memcpy(to + first - begin, bits, count);
        } else {
            std::memset(to + first - begin, 1, count);
        }
    });
}

// How many of the sequence's keys `keys` a row may look at.
inline int64_t count_seen(const Call& p, const Task& task, int64_t row, KeyRange keys) {
    if (!p.blocks.starts) return keys.end - keys.begin;
    int64_t seen = 0;
    for_each_piece(p, task, row, keys.begin, keys.end, [&](int64_t, int64_t count, const uint8_t* bits) {
        seen += bits ? std::count(bits, bits + count, 1) : count;
    });
    return seen;
}

}  // namespace nearpeak::attention
