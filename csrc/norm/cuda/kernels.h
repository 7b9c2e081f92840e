// RMSNorm on CUDA devices: what one call needs, and its launchers.
#pragma once

#include <cstdint>

#include "../../cpu/dtype.h"
#include "../../cpu/rows.h"

namespace nearpeak::norm::cuda {

// Rows lie anywhere in the inputs (see Rows) and one after another in the outputs.
struct Forward {
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

struct Backward {
    const void* grad;
    const void* hidden;
    const void* weight;       // (width,), or null
    const void* grad_hidden;  // or null
    void* d_hidden;
    float* partials;  // (plan.partials, width): shares of the weight's gradient; null without a weight
    float* row_sums;  // (2, rows) where plan.row_sums, else null
    Rows grad_rows, hidden_rows, grad_hidden_rows;
    int64_t rows, width;
    float eps, offset;
    Dtype dtype, weight_dtype;
};

struct BackwardPlan {
    int64_t partials;
    bool row_sums;
};

struct PartialSum {
    const float* partials;
    int64_t count, width;
    void* total;  // (width,)
    Dtype dtype;
};

// On the current device. `stream` is a cudaStream_t. None of them is for calls without elements.
void forward(const Forward& call, void* stream);
BackwardPlan plan_backward(const Backward& call);
void backward(const Backward& call, void* stream);
void sum_partials(const PartialSum& call, void* stream);

}  // namespace nearpeak::norm::cuda
