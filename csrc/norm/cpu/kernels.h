// RMSNorm over rows: what one call needs, and the kernels that each instruction set provides.
#pragma once

#include <cstdint>

#include "../../cpu/dtype.h"
#include "../../cpu/isa.h"
#include "../../cpu/rows.h"

namespace nearpeak::norm {

// Rows lie anywhere in the inputs (see Rows) and one after another in the outputs.
struct Forward {
    const void* x;
    const void* residual;  // or null
    const void* weight;    // (width,), or null
    void* y;
    void* hidden;  // x + residual; null without a residual
    Rows x_rows, residual_rows;
    int64_t width;
    float eps, offset;
    Dtype dtype, weight_dtype;
    bool past_cache;  // write outputs past the caches; they are aligned for it
};

struct Backward {
    const void* grad;
    const void* hidden;
    const void* weight;       // (width,), or null
    const void* grad_hidden;  // or null
    void* d_hidden;
    Rows grad_rows, hidden_rows, grad_hidden_rows;
    int64_t width;
    float eps, offset;
    Dtype dtype, weight_dtype;
};

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
