"""The definition of a linear layer and its gradients.

    y   = x W^T + b
    d_x = d_y W,   d_W = d_y^T x,   d_b = sum of d_y over its rows

In float32 (float64 for float64), rounded once at the end.
"""

from ..operators import accumulation_dtype, widened, without_autocast
from .weights import dequantized


def linear(x, weight, bias):
    with without_autocast(x.device):
        y = widened(x) @ widened(weight).mT
    if bias is not None:
        y = y + widened(bias)
    return y.to(x.dtype)


def quantized_linear(x, codes, scales, zeros, bias, bits):
    """y = x W^T + b with W = scale (code - zero); see weights.py."""
    return linear(x, dequantized(codes, scales, zeros, bits, accumulation_dtype(x.dtype)), bias)


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
