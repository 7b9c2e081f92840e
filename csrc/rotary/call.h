// What a call of rotary embedding is, on any device.
#pragma once

#include <cstdint>

#include "../cpu/dtype.h"

namespace nearpeak::rotary {

// One of query and key: (batch, heads, sequence, head_dim), dense in the last dimension. `to` may be `from`.
struct Heads {
    const void* from;
    void* to;
    int64_t heads;
    int64_t from_batch, from_head, from_position;  // strides in elements
    int64_t to_batch, to_head, to_position;
};

struct Call {
    Heads query, key;
    const void* cos;  // (batch or 1, sequence, rotary_dim / 2 or more), dense in the last dimension
    const void* sin;
    int64_t cos_batch, cos_position, sin_batch, sin_position;  // strides in elements; 0 where batches share a table
    int64_t batch, sequence;
    int64_t rotary_dim;  // how many elements of each head turn, its first
    int64_t rest;        // how many after them are copied: none where every `to` is its `from`
    bool interleaved, inverse;
    Dtype dtype, table_dtype;
};

}  // namespace nearpeak::rotary
