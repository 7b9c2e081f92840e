"""RMSNorm and LayerNorm on the GPU: the operators of norm/operator.py by the Triton kernels.

Every kernel is bound by memory. A row that fits in registers is read once; a wider one is read again for each pass over
it, from the second time on mostly from the L2 cache, because a kernel that spills registers pays more than that.
"""

import torch

from .. import operators
from .triton_backward import backward
from .triton_forward import forward


def rms_norm(x, weight, eps, offset, cast_first):
    """y = x / rms(x) (offset + weight), of x's shape (..., width)."""
    y = operators.empty_laid_out_like(x)
    rms_norm_out(x, weight, None, eps, offset, cast_first, y, None)
    return y


def add_rms_norm(x, residual, weight, eps, offset, cast_first):
    """hidden = x + residual and y = rms_norm(hidden), both of x's shape (..., width)."""
    y, hidden = operators.empty_laid_out_like(x), operators.empty_laid_out_like(x)
    rms_norm_out(x, weight, residual, eps, offset, cast_first, y, hidden)
    return y, hidden


def rms_norm_out(x, weight, residual, eps, offset, cast_first, out, residual_out):
    """rms_norm of x, or of x + residual, into out; the sum into residual_out, unless that is None."""
    forward(x, residual, weight, None, out, residual_out, eps, offset, False, cast_first)


def rms_norm_backward(grad, hidden, weight, grad_hidden, eps, offset):
    """d_hidden, of hidden's shape (..., width), and d_weight (width,), or empty without a weight."""
    d_hidden, d_weight = operators.empty_laid_out_like(hidden), _empty_like(weight)
    backward(grad, hidden, weight, grad_hidden, d_hidden, d_weight, None, eps, offset, False)
    return d_hidden, _or_empty(d_weight, hidden)


def layer_norm(x, weight, bias, eps):
    """y = (x - mean(x)) / std(x) weight + bias, of x's shape (..., width)."""
    y = operators.empty_laid_out_like(x)
    layer_norm_out(x, weight, bias, None, eps, y, None)
    return y


def add_layer_norm(x, residual, weight, bias, eps):
    """hidden = x + residual and y = layer_norm(hidden), both of x's shape (..., width)."""
    y, hidden = operators.empty_laid_out_like(x), operators.empty_laid_out_like(x)
    layer_norm_out(x, weight, bias, residual, eps, y, hidden)
    return y, hidden


def layer_norm_of_sum(x, residual, weight, bias, eps):
    """layer_norm(x + residual) alone, of x's shape (..., width)."""
    y = operators.empty_laid_out_like(x)
    layer_norm_out(x, weight, bias, residual, eps, y, None)
    return y


def layer_norm_out(x, weight, bias, residual, eps, out, residual_out):
    """layer_norm of x, or of x + residual, into out; the sum into residual_out, unless that is None."""
    forward(x, residual, weight, bias, out, residual_out, eps, 0.0, True)


def layer_norm_backward(grad, hidden, weight, bias, grad_hidden, eps):
    """d_hidden, of hidden's shape (..., width), and d_weight and d_bias (width,), empty where there is none."""
    d_hidden, d_weight, d_bias = operators.empty_laid_out_like(hidden), _empty_like(weight), _empty_like(bias)
    backward(grad, hidden, weight, grad_hidden, d_hidden, d_weight, d_bias, eps, 0.0, True)
    return d_hidden, _or_empty(d_weight, hidden), _or_empty(d_bias, hidden)


def _empty_like(parameter):
    return None if parameter is None else torch.empty_like(parameter)


def _or_empty(gradient, hidden):
    """An operator returns a tensor for a gradient that is not there, too."""
    return hidden.new_empty(0) if gradient is None else gradient
