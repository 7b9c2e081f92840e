"""The definition of a linear layer, with what may follow it, and its gradients.

    y   = x W^T + b,   y = f(x W^T + b) + residual
    d_x = d_y W,   d_W = d_y^T x,   d_b = sum of d_y over its rows

In float32 (float64 for float64), rounded once at the end.
"""

from ..activations import NAMES, value
from ..operators import accumulation_dtype, widened, without_autocast
from .weights import dequantized


def _wide_linear(x, weight, bias):
    with without_autocast(x.device):
        y = widened(x) @ widened(weight).mT
    return y if bias is None else y + widened(bias)


def linear(x, weight, bias):
    return _wide_linear(x, weight, bias).to(x.dtype)


def linear_epilogue(x, weight, bias, residual, activation, keep):
    """y = f(x W^T + b) + residual; with `keep` also what f is of, else an empty tensor.

    activation: the number of f in activations.py; None: f(x) = x
    """
    before = y = _wide_linear(x, weight, bias)
    if activation is not None:
        y = value(y, NAMES[activation])
    if residual is not None:
        y = y + widened(residual)
    return y.to(x.dtype), before.to(x.dtype, copy=True) if keep else x.new_empty(0)


def quantized_linear(x, codes, scales, zeros, bias, bits):
    """y = x W^T + b with W = scale (code - zero); see weights.py."""
    return linear(x, dequantized(codes, scales, zeros, bits, accumulation_dtype(x.dtype)), bias)


def quantized_linear_epilogue(x, codes, scales, zeros, bias, bits, residual, activation, keep):
    weight = dequantized(codes, scales, zeros, bits, accumulation_dtype(x.dtype))
    return linear_epilogue(x, weight, bias, residual, activation, keep)


def linear_input_gradient(grad, weight):
    with without_autocast(grad.device):
        return (widened(grad) @ widened(weight)).to(grad.dtype)


def _matrix(tensor):
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def linear_weight_gradient(grad, x):
    with without_autocast(x.device):
        return (_matrix(widened(grad)).mT @ _matrix(widened(x))).to(x.dtype)


def linear_bias_gradient(grad):
    """In grad's dtype: torch's sums of 16-bit types are float32 inside."""
    return _matrix(grad).sum(0)
