// RMSNorm on CUDA devices: what one call needs, and its launchers.
#pragma once

#include "../call.h"

namespace nearpeak::norm::cuda {

using Forward = ForwardCall;

struct Backward : BackwardCall {
    float* partials;  // (plan.partials, width): shares of the weight's gradient; null without a weight
    float* row_sums;  // (2, rows) where plan.row_sums, else null
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
