// RMSNorm and LayerNorm over rows: what one call needs, and the kernels that each instruction set provides.
#pragma once

#include <cstdint>

#include "../../cpu/column_sums.h"
#include "../../cpu/isa.h"
#include "../call.h"

namespace nearpeak::norm {

struct Forward : ForwardCall {
    bool past_cache;  // write outputs past the caches; they are aligned for it

    // Whether x + residual has no place of its own while its row is normalised.
    bool needs_scratch() const { return residual && (past_cache || !hidden); }
};

using Backward = BackwardCall;

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
