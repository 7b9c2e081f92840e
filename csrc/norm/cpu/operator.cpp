// The CPU kernels of the operators that kernels/nearpeak/norm/operator.py defines.

#include <optional>
#include <tuple>

#include "../../cpu/row_parts.h"
#include "../../cpu/scratch.h"
#include "../../cpu/tensors.h"
#include "../describe.h"
#include "kernels.h"

namespace nearpeak::norm {
namespace {

const Kernels* const kKernels[] = {NEARPEAK_ISAS(NEARPEAK_KERNELS_OF)};

bool aligned(const void* pointer, int64_t row_bytes) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 64 == 0 && row_bytes % 64 == 0;
}

bool are_parameters_of(const Optional& weight, const Optional& bias, const Tensor& x) {
    return is_parameter_of(weight, x) && is_parameter_of(bias, x) &&
           (!weight || !bias || weight->scalar_type() == bias->scalar_type());
}

bool is_like(const Optional& tensor, const Tensor& x) { return !tensor || nearpeak::is_like(*tensor, x); }

bool is_out_like(const Optional& out, const Tensor& x) { return is_like(out, x) && (!out || out->is_contiguous()); }

bool has_width(const Tensor& x) { return x.dim() > 0 && x.sizes().back() > 0 && x.is_cpu(); }

void run_forward(const Tensor& x, const Optional& residual, const Optional& weight, const Optional& bias,
                 const Formula& formula, const Tensor& y, const Tensor* hidden, bool reused) {
    const int64_t elements = x.numel();
    if (elements == 0) return;
    const DescribedForward described(x, residual, weight, bias, formula, y, hidden);
    Forward p{described.call, false};
    const int64_t element_size = static_cast<int64_t>(x.element_size());
    p.past_cache = reused && elements * element_size >= past_cache_bytes() && aligned(p.y, p.width * element_size) &&
                   aligned(p.hidden, p.width * element_size);
    const Kernels* kernels = kKernels[selected_isa()];
    torch::stable::parallel_for(0, p.rows, rows_per_thread(p.width), [&](int64_t begin, int64_t end) {
        kernels->forward(p, begin, end, thread_scratch(p.needs_scratch() ? p.width : 0));
    });
}

Tensor rms_norm(const Tensor& x, const Optional& weight, double eps, double offset, bool cast_first) {
    require(has_width(x) && is_parameter_of(weight, x), "rms_norm");
    Tensor y = empty_laid_out_like(x);
    run_forward(x, std::nullopt, weight, std::nullopt, rms_norm_formula(eps, offset, cast_first), y, nullptr, false);
    return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Optional& weight, double eps,
                                        double offset, bool cast_first) {
    require(has_width(x) && is_like(residual, x) && is_parameter_of(weight, x), "add_rms_norm");
    Tensor y = empty_laid_out_like(x), hidden = empty_laid_out_like(x);
    run_forward(x, residual, weight, std::nullopt, rms_norm_formula(eps, offset, cast_first), y, &hidden, false);
    return {y, hidden};
}

void rms_norm_out(const Tensor& x, const Optional& weight, const Optional& residual, double eps, double offset,
                  bool cast_first, Tensor out, Optional residual_out) {
    require(has_width(x) && is_like(residual, x) && is_parameter_of(weight, x) && is_out_like(out, x) &&
                is_out_like(residual_out, x) && residual.has_value() == residual_out.has_value(),
            "rms_norm_out");
    run_forward(x, residual, weight, std::nullopt, rms_norm_formula(eps, offset, cast_first), out,
                residual_out ? &*residual_out : nullptr, true);
}

Tensor layer_norm(const Tensor& x, const Optional& weight, const Optional& bias, double eps) {
    require(has_width(x) && are_parameters_of(weight, bias, x), "layer_norm");
    Tensor y = empty_laid_out_like(x);
    run_forward(x, std::nullopt, weight, bias, layer_norm_formula(eps), y, nullptr, false);
    return y;
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Optional& weight,
                                          const Optional& bias, double eps) {
    require(has_width(x) && is_like(residual, x) && are_parameters_of(weight, bias, x), "add_layer_norm");
    Tensor y = empty_laid_out_like(x), hidden = empty_laid_out_like(x);
    run_forward(x, residual, weight, bias, layer_norm_formula(eps), y, &hidden, false);
    return {y, hidden};
}

Tensor layer_norm_of_sum(const Tensor& x, const Tensor& residual, const Optional& weight, const Optional& bias,
                         double eps) {
    require(has_width(x) && is_like(residual, x) && are_parameters_of(weight, bias, x), "layer_norm_of_sum");
    Tensor y = empty_laid_out_like(x);
    run_forward(x, residual, weight, bias, layer_norm_formula(eps), y, nullptr, false);
    return y;
}

void layer_norm_out(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& residual, double eps,
                    Tensor out, Optional residual_out) {
    require(has_width(x) && is_like(residual, x) && are_parameters_of(weight, bias, x) && is_out_like(out, x) &&
                is_out_like(residual_out, x) && (residual || !residual_out),
            "layer_norm_out");
    run_forward(x, residual, weight, bias, layer_norm_formula(eps), out, residual_out ? &*residual_out : nullptr, true);
}

void run_backward(const Backward& p, const Tensor* d_weight, const Tensor* d_bias) {
    const Kernels* kernels = kKernels[selected_isa()];
    run_in_parts(
        p.rows, p.width, d_weight, d_bias,
        [&](int64_t begin, int64_t end, ColumnSums sums) { kernels->backward(p, begin, end, sums); },
        [&](Parts parts, void* total, int64_t begin, int64_t end) { kernels->sum_parts(p, parts, total, begin, end); });
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& hidden, const Optional& weight,
                                             const Optional& grad_hidden, double eps, double offset) {
    require(
        has_width(hidden) && is_like(grad, hidden) && is_parameter_of(weight, hidden) && is_like(grad_hidden, hidden),
        "rms_norm_backward");
    Tensor d_hidden = empty_laid_out_like(hidden), d_weight = empty_gradient_of(weight, hidden);
    const DescribedBackward described(grad, hidden, weight, std::nullopt, grad_hidden,
                                      rms_norm_formula(eps, offset, false), d_hidden);
    run_backward(described.call, weight ? &d_weight : nullptr, nullptr);
    return {d_hidden, d_weight};
}

bool are_heads(const Tensor& query, const Tensor& key, const Optional& query_weight, const Optional& key_weight) {
    return query.dim() == 4 && key.dim() == 4 && has_width(query) && same_kind(key, query) &&
           key.size(3) == query.size(3) && is_parameter_of(query_weight, query) && is_parameter_of(key_weight, key);
}

std::tuple<Tensor, Tensor> qk_norm(const Tensor& query, const Tensor& key, const Optional& query_weight,
                                   const Optional& key_weight, double eps, double offset, bool cast_first) {
    require(are_heads(query, key, query_weight, key_weight), "qk_norm");
    return {rms_norm(query, query_weight, eps, offset, cast_first), rms_norm(key, key_weight, eps, offset, cast_first)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_backward(const Tensor& grad_query, const Tensor& grad_key,
                                                            const Tensor& query, const Tensor& key,
                                                            const Optional& query_weight, const Optional& key_weight,
                                                            double eps, double offset) {
    require(are_heads(query, key, query_weight, key_weight), "qk_norm_backward");
    auto [d_query, d_query_weight] = rms_norm_backward(grad_query, query, query_weight, std::nullopt, eps, offset);
    auto [d_key, d_key_weight] = rms_norm_backward(grad_key, key, key_weight, std::nullopt, eps, offset);
    return {d_query, d_key, d_query_weight, d_key_weight};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& hidden, const Optional& weight,
                                                       const Optional& bias, const Optional& grad_hidden, double eps) {
    require(has_width(hidden) && is_like(grad, hidden) && are_parameters_of(weight, bias, hidden) &&
                is_like(grad_hidden, hidden),
            "layer_norm_backward");
    Tensor d_hidden = empty_laid_out_like(hidden);
    Tensor d_weight = empty_gradient_of(weight, hidden), d_bias = empty_gradient_of(bias, hidden);
    const DescribedBackward described(grad, hidden, weight, bias, grad_hidden, layer_norm_formula(eps), d_hidden);
    run_backward(described.call, weight ? &d_weight : nullptr, bias ? &d_bias : nullptr);
    return {d_hidden, d_weight, d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearpeak, CPU, library) {
    library.impl("rms_norm", TORCH_BOX(&rms_norm));
    library.impl("rms_norm_inference", TORCH_BOX(&rms_norm));
    library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
    library.impl("add_rms_norm_inference", TORCH_BOX(&add_rms_norm));
    library.impl("rms_norm_out", TORCH_BOX(&rms_norm_out));
    library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
    library.impl("qk_norm", TORCH_BOX(&qk_norm));
    library.impl("qk_norm_inference", TORCH_BOX(&qk_norm));
    library.impl("qk_norm_backward", TORCH_BOX(&qk_norm_backward));
    library.impl("layer_norm", TORCH_BOX(&layer_norm));
    library.impl("layer_norm_inference", TORCH_BOX(&layer_norm));
    library.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
    library.impl("add_layer_norm_inference", TORCH_BOX(&add_layer_norm));
    library.impl("layer_norm_of_sum", TORCH_BOX(&layer_norm_of_sum));
    library.impl("layer_norm_out", TORCH_BOX(&layer_norm_out));
    library.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace nearpeak::norm
