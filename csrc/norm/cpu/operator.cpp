// The CPU kernels of the operators that kernels/nearpeak/norm/operator.py defines.

#include <optional>
#include <tuple>

#include "../../cpu/scratch.h"
#include "../../cpu/tensors.h"
#include "../describe.h"
#include "kernels.h"

namespace nearpeak::norm {
namespace {

const Kernels* const kKernels[] = {NEARPEAK_ISAS(NEARPEAK_KERNELS_OF)};

// Rows below this many elements in all are not worth a second thread: waking one costs about 5 us, in which one
// core of the machines measured (2 x Zen 3, 2 x Sapphire Rapids) normalises about 32768 floats.
constexpr int64_t kElementsPerThread = 32768;

int64_t grain(int64_t width) { return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, width)); }

bool aligned(const void* pointer, int64_t row_bytes) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 64 == 0 && row_bytes % 64 == 0;
}

bool is_weight_of(const std::optional<Tensor>& weight, const Tensor& x) {
    return !weight || (weight->dim() == 1 && weight->size(0) == x.sizes().back() && same_kind(*weight, x, true));
}

bool is_like(const std::optional<Tensor>& tensor, const Tensor& x) { return !tensor || nearpeak::is_like(*tensor, x); }

bool has_width(const Tensor& x) { return x.dim() > 0 && x.sizes().back() > 0 && x.is_cpu(); }

void run_forward(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& residual,
                 double eps, double offset, const Tensor& y, const Tensor* hidden, bool reused) {
    const int64_t elements = x.numel();
    if (elements == 0) return;
    const DescribedForward described(x, weight, residual, eps, offset, y, hidden);
    Forward p{described.call, false};
    const int64_t element_size = static_cast<int64_t>(x.element_size());
    p.past_cache = reused && elements * element_size >= past_cache_bytes() && aligned(p.y, p.width * element_size) &&
                   aligned(p.hidden, p.width * element_size);
    const Kernels* kernels = kKernels[selected_isa()];
    torch::stable::parallel_for(0, p.rows, grain(p.width), [&](int64_t begin, int64_t end) {
        kernels->forward(p, begin, end, thread_scratch(p.past_cache ? p.width : 0));
    });
}

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps, double offset) {
    require(has_width(x) && is_weight_of(weight, x), "rms_norm");
    Tensor y = empty_laid_out_like(x);
    run_forward(x, weight, std::nullopt, eps, offset, y, nullptr, false);
    return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& weight,
                                        double eps, double offset) {
    require(has_width(x) && is_like(residual, x) && is_weight_of(weight, x), "add_rms_norm");
    Tensor y = empty_laid_out_like(x), hidden = empty_laid_out_like(x);
    run_forward(x, weight, residual, eps, offset, y, &hidden, false);
    return {y, hidden};
}

void rms_norm_out(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& residual,
                  double eps, double offset, Tensor out, std::optional<Tensor> residual_out) {
    require(has_width(x) && is_like(residual, x) && is_weight_of(weight, x) && is_like(out, x) && out.is_contiguous() &&
                is_like(residual_out, x) && residual.has_value() == residual_out.has_value() &&
                (!residual_out || residual_out->is_contiguous()),
            "rms_norm_out");
    run_forward(x, weight, residual, eps, offset, out, residual_out ? &*residual_out : nullptr, true);
}

// The weight gradient is summed over fixed parts of the rows, and these in a fixed order: the same bits whatever the
// number of threads.
constexpr int64_t kParts = 32, kRowsPerPart = 16;

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& hidden,
                                             const std::optional<Tensor>& weight,
                                             const std::optional<Tensor>& grad_hidden, double eps, double offset) {
    require(has_width(hidden) && is_like(grad, hidden) && is_weight_of(weight, hidden) && is_like(grad_hidden, hidden),
            "rms_norm_backward");
    Tensor d_hidden = empty_laid_out_like(hidden);
    const DescribedBackward described(grad, hidden, weight, grad_hidden, eps, offset, d_hidden);
    const Backward& p = described.call;
    const Kernels* kernels = kKernels[selected_isa()];
    const int64_t rows = p.rows;
    const int64_t parts = std::clamp<int64_t>(rows / kRowsPerPart, 1, kParts);
    if (!weight) {
        torch::stable::parallel_for(0, rows, grain(p.width),
                                    [&](int64_t begin, int64_t end) { kernels->backward(p, begin, end, nullptr); });
        return {d_hidden, empty_like_dtype(d_hidden, {0})};
    }
    Tensor d_weight = empty_laid_out_like(*weight);
    Tensor sums = empty_floats({parts, p.width});
    torch::stable::zero_(sums);
    float* sums_data = static_cast<float*>(sums.mutable_data_ptr());
    parallel_tasks(parts, [&](int64_t part) {
        kernels->backward(p, rows * part / parts, rows * (part + 1) / parts, sums_data + part * p.width);
    });
    torch::stable::parallel_for(0, p.width, kElementsPerThread / parts, [&](int64_t begin, int64_t end) {
        kernels->sum_parts(sums_data, parts, p.width, d_weight.mutable_data_ptr(), p.weight_dtype, begin, end);
    });
    return {d_hidden, d_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearpeak, CPU, library) {
    library.impl("rms_norm", TORCH_BOX(&rms_norm));
    library.impl("rms_norm_inference", TORCH_BOX(&rms_norm));
    library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
    library.impl("add_rms_norm_inference", TORCH_BOX(&add_rms_norm));
    library.impl("rms_norm_out", TORCH_BOX(&rms_norm_out));
    library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace nearpeak::norm
