// What a call of RMSNorm is, on any device. Rows lie anywhere in the inputs (see Rows) and one after another in the
// outputs.
#pragma once

#include <cstdint>

#include "../cpu/dtype.h"
#include "../cpu/rows.h"

namespace nearpeak::norm {

struct ForwardCall {
    const void* x;
    const void* residual;  // or null
    const void* weight;    // (width,), or null
    void* y;
    void* hidden;  // x + residual; null without a residual
    Rows x_rows, residual_rows;
    int64_t rows, width;
    float eps, offset;
    Dtype dtype, weight_dtype;
};

struct BackwardCall {
    const void* grad;
    const void* hidden;
    const void* weight;       // (width,), or null
    const void* grad_hidden;  // or null
    void* d_hidden;
    Rows grad_rows, hidden_rows, grad_hidden_rows;
    int64_t rows, width;
    float eps, offset;
    Dtype dtype, weight_dtype;
};

}  // namespace nearpeak::norm
