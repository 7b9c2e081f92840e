// From the tensors of a block mask to what the kernels read: whether they fit, and whether their numbers do.
#pragma once

#include "../../cpu/tensors.h"
#include "kernels.h"

namespace nearpeak::attention {

// As kernels/nearpeak/attention/block_mask.py describes them; contiguous.
struct BlockTensors {
    Tensor starts, entries, bits;
};

inline BlockTables tables_of(const BlockTensors& blocks) {
    const auto& [starts, entries, bits] = blocks;
    const int64_t width = starts.size(2);
    return {static_cast<const int64_t*>(starts.const_data_ptr()),
            static_cast<const BlockEntry*>(entries.const_data_ptr()),
            static_cast<const uint8_t*>(bits.const_data_ptr()),
            starts.size(0) == 1 ? 0 : starts.size(1) * width,
            starts.size(1) == 1 ? 0 : width,
            bits.size(1),
            bits.size(2)};
}

inline bool are_block_tensors(const Tensor& starts, const Tensor& entries, const Tensor& bits, const Tensor& query) {
    using torch::headeronly::ScalarType;
    if (starts.dim() != 3 || entries.dim() != 2 || bits.dim() != 3 || query.dim() != 4 || !starts.is_cpu() ||
        !entries.is_cpu() || !bits.is_cpu() || starts.scalar_type() != ScalarType::Long ||
        entries.scalar_type() != ScalarType::Int || bits.scalar_type() != ScalarType::Bool || bits.size(1) < 1 ||
        bits.size(2) < 1) {
        return false;
    }
    for (int dim = 0; dim < 2; ++dim) {
        if (starts.size(dim) != 1 && starts.size(dim) != query.size(dim)) return false;
    }
    return entries.size(1) == 2 && starts.size(2) == divide_up(query.size(2), bits.size(1)) + 1;
}

// Whether each list lies within the entries, rises, and names keys and bits that there are.
inline bool lists_fit(const BlockTensors& blocks, int64_t keys) {
    const BlockTables tables = tables_of(blocks);
    const int64_t all = blocks.entries.size(0), parts = blocks.bits.size(0), width = blocks.starts.size(2);
    const int64_t key_blocks = divide_up(keys, tables.keys);
    for (int64_t list = 0; list < blocks.starts.numel(); ++list) {
        if (list % width == width - 1) continue;
        const int64_t begin = tables.starts[list], end = tables.starts[list + 1];
        if (begin < 0 || begin > end || end > all) return false;
        for (int64_t i = begin, least = 0; i < end; ++i) {
            const auto [block, part] = tables.entries[i];
            if (block < least || block >= key_blocks || part < -1 || part >= parts) return false;
            least = int64_t{block} + 1;
        }
    }
    return true;
}

inline BlockTensors readable_blocks(const Tensor& starts, const Tensor& entries, const Tensor& bits,
                                    const Tensor& query, const Tensor& key) {
    require(are_block_tensors(starts, entries, bits, query) && key.dim() == 4, "attention_blocks");
    BlockTensors blocks{made_contiguous(starts), made_contiguous(entries), made_contiguous(bits)};
    require(lists_fit(blocks, key.size(2)), "attention_blocks");
    return blocks;
}

}  // namespace nearpeak::attention
