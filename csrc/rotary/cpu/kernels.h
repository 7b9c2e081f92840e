// Rotary position embedding: what one call needs, and the kernel that each instruction set provides.
#pragma once

#include <cstdint>

#include "../../cpu/dtype.h"
#include "../../cpu/isa.h"

namespace nearpeak::rotary {

// One of query and key: (batch, heads, sequence, head_dim), dense in the last dimension. `to` may be `from`.
struct Heads {
    const void* from;
    void* to;
    int64_t heads;
    int64_t from_batch, from_head, from_position;  // strides in elements
    int64_t to_batch, to_head, to_position;
};

struct Rotation {
    Heads query, key;
    const void* cos;  // (batch or 1, sequence, head_dim / 2 or more), dense in the last dimension
    const void* sin;
    int64_t cos_batch, cos_position, sin_batch, sin_position;  // strides in elements
    int64_t head_dim;
    bool interleaved, inverse;
    Dtype dtype, table_dtype;
};

struct Kernels {
    // Floats of scratch memory that so many positions need.
    int64_t (*scratch)(const Rotation&, int64_t positions);
    // Positions [begin, end) of one batch entry, in every head.
    void (*rotate)(const Rotation&, int64_t batch, int64_t begin, int64_t end, float* scratch);
};

NEARPEAK_ISAS(NEARPEAK_DECLARE_KERNELS)

}  // namespace nearpeak::rotary
