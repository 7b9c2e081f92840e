// RMSNorm and LayerNorm over rows: what one call needs, and the kernels that each instruction set provides.
#pragma once

#include <cstdint>

#include "../../cpu/isa.h"
#include "../call.h"

namespace nearpeak::norm {

struct Forward : ForwardCall {
    bool past_cache;  // write outputs past the caches; they are aligned for it

    // Whether x + residual has no place of its own while its row is normalised.
    bool needs_scratch() const { return residual && (past_cache || !hidden); }
};

using Backward = BackwardCall;

// Sums over rows, one float32 for each column, that backward adds to. They are kept as the instruction set likes them,
// and only sum_parts can read them; a row of them holds padded(width) floats.
struct ColumnSums {
    float *weight, *bias;  // either null where its gradient is not wanted
};

constexpr int64_t kMostLanes = 16;
constexpr int64_t padded(int64_t width) { return (width + kMostLanes - 1) / kMostLanes * kMostLanes; }

// sum_parts may begin at multiples of this many columns.
constexpr int64_t kColumnBlock = 2 * kMostLanes;

struct Parts {
    const float* sums;
    int64_t count, stride;  // floats from one part to the next
};

struct Kernels {
    // Rows [begin, end). `scratch` holds a row of x's type where the call needs it.
    void (*forward)(const Forward&, int64_t begin, int64_t end, void* scratch);
    // Rows [begin, end); adds their gradients of weight and bias to the sums.
    void (*backward)(const Backward&, int64_t begin, int64_t end, ColumnSums sums);
    // total[column] = sum of all parts' column, for columns [begin, end) of the call's width, in the weight's type.
    void (*sum_parts)(const Backward&, Parts parts, void* total, int64_t begin, int64_t end);
};

NEARPEAK_ISAS(NEARPEAK_DECLARE_KERNELS)

}  // namespace nearpeak::norm
