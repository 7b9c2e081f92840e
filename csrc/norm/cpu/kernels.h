// RMSNorm over rows: what one call needs, and the kernels that each instruction set provides.
#pragma once

#include <cstdint>

#include "../../cpu/isa.h"
#include "../call.h"

namespace nearpeak::norm {

struct Forward : ForwardCall {
    bool past_cache;  // write outputs past the caches; they are aligned for it
};

using Backward = BackwardCall;

struct Kernels {
    // Rows [begin, end). `scratch` holds a row of x's type where outputs are written past the caches.
    void (*forward)(const Forward&, int64_t begin, int64_t end, void* scratch);
    // Rows [begin, end); adds their weight gradient to d_weight (width,), unless null.
    void (*backward)(const Backward&, int64_t begin, int64_t end, float* d_weight);
    // total[column] = sum over parts of parts[part][column], for columns [begin, end), stored as `dtype`.
    void (*sum_parts)(const float* parts, int64_t count, int64_t width, void* total, Dtype dtype, int64_t begin,
                      int64_t end);
};

NEARPEAK_ISAS(NEARPEAK_DECLARE_KERNELS)

}  // namespace nearpeak::norm
