"""The activations of feed-forward layers and of linear layers' epilogues, by name and by number: f(x) and f'(x).

    relu           max(x, 0)
    gelu           x Phi(x), Phi the normal distribution                      Hendrycks and Gimpel 2016
    gelu_tanh      x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2          its approximation there
    quick_gelu     x sigmoid(1.702 x)                                         the other one there
    silu           x sigmoid(x)                                               Elfwing et al. 2017
    relu_squared   max(x, 0)^2                                                So et al. 2021

https://arxiv.org/abs/1606.08415, https://arxiv.org/abs/1702.03118, https://arxiv.org/abs/2109.08668.

Operators take the numbers, which csrc/cpu/activation.h and triton_activations.py know too.
"""

import math

import torch

NAMES = ("relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu_squared")
KINDS = {name: number for number, name in enumerate(NAMES)}

QUICK = 1.702
ROOT = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def _normal(x):
    """Phi(x), without cancellation far below zero."""
    return 0.5 * torch.special.erfc(-x * math.sqrt(0.5))


def value(x, name):
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


def slope(x, name):
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
