"""The definition of the feed-forward activations.

    activation:        y = f(x)
    gated activation:  y = f(gate) * up

    relu           max(x, 0)
    gelu           x Phi(x), Phi the normal distribution                      Hendrycks and Gimpel 2016
    gelu_tanh      x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2          its approximation there
    quick_gelu     x sigmoid(1.702 x)                                         the other one there
    silu           x sigmoid(x)                                               Elfwing et al. 2017
    relu_squared   max(x, 0)^2                                                So et al. 2021

Gated: Shazeer 2020, https://arxiv.org/abs/2002.05202. Arithmetic in float32 (float64 for float64), rounded once at the
end. https://arxiv.org/abs/1606.08415, https://arxiv.org/abs/1702.03118, https://arxiv.org/abs/2109.08668.
"""

import math

import torch

from ..operators import empty_laid_out_like, widened

NAMES = ("relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu_squared")

QUICK = 1.702
ROOT = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def _normal(x):
    """Phi(x), without cancellation far below zero."""
    return 0.5 * torch.special.erfc(-x * math.sqrt(0.5))


def _value(x, name):
    if name == "relu":
        return x.relu()
    if name == "gelu":
        return x * _normal(x)
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(ROOT * (x + CUBIC * x**3)))
    if name == "quick_gelu":
        return x * torch.sigmoid(QUICK * x)
    if name == "silu":
        return x * torch.sigmoid(x)
    return x.relu().square()


def _slope(x, name):
    if name == "relu":
        return (x > 0).to(x.dtype)
    if name == "gelu":
        return _normal(x) + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        u = ROOT * (x + CUBIC * x**3)
        s, rest = torch.sigmoid(2 * u), torch.sigmoid(-2 * u)
        return s + 2 * x * s * rest * ROOT * (1 + 3 * CUBIC * x.square())
    if name in ("quick_gelu", "silu"):
        factor = QUICK if name == "quick_gelu" else 1.0
        return torch.sigmoid(factor * x) * (1 + factor * x * torch.sigmoid(-factor * x))
    return 2 * x.relu()


def activation(x, kind):
    return empty_laid_out_like(x).copy_(_value(widened(x), NAMES[kind]))


def activation_backward(grad, x, kind):
    """f'(x) grad"""
    return empty_laid_out_like(x).copy_(_slope(widened(x), NAMES[kind]) * widened(grad))


def gated_activation(gate, up, kind):
    return empty_laid_out_like(gate).copy_(_value(widened(gate), NAMES[kind]) * widened(up))


def gated_activation_backward(grad, gate, up, kind):
    """d_gate = f'(gate) up grad,  d_up = f(gate) grad"""
    wide, g = widened(gate), widened(grad)
    d_gate = empty_laid_out_like(gate).copy_(_slope(wide, NAMES[kind]) * widened(up) * g)
    return d_gate, empty_laid_out_like(gate).copy_(_value(wide, NAMES[kind]) * g)


def halves(packed, up_first):
    """(gate, up) of one packed tensor."""
    first, second = packed.chunk(2, dim=-1)
    return (second, first) if up_first else (first, second)


def packed_gated_activation(packed, kind, up_first):
    return gated_activation(*halves(packed, up_first), kind)


def packed_gated_activation_backward(grad, packed, kind, up_first):
    d_gate, d_up = gated_activation_backward(grad, *halves(packed, up_first), kind)
    parts = (d_up, d_gate) if up_first else (d_gate, d_up)
    return empty_laid_out_like(packed).copy_(torch.cat(parts, dim=-1))
