"""The definition of the feed-forward activations; f and its sources: activations.py.

    activation:        y = f(x)
    gated activation:  y = f(gate) * up

Gated: Shazeer 2020, https://arxiv.org/abs/2002.05202. Arithmetic in float32 (float64 for float64), rounded once at the
end.
"""

import torch

from ..activations import NAMES, slope, value
from ..operators import empty_laid_out_like, widened


def activation(x, kind):
    return empty_laid_out_like(x).copy_(value(widened(x), NAMES[kind]))


def activation_backward(grad, x, kind):
    """f'(x) grad"""
    return empty_laid_out_like(x).copy_(slope(widened(x), NAMES[kind]) * widened(grad))


def gated_activation(gate, up, kind):
    return empty_laid_out_like(gate).copy_(value(widened(gate), NAMES[kind]) * widened(up))


def gated_activation_backward(grad, gate, up, kind):
    """d_gate = f'(gate) up grad,  d_up = f(gate) grad"""
    wide, g = widened(gate), widened(grad)
    d_gate = empty_laid_out_like(gate).copy_(slope(wide, NAMES[kind]) * widened(up) * g)
    return d_gate, empty_laid_out_like(gate).copy_(value(wide, NAMES[kind]) * g)


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
