// From the tensors of a call to its description, on any device. Each description holds on to the tensors that it points
// into: copies, where an input's rows or its weight lie as no kernel reads them. The width must not be zero.
#pragma once

#include <optional>

#include "../cpu/tensors.h"
#include "call.h"

namespace nearpeak::norm {

struct Rest {  // of the inputs, what may not be there
    Rest(const std::optional<Tensor>& rows_any, const std::optional<Tensor>& weight_any, const Tensor& order) {
        if (rows_any) rows.emplace(*rows_any, order);
        if (weight_any) weight = made_contiguous(*weight_any);
    }

    std::optional<RowsOf> rows;
    std::optional<Tensor> weight;
};

class DescribedForward {
  public:
    DescribedForward(const Tensor& x_any, const std::optional<Tensor>& weight, const std::optional<Tensor>& residual,
                     double eps, double offset, const Tensor& y, const Tensor* hidden)
        : x(x_any, y), rest(residual, weight, y) {
        call.x = x.data();
        call.x_rows = x.rows;
        call.width = x_any.sizes().back();
        call.rows = x_any.numel() / call.width;
        if (rest.rows) {
            call.residual = rest.rows->data();
            call.residual_rows = rest.rows->rows;
            call.hidden = hidden->mutable_data_ptr();
        }
        call.weight = rest.weight ? rest.weight->const_data_ptr() : nullptr;
        call.y = y.mutable_data_ptr();
        call.eps = static_cast<float>(eps);
        call.offset = static_cast<float>(offset);
        call.dtype = dtype_of(x_any);
        call.weight_dtype = rest.weight ? dtype_of(*rest.weight) : call.dtype;
    }

    ForwardCall call{};

  private:
    RowsOf x;
    Rest rest;
};

class DescribedBackward {
  public:
    DescribedBackward(const Tensor& grad_any, const Tensor& hidden_any, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& grad_hidden, double eps, double offset, const Tensor& d_hidden)
        : grad(grad_any, d_hidden), hidden(hidden_any, d_hidden), rest(grad_hidden, weight, d_hidden) {
        call.grad = grad.data();
        call.grad_rows = grad.rows;
        call.hidden = hidden.data();
        call.hidden_rows = hidden.rows;
        call.width = hidden_any.sizes().back();
        call.rows = hidden_any.numel() / call.width;
        if (rest.rows) {
            call.grad_hidden = rest.rows->data();
            call.grad_hidden_rows = rest.rows->rows;
        }
        call.weight = rest.weight ? rest.weight->const_data_ptr() : nullptr;
        call.d_hidden = d_hidden.mutable_data_ptr();
        call.eps = static_cast<float>(eps);
        call.offset = static_cast<float>(offset);
        call.dtype = dtype_of(hidden_any);
        call.weight_dtype = rest.weight ? dtype_of(*rest.weight) : call.dtype;
    }

    BackwardCall call{};

  private:
    RowsOf grad, hidden;
    Rest rest;
};

}  // namespace nearpeak::norm
