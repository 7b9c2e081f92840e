// Attention's forward pass: what one call needs, and the kernels that each instruction set provides.
#pragma once

#include <cstdint>

#include "../../cpu/dtype.h"
#include "../../cpu/isa.h"

namespace nearpeak::attention {

// (batch, heads, length, head_dim), dense in the last dimension; strides in elements.
struct Strides {
    int64_t batch, head, position;
};

struct Forward {
    const void* query;
    const void* key;
    const void* value;
    void* out;
    float* lse;  // (batch, heads, query length), contiguous
    Strides query_strides, key_strides, value_strides, out_strides;
    int64_t batch, heads, key_heads, query_length, key_length, head_dim;
    float scale;
    float softcap;                      // 0 for none
    int64_t window_left, window_right;  // keys p - left .. p + right of position p; large where open
    Dtype dtype;

    // Rows are the (position, head) pairs that share one key head, heads of a position next to each other: so that
    // grouped heads share what is loaded, and a run of rows spans few positions under a causal mask.
    int64_t group() const { return heads / key_heads; }
    int64_t rows() const { return query_length * group(); }
};

// Rows of a decode task at most.
constexpr int64_t kDecodeRows = 8;

// Rows [row_begin, row_end) of one batch entry and key head, over keys [key_begin, key_end).
struct Task {
    int64_t batch, key_head, row_begin, row_end, key_begin, key_end;
};

struct Kernels {
    // Floats of scratch memory that a task of so many rows needs.
    int64_t (*prefill_scratch)(const Forward&, int64_t rows);
    // Many rows: queries lie across the lanes of a vector.
    void (*prefill)(const Forward&, const Task&, float* scratch);

    int64_t (*decode_scratch)(const Forward&, int64_t rows);
    // Few rows: head_dim lies across the lanes. With `partial`, writes per row the maximum (base 2), the sum and
    // the unscaled output, head_dim + 2 floats, for `merge`; else out and lse.
    void (*decode)(const Forward&, const Task&, float* scratch, float* partial);
    // Rows of `task` from `count` partial results, `partial_stride` floats apart.
    void (*merge)(const Forward&, const Task& task, const float* partials, int64_t count, int64_t partial_stride);
};

NEARPEAK_ISAS(NEARPEAK_DECLARE_KERNELS)

}  // namespace nearpeak::attention
