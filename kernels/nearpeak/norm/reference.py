"""The definitions of RMSNorm and LayerNorm, over the last dimension.

    hidden = x + residual                                   (hidden = x without a residual)

    RMSNorm      n = hidden / sqrt(mean(hidden^2) + eps)                        y = n * (offset + weight)
    LayerNorm    n = (hidden - mean(hidden)) / sqrt(variance(hidden) + eps)     y = n * weight + bias

The arithmetic is float32 (float64 for float64), rounded once at the end; with `cast_first` n is rounded too, before it
meets the weight; gradients know nothing of rounding. The variance is the mean squared distance from the mean.
Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4 (offset = 1 is Gemma's form); Ba, Kiros and Hinton
2016, https://arxiv.org/abs/1607.06450, equation 4.
"""

import torch

from ..operators import empty_laid_out_like, widened


def rms_norm(x, weight, eps, offset, cast_first):
    wide = widened(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = (y.to(x.dtype) if cast_first else y) * (offset + weight.to(wide.dtype))
    return empty_laid_out_like(x).copy_(y)


def add_rms_norm(x, residual, weight, eps, offset, cast_first):
    hidden = empty_laid_out_like(x).copy_(x + residual)
    return rms_norm(hidden, weight, eps, offset, cast_first), hidden


def rms_norm_out(x, weight, residual, eps, offset, cast_first, out, residual_out):
    if residual is None:
        out.copy_(rms_norm(x, weight, eps, offset, cast_first))
        return
    y, hidden = add_rms_norm(x, residual, weight, eps, offset, cast_first)
    out.copy_(y)
    residual_out.copy_(hidden)


def rms_norm_backward(grad, hidden, weight, grad_hidden, eps, offset):
    """Gradients of y and of the returned residual with respect to `hidden` and `weight`.

    r        = 1 / sqrt(mean(hidden^2) + eps)
    g        = grad * (offset + weight)
    d_hidden = r * (g - n * mean(g * n)) + grad_hidden
    d_weight = sum over rows of grad * n                    (empty without a weight)
    """
    wide, g = widened(hidden), widened(grad)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    n = wide * r
    d_weight = _sum_over_rows(g * n, weight, hidden)
    if weight is not None:
        g = g * (offset + weight.to(wide.dtype))
    d_hidden = r * (g - n * (g * n).mean(-1, keepdim=True))
    return _plus(d_hidden, grad_hidden, hidden), d_weight


def layer_norm(x, weight, bias, eps):
    return empty_laid_out_like(x).copy_(unrounded_layer_norm(widened(x), weight, bias, eps))


def unrounded_layer_norm(wide, weight, bias, eps):
    """In the dtype of the arithmetic, from and to."""
    y, _ = _normalised(wide, eps)
    if weight is not None:
        y = y * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return y


def add_layer_norm(x, residual, weight, bias, eps):
    hidden = empty_laid_out_like(x).copy_(x + residual)
    return layer_norm(hidden, weight, bias, eps), hidden


def layer_norm_of_sum(x, residual, weight, bias, eps):
    return add_layer_norm(x, residual, weight, bias, eps)[0]


def layer_norm_out(x, weight, bias, residual, eps, out, residual_out):
    hidden = x if residual is None else empty_laid_out_like(x).copy_(x + residual)
    out.copy_(layer_norm(hidden, weight, bias, eps))
    if residual_out is not None:
        residual_out.copy_(hidden)


def layer_norm_backward(grad, hidden, weight, bias, grad_hidden, eps):
    """Gradients of y and of the returned residual with respect to `hidden`, `weight` and `bias`.

    g        = grad * weight
    d_hidden = (g - mean(g) - n * mean(g * n)) / sqrt(variance(hidden) + eps) + grad_hidden
    d_weight = sum over rows of grad * n                    (empty without a weight)
    d_bias   = sum over rows of grad                        (empty without a bias)
    """
    wide, g = widened(hidden), widened(grad)
    n, deviation = _normalised(wide, eps)
    d_weight, d_bias = _sum_over_rows(g * n, weight, hidden), _sum_over_rows(g, bias, hidden)
    if weight is not None:
        g = g * weight.to(wide.dtype)
    d_hidden = (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True)) / deviation
    return _plus(d_hidden, grad_hidden, hidden), d_weight, d_bias


def _normalised(wide, eps):
    """n, and the standard deviation that it was divided by."""
    centred = wide - wide.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # what the mean lost when it was rounded
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation, deviation


def _sum_over_rows(gradients, parameter, hidden):
    """A parameter's gradient; empty without the parameter."""
    if parameter is None:
        return hidden.new_empty(0)
    return gradients.reshape(-1, gradients.shape[-1]).sum(0).to(parameter.dtype)


def _plus(d_hidden, grad_hidden, hidden):
    if grad_hidden is not None:
        d_hidden = d_hidden + widened(grad_hidden)
    return empty_laid_out_like(hidden).copy_(d_hidden)


def qk_norm(query, key, query_weight, key_weight, *formula):
    """RMSNorm of each over head_dim."""
    return rms_norm(query, query_weight, *formula), rms_norm(key, key_weight, *formula)


def qk_norm_backward(grad_query, grad_key, query, key, query_weight, key_weight, eps, offset):
    d_query, d_query_weight = rms_norm_backward(grad_query, query, query_weight, None, eps, offset)
    d_key, d_key_weight = rms_norm_backward(grad_key, key, key_weight, None, eps, offset)
    return d_query, d_key, d_query_weight, d_key_weight
