// What a call of RMSNorm or LayerNorm is, on any device. Rows lie anywhere in the inputs (see Rows) and one after
// another in the outputs.
#pragma once

#include <cstdint>

#include "../cpu/dtype.h"
#include "../cpu/rows.h"

namespace nearpeak::norm {

// RMSNorm, or where `centred` LayerNorm, whose offset is 0.
struct Formula {
    float eps, offset;
    bool centred;
    bool cast_first;  // forward, the normalised value is rounded to the input's type before the weight
};

inline Formula rms_norm_formula(double eps, double offset, bool cast_first) {
    return {static_cast<float>(eps), static_cast<float>(offset), false, cast_first};
}

inline Formula layer_norm_formula(double eps) { return {static_cast<float>(eps), 0.0f, true, false}; }

struct ForwardCall : Formula {
    const void* x;
    const void* residual;  // or null
    const void* weight;    // (width,), or null
    const void* bias;      // (width,), or null, as always for RMSNorm
    void* y;
    void* hidden;  // x + residual; null without a residual, or where the caller does not want it
    Rows x_rows, residual_rows;
    int64_t rows, width;
    Dtype dtype, weight_dtype;  // the bias is of the weight's type
};

struct BackwardCall : Formula {
    const void* grad;
    const void* hidden;
    const void* weight;       // (width,), or null
    const void* grad_hidden;  // or null
    void* d_hidden;
    Rows grad_rows, hidden_rows, grad_hidden_rows;
    int64_t rows, width;
    Dtype dtype, weight_dtype;
};

}  // namespace nearpeak::norm
