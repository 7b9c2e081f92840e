// The CUDA kernels of RMSNorm's operators, which kernels/nearpeak/norm/operator.py defines. LayerNorm has none.

#include <optional>
#include <tuple>

#include "../../cuda/stream.h"
#include "../describe.h"
#include "kernels.h"

namespace nearpeak::norm::cuda {
namespace {

using nearpeak::cuda::OnDeviceOf;

void run_forward(const Tensor& x, const Optional& residual, const Optional& weight, const Formula& formula,
                 const Tensor& y, const Tensor* hidden) {
    if (x.numel() == 0) return;
    const OnDeviceOf device(x);
    forward(DescribedForward(x, residual, weight, std::nullopt, formula, y, hidden).call, device.stream());
}

Tensor rms_norm(const Tensor& x, const Optional& weight, double eps, double offset, bool cast_first) {
    Tensor y = empty_laid_out_like(x);
    run_forward(x, std::nullopt, weight, rms_norm_formula(eps, offset, cast_first), y, nullptr);
    return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Optional& weight, double eps,
                                        double offset, bool cast_first) {
    Tensor y = empty_laid_out_like(x), hidden = empty_laid_out_like(x);
    run_forward(x, residual, weight, rms_norm_formula(eps, offset, cast_first), y, &hidden);
    return {y, hidden};
}

void rms_norm_out(const Tensor& x, const Optional& weight, const Optional& residual, double eps, double offset,
                  bool cast_first, Tensor out, Optional residual_out) {
    run_forward(x, residual, weight, rms_norm_formula(eps, offset, cast_first), out,
                residual_out ? &*residual_out : nullptr);
}

Tensor empty_floats_beside(const Tensor& like, std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(like, sizes, torch::headeronly::ScalarType::Float);
}

// Runs the kernels of `p`, whose inputs and d_hidden are set, and writes d_weight where there is a weight.
void run_backward(Backward& p, const Tensor& hidden, Tensor* d_weight, void* stream) {
    const BackwardPlan plan = plan_backward(p);
    Optional row_sums, partials;
    if (plan.row_sums) {
        row_sums = empty_floats_beside(hidden, {2, p.rows});
        p.row_sums = static_cast<float*>(row_sums->mutable_data_ptr());
    }
    if (d_weight) {
        partials = empty_floats_beside(hidden, {plan.partials, p.width});
        p.partials = static_cast<float*>(partials->mutable_data_ptr());
    }
    backward(p, stream);
    if (d_weight)
        sum_partials({p.partials, plan.partials, p.width, d_weight->mutable_data_ptr(), p.weight_dtype}, stream);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& hidden, const Optional& weight,
                                             const Optional& grad_hidden, double eps, double offset) {
    Tensor d_hidden = empty_laid_out_like(hidden);
    Tensor d_weight = weight ? empty_laid_out_like(*weight) : empty_like_dtype(hidden, {0});
    if (hidden.numel() == 0) return {d_hidden, torch::stable::zero_(d_weight)};
    const OnDeviceOf device(hidden);
    const DescribedBackward described(grad, hidden, weight, std::nullopt, grad_hidden,
                                      rms_norm_formula(eps, offset, false), d_hidden);
    Backward p{described.call, nullptr, nullptr};
    run_backward(p, hidden, weight ? &d_weight : nullptr, device.stream());
    return {d_hidden, d_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearpeak_cuda, NEARPEAK_CUDA_KEY, library) {
    library.impl("rms_norm", TORCH_BOX(&rms_norm));
    library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
    library.impl("rms_norm_out", TORCH_BOX(&rms_norm_out));
    library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace nearpeak::norm::cuda
