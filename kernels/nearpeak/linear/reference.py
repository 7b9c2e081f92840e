"""The definition of a linear layer and its gradients.

    y   = x W^T + b
    d_x = d_y W,   d_W = d_y^T x,   d_b = sum of d_y over its rows

In float32 (float64 for float64), rounded once at the end.
"""

import torch

from ..operators import widened


def linear(x, weight, bias):
    y = widened(x) @ widened(weight).mT
    if bias is not None:
        y = y + widened(bias)
    return y.to(x.dtype)


def linear_input_gradient(grad, weight):
    return (widened(grad) @ widened(weight)).to(grad.dtype)


def linear_weight_gradient(grad, x):
    rows, columns = (widened(t).flatten(0, -2) if t.dim() > 1 else widened(t)[None] for t in (grad, x))
    return (rows.mT @ columns).to(x.dtype)


def linear_bias_gradient(grad):
    return torch.sum(widened(grad), dim=tuple(range(grad.dim() - 1))).to(grad.dtype) if grad.dim() > 1 else grad.clone()
