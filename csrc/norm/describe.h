// From the tensors of a call to its description, on any device. Each description holds on to the tensors that it points
// into: copies, where an input's rows or its weight lie as no kernel reads them. The width must not be zero.
#pragma once

#include <optional>

#include "../cpu/tensors.h"
#include "call.h"

namespace nearpeak::norm {

using Optional = std::optional<Tensor>;

// A weight or bias as kernels read it.
struct Dense {
    explicit Dense(const Optional& any) {
        if (any) tensor = made_contiguous(*any);
    }

    const void* data() const { return tensor ? tensor->const_data_ptr() : nullptr; }

    Optional tensor;
};

// The type of the weight and the bias, which agree; of `x` without either.
inline Dtype weight_dtype_of(const Optional& weight, const Optional& bias, const Tensor& x) {
    return dtype_of(weight ? *weight : bias ? *bias : x);
}

class DescribedForward {
  public:
    DescribedForward(const Tensor& x_any, const Optional& residual_any, const Optional& weight_any,
                     const Optional& bias_any, const Formula& formula, const Tensor& y, const Tensor* hidden)
        : x(x_any, y), weight(weight_any), bias(bias_any) {
        static_cast<Formula&>(call) = formula;
        call.x = x.data();
        call.x_rows = x.rows;
        call.width = x_any.sizes().back();
        call.rows = x_any.numel() / call.width;
        if (residual_any) {
            residual.emplace(*residual_any, y);
            call.residual = residual->data();
            call.residual_rows = residual->rows;
        }
        call.weight = weight.data();
        call.bias = bias.data();
        call.y = y.mutable_data_ptr();
        call.hidden = hidden ? hidden->mutable_data_ptr() : nullptr;
        call.dtype = dtype_of(x_any);
        call.weight_dtype = weight_dtype_of(weight_any, bias_any, x_any);
    }

    ForwardCall call{};

  private:
    RowsOf x;
    std::optional<RowsOf> residual;
    Dense weight, bias;
};

class DescribedBackward {
  public:
    // The bias matters by its type alone.
    DescribedBackward(const Tensor& grad_any, const Tensor& hidden_any, const Optional& weight_any,
                      const Optional& bias_any, const Optional& grad_hidden_any, const Formula& formula,
                      const Tensor& d_hidden)
        : grad(grad_any, d_hidden), hidden(hidden_any, d_hidden), weight(weight_any) {
        static_cast<Formula&>(call) = formula;
        call.grad = grad.data();
        call.grad_rows = grad.rows;
        call.hidden = hidden.data();
        call.hidden_rows = hidden.rows;
        call.width = hidden_any.sizes().back();
        call.rows = hidden_any.numel() / call.width;
        if (grad_hidden_any) {
            grad_hidden.emplace(*grad_hidden_any, d_hidden);
            call.grad_hidden = grad_hidden->data();
            call.grad_hidden_rows = grad_hidden->rows;
        }
        call.weight = weight.data();
        call.d_hidden = d_hidden.mutable_data_ptr();
        call.dtype = dtype_of(hidden_any);
        call.weight_dtype = weight_dtype_of(weight_any, bias_any, hidden_any);
    }

    BackwardCall call{};

  private:
    RowsOf grad, hidden;
    std::optional<RowsOf> grad_hidden;
    Dense weight;
};

}  // namespace nearpeak::norm
