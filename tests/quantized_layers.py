"""What the tests of layers with quantised weights share: what follows a product, and gradients over draws."""

import plain
import torch.nn.functional as F


def followed(y, residual, activation):
    """The epilogue; the only activation of these tests is SiLU."""
    y = F.silu(y) if activation else y
    return y if residual is None else y + residual


def gradients(function, draws, grads, double=False):
    """Those of x, bias and residual, for draws (x, weight, bias, residual, activation) of function's arguments."""
    found = []
    for (x, weight, bias, residual, activation), grad in zip(draws, grads, strict=True):
        inputs, upstream = (plain.doubled(t) if double else t for t in ((x, bias, residual), grad))

        def call(x, bias, residual, weight=weight, activation=activation):
            return function(x, weight, bias, residual, activation)

        found.append(plain.value_and_gradients(call, inputs, upstream)[1:])
    return found
