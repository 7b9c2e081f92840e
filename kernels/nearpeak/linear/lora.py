"""The torch operators of linear layers with a low-rank update of the weight (LoRA), and their public function.

    h   = scale x A^T,   y = f(x W^T + b + h B^T) + residual
    d_h = scale d_y B,   d_x = d_y W + d_h A,   d_A = d_h^T x,   d_B = d_y^T h

with d_y of what f is of. The update is a second pair of factors that is added to the product's sums before anything is
rounded or stored: y and d_x are written once.
"""

import torch

from .. import backends, operators
from ..checks import check_same_kind
from . import epilogue, reference
from .operator import KERNELS, check_linear, why_torch_serves


def _check_matrix(name, tensor, x, shape):
    check_same_kind(name, tensor, "x", x)
    if tensor.dim() != 2 or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")


def _check(x, weight, lora_a, lora_b, scale, bias, residual, activation, keep):
    check_linear(x, weight, bias)
    check_same_kind("lora_a", lora_a, "x", x)
    if lora_a.dim() != 2:
        raise ValueError(f"lora_a must be (rank, in_features), not of shape {tuple(lora_a.shape)}")
    _check_matrix("lora_a", lora_a, x, (lora_a.shape[0], weight.shape[1]))
    _check_matrix("lora_b", lora_b, x, (weight.shape[0], lora_a.shape[0]))
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, not {type(scale).__name__}")
    epilogue.check(x, weight.shape[0], residual, activation)


def _check_input_gradient(grad, weight, hidden_grad, lora_a):
    check_same_kind("hidden_grad", hidden_grad, "grad", grad)
    if hidden_grad.shape[:-1] != grad.shape[:-1]:
        raise ValueError(f"hidden_grad must have grad's rows {tuple(grad.shape[:-1])}, not {tuple(hidden_grad.shape)}")
    _check_matrix("weight", weight, grad, (grad.shape[-1], weight.shape[-1]))
    _check_matrix("lora_a", lora_a, grad, (hidden_grad.shape[-1], weight.shape[-1]))


def _shapes(x, weight, lora_a, lora_b, scale, bias, residual, activation, keep):
    return *epilogue.shapes(x, weight.shape[0], keep), x.new_empty(*x.shape[:-1], lora_a.shape[0])


def _save(ctx, inputs, output):
    x, weight, lora_a, lora_b, ctx.scale, _, _, activation, _ = inputs
    hidden = output[2]
    epilogue.save(ctx, output, activation, x, weight, lora_a, lora_b, hidden)
    ctx.mark_non_differentiable(output[1], hidden)


def _gradient(ctx, grad, *_):
    before, x, weight, lora_a, lora_b, hidden = ctx.saved_tensors
    ops, needed = torch.ops.nearpeak, ctx.needs_input_grad
    inner = epilogue.gradient_of_product(grad, before, ctx.activation)
    d_x = d_a = None
    if needed[0] or needed[2]:
        d_hidden = ops.linear_input_gradient(inner, lora_b) * ctx.scale
        d_x = ops.lora_input_gradient(inner, weight, d_hidden, lora_a) if needed[0] else None
        d_a = ops.linear_weight_gradient(d_hidden, x) if needed[2] else None
    return (
        d_x,
        ops.linear_weight_gradient(inner, x) if needed[1] else None,
        d_a,
        ops.linear_weight_gradient(inner, hidden) if needed[3] else None,
        None,
        ops.linear_bias_gradient(inner) if needed[5] else None,
        grad if needed[6] else None,
        None,
        None,
    )


operators.define(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, float scale, Tensor? bias, Tensor? residual, "
    "int? activation, bool keep) -> (Tensor, Tensor, Tensor)",
    check=_check,
    reference=reference.lora_linear,
    shapes=_shapes,
    backward=_gradient,
    setup_context=_save,
)
operators.define(
    "lora_input_gradient(Tensor grad, Tensor weight, Tensor hidden_grad, Tensor lora_a) -> Tensor",
    check=_check_input_gradient,
    reference=reference.lora_input_gradient,
    shapes=lambda grad, weight, hidden_grad, lora_a: grad.new_empty(*grad.shape[:-1], weight.shape[1]),
)

# Looked up once: each attribute of torch.ops costs 0.1 us a call.
_lora_linear = torch.ops.nearpeak.lora_linear.default
_lora_linear_inference = torch.ops.nearpeak.lora_linear_inference.default


def lora_linear(x, weight, lora_a, lora_b, scale, bias=None, *, activation=None, residual=None):
    """A linear layer with a low-rank update: y = f(x weight^T + bias + scale (x lora_a^T) lora_b^T) + residual.

    One pass over y, forward and backward: the update's product is added to the layer's sums. Calls for which torch has
    a tuned library (see `nearpeak.linear`) go to torch, the update after the layer, and `nearpeak.explain` says so.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64; any strides.
        weight: (out_features, in_features), x's dtype.
        lora_a, lora_b: (rank, in_features) and (out_features, rank), x's dtype.
        scale: a number; LoRA's alpha / rank.
        bias, activation, residual: as `nearpeak.linear` takes them.

    Returns:
        y, (..., out_features), in x's dtype, contiguous. Under torch.autocast as torch.nn.functional.linear.

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape, device or activation that does not fit.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    >>> x, weight = torch.randn(4, 640), torch.randn(2048, 640)
    >>> y = nearpeak.lora_linear(x, weight, torch.randn(16, 640), torch.zeros(2048, 16), scale=2.0)
    """
    kind = epilogue.kind_of(activation)
    arguments = x, weight, lora_a, lora_b, scale, bias, residual, kind, False
    try:
        if operators.autocasts(x):
            x, weight, lora_a, lora_b, bias = map(operators.autocast, (x, weight, lora_a, lora_b, bias))
            if residual is not None and residual.dtype is not x.dtype:
                return lora_linear(x, weight, lora_a, lora_b, scale, bias, activation=activation) + residual
            arguments = x, weight, lora_a, lora_b, scale, bias, residual, kind, False
        if backends.reference_serves(x, kernels=KERNELS):
            _check(*arguments)
            return reference.lora_linear(*arguments)[0]
        recorded = operators.wants_gradient(x, weight, lora_a) or operators.wants_gradient(lora_b, bias, residual)
        if (why := why_torch_serves(x, weight, recorded)) is not None:
            _check(*arguments)
            backends.because(f"{why}, and the low-rank update after it")
            return epilogue.follow(_by_torch(x, weight, lora_a, lora_b, scale, bias, recorded), kind, residual)
        if recorded:
            return _lora_linear(*arguments[:-1], kind is not None)[0]
        return _lora_linear_inference(*arguments)[0]
    except (AttributeError, IndexError, RuntimeError, TypeError):
        _check(*arguments)
        raise


def _by_torch(x, weight, lora_a, lora_b, scale, bias, recorded):
    y = torch.nn.functional.linear(x, weight, bias)
    hidden = torch.nn.functional.linear(x, lora_a)
    matrix, low = y.view(-1, y.shape[-1]), hidden.view(-1, hidden.shape[-1])
    if recorded:
        return torch.addmm(matrix, low, lora_b.mT, alpha=scale).view(y.shape)
    matrix.addmm_(low, lora_b.mT, alpha=scale)
    return y
