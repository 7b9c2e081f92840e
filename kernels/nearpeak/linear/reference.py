"""The definition of a linear layer, with what may follow it, and its gradients.

    y   = x W^T + b,   y = f(x W^T + b) + residual
    d_x = d_y W,   d_W = d_y^T x,   d_b = sum of d_y over its rows

In float32 (float64 for float64), rounded once at the end.
"""

from ..activations import NAMES, value
from ..operators import accumulation_dtype, widened, without_autocast
from . import gguf_blocks
from .input_rounding import GROUP_OF_BLOCKS, rounded
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
    return _followed(x, _wide_linear(x, weight, bias), residual, activation, keep)


def _followed(x, before, residual, activation, keep):
    y = before if activation is None else value(before, NAMES[activation])
    if residual is not None:
        y = y + widened(residual)
    return y.to(x.dtype), before.to(x.dtype, copy=True) if keep else x.new_empty(0)


def quantized_linear(x, codes, scales, zeros, bias, bits, input_bits=None):
    """y = x W^T + b with W = scale (code - zero), see weights.py, and x perhaps rounded, see input_rounding.py."""
    return quantized_linear_epilogue(x, codes, scales, zeros, bias, bits, None, None, False, input_bits)[0]


def quantized_linear_epilogue(x, codes, scales, zeros, bias, bits, residual, activation, keep, input_bits=None):
    weight = dequantized(codes, scales, zeros, bits, accumulation_dtype(x.dtype))
    before = _wide_linear(rounded(x, input_bits, x.shape[-1] // scales.shape[1]), weight, bias)
    return _followed(x, before, residual, activation, keep)


def gguf_linear(x, blocks, bias, kind, residual, activation, keep, input_bits=None):
    """quantized_linear_epilogue with the weight of GGUF's blocks; see gguf_blocks.py."""
    weight = gguf_blocks.dequantized(blocks, kind, accumulation_dtype(x.dtype))
    before = _wide_linear(rounded(x, input_bits, GROUP_OF_BLOCKS), weight, bias)
    return _followed(x, before, residual, activation, keep)


def lora_linear(x, weight, lora_a, lora_b, scale, bias, residual, activation, keep):
    """y = f(x W^T + b + h B^T) + residual and what linear_epilogue gives beside it; and h = scale x A^T."""
    hidden = _wide_linear(x, lora_a, None) * scale
    before = _wide_linear(x, weight, bias) + _wide_linear(hidden, lora_b, None)
    return *_followed(x, before, residual, activation, keep), hidden.to(x.dtype)


def lora_input_gradient(grad, weight, hidden_grad, lora_a):
    with without_autocast(grad.device):
        return (widened(grad) @ widened(weight) + widened(hidden_grad) @ widened(lora_a)).to(grad.dtype)


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
