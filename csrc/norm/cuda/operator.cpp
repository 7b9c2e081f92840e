// The CUDA kernels of the operators that kernels/nearpeak/norm/operator.py defines.

#include <optional>
#include <tuple>

#include "../../cuda/stream.h"
#include "kernels.h"

namespace nearpeak::norm::cuda {
namespace {

using nearpeak::cuda::OnDeviceOf;

void run_forward(const Tensor& x_any, const std::optional<Tensor>& weight_any,
                 const std::optional<Tensor>& residual_any, double eps, double offset, const Tensor& y,
                 const Tensor* hidden) {
    if (x_any.numel() == 0) return;
    const OnDeviceOf device(x_any);
    const RowsOf x(x_any, y);
    std::optional<RowsOf> residual;
    std::optional<Tensor> weight;
    if (residual_any) residual.emplace(*residual_any, y);
    if (weight_any) weight = made_contiguous(*weight_any);
    Forward p{};
    p.width = x_any.size(x_any.dim() - 1);
    p.rows = x_any.numel() / p.width;
    p.x = x.data();
    p.x_rows = x.rows;
    if (residual) {
        p.residual = residual->data();
        p.residual_rows = residual->rows;
        p.hidden = hidden->mutable_data_ptr();
    }
    p.weight = weight ? weight->const_data_ptr() : nullptr;
    p.y = y.mutable_data_ptr();
    p.eps = static_cast<float>(eps);
    p.offset = static_cast<float>(offset);
    p.dtype = dtype_of(x_any);
    p.weight_dtype = weight ? dtype_of(*weight) : p.dtype;
    forward(p, device.stream());
}

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps, double offset) {
    Tensor y = empty_laid_out_like(x);
    run_forward(x, weight, std::nullopt, eps, offset, y, nullptr);
    return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& weight,
                                        double eps, double offset) {
    Tensor y = empty_laid_out_like(x), hidden = empty_laid_out_like(x);
    run_forward(x, weight, residual, eps, offset, y, &hidden);
    return {y, hidden};
}

void rms_norm_out(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& residual,
                  double eps, double offset, Tensor out, std::optional<Tensor> residual_out) {
    run_forward(x, weight, residual, eps, offset, out, residual_out ? &*residual_out : nullptr);
}

Tensor empty_floats_beside(const Tensor& like, std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(like, sizes, torch::headeronly::ScalarType::Float);
}

// Runs the kernels of `p`, whose inputs and d_hidden are set, and writes d_weight where there is a weight.
void run_backward(Backward& p, const Tensor& hidden, Tensor* d_weight, void* stream) {
    const BackwardPlan plan = plan_backward(p);
    std::optional<Tensor> row_sums, partials;
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

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_any, const Tensor& hidden_any,
                                             const std::optional<Tensor>& weight_any,
                                             const std::optional<Tensor>& grad_hidden_any, double eps, double offset) {
    Tensor d_hidden = empty_laid_out_like(hidden_any);
    Tensor d_weight = weight_any ? empty_laid_out_like(*weight_any) : empty_like_dtype(hidden_any, {0});
    if (hidden_any.numel() == 0) return {d_hidden, torch::stable::zero_(d_weight)};
    const OnDeviceOf device(hidden_any);
    const RowsOf grad(grad_any, d_hidden), hidden(hidden_any, d_hidden);
    std::optional<RowsOf> grad_hidden;
    std::optional<Tensor> weight;
    if (grad_hidden_any) grad_hidden.emplace(*grad_hidden_any, d_hidden);
    if (weight_any) weight = made_contiguous(*weight_any);
    Backward p{};
    p.width = hidden_any.size(hidden_any.dim() - 1);
    p.rows = hidden_any.numel() / p.width;
    p.grad = grad.data();
    p.grad_rows = grad.rows;
    p.hidden = hidden.data();
    p.hidden_rows = hidden.rows;
    if (grad_hidden) {
        p.grad_hidden = grad_hidden->data();
        p.grad_hidden_rows = grad_hidden->rows;
    }
    p.weight = weight ? weight->const_data_ptr() : nullptr;
    p.d_hidden = d_hidden.mutable_data_ptr();
    p.eps = static_cast<float>(eps);
    p.offset = static_cast<float>(offset);
    p.dtype = dtype_of(hidden_any);
    p.weight_dtype = weight ? dtype_of(*weight) : p.dtype;
    run_backward(p, hidden_any, weight ? &d_weight : nullptr, device.stream());
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
