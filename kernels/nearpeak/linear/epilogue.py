"""What may follow a linear layer's product before it is stored:  y = f(x W^T + b) + residual.

Gradients need what f is of. The operators store it beside y where gradients follow: one tensor of y's size, written
once, where computing it again would cost a product.
"""

import torch

from ..activations import KINDS, NAMES
from ..checks import check_same_kind
from ..feedforward import activation as apply_activation


def kind_of(activation):
    """The number of an activation, as operators take it; None for none."""
    if activation is not None and activation not in KINDS:
        raise ValueError(f"activation must be None or one of {', '.join(KINDS)}, not {activation!r}")
    return None if activation is None else KINDS[activation]


def check(x, out_features, residual, kind):
    if kind is not None and kind not in range(len(NAMES)):
        raise ValueError(f"activation must be the number of one of {', '.join(NAMES)}, not {kind!r}")
    if residual is not None:
        check_same_kind("residual", residual, "x", x)
        if residual.shape != (*x.shape[:-1], out_features):
            raise ValueError(
                f"residual must have y's shape {(*x.shape[:-1], out_features)}, not {tuple(residual.shape)}"
            )


def shapes(x, out_features, keep):
    """Empty outputs of an operator with an epilogue: y, and what its activation is of, or nothing."""
    shape = *x.shape[:-1], out_features
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


def follow(y, kind, residual):
    """The epilogue of a product that another library has stored."""
    if kind is not None:
        y = apply_activation(y, NAMES[kind])
    return y if residual is None else y + residual


def save(ctx, output, kind, *tensors):
    """Keeps for the gradient what the activation is of, and then tensors."""
    before = output[1]
    ctx.activation = kind
    ctx.save_for_backward(before, *tensors)
    ctx.mark_non_differentiable(before)
    ctx.set_materialize_grads(False)


def gradient_of_product(grad, before, kind):
    """f'(before) grad"""
    return grad if kind is None else torch.ops.nearpeak.activation_backward(grad, before, kind)
