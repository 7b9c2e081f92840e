"""The definition of RMSNorm.

    hidden = x + residual                                   (hidden = x without a residual)
    y      = hidden / sqrt(mean(hidden^2) + eps) * (offset + weight)

The mean runs over the last dimension; the arithmetic is float32 (float64 for float64), rounded once at the end.
Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4; offset = 1 is Gemma's form.
"""

import torch

from ..operators import accumulation_dtype, empty_laid_out_like, widened


def rms_norm(x, weight, eps, offset):
    wide = widened(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (offset + weight.to(wide.dtype))
    return empty_laid_out_like(x).copy_(y)


def add_rms_norm(x, residual, weight, eps, offset):
    hidden = empty_laid_out_like(x).copy_(x + residual)
    return rms_norm(hidden, weight, eps, offset), hidden


def rms_norm_out(x, weight, residual, eps, offset, out, residual_out):
    if residual is None:
        out.copy_(rms_norm(x, weight, eps, offset))
        return
    y, hidden = add_rms_norm(x, residual, weight, eps, offset)
    out.copy_(y)
    residual_out.copy_(hidden)


def rms_norm_backward(grad, hidden, weight, grad_hidden, eps, offset):
    """Gradients of y and of the returned residual with respect to `hidden` and `weight`.

    r        = 1 / sqrt(mean(hidden^2) + eps)
    g        = grad * (offset + weight)
    d_hidden = r * (g - hidden * r^2 * mean(g * hidden)) + grad_hidden
    d_weight = sum over rows of grad * hidden * r           (empty without a weight)
    """
    dtype = accumulation_dtype(hidden.dtype)
    wide, g = hidden.to(dtype), grad.to(dtype)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normalised = wide * r
    if weight is None:
        d_weight = hidden.new_empty(0)
    else:
        d_weight = (g * normalised).reshape(-1, hidden.shape[-1]).sum(0).to(weight.dtype)
        g = g * (offset + weight.to(dtype))
    d_hidden = r * (g - normalised * (g * normalised).mean(-1, keepdim=True))
    if grad_hidden is not None:
        d_hidden = d_hidden + grad_hidden.to(dtype)
    return empty_laid_out_like(hidden).copy_(d_hidden), d_weight
