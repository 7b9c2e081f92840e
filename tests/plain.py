"""The plain PyTorch layers that users have today: what a kernel's error is held against.

Each takes the arguments of the family's reference, computes in the inputs' own dtype, and gets its gradients from
autograd. Rotary embedding and eager attention are shared with the harness: see nearpeak_bench.plain.
"""

import torch
import torch.nn.functional as F
from nearpeak_bench.plain import attention, lse_dtype, rotary

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "doubled",
    "fused_attention",
    "layer_norm",
    "layer_norm_of_sum",
    "lse_dtype",
    "rms_norm",
    "rotary",
    "value_and_gradients",
]


def rms_norm(x, weight, eps, offset, cast_first=False):
    """torch's layer; with an offset Gemma's, with cast_first Llama's, as Hugging Face's transformers writes them."""
    if not cast_first and offset == 0.0 and (weight is None or weight.dtype is x.dtype):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    wide = x if x.dtype is torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = y.to(x.dtype) if cast_first else y
    return (y if weight is None else y * (offset + weight.to(wide.dtype))).to(x.dtype)


def add_rms_norm(x, residual, weight, eps, offset, cast_first=False):
    hidden = x + residual
    return rms_norm(hidden, weight, eps, offset, cast_first), hidden


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(x, residual, weight, bias, eps):
    hidden = x + residual
    return layer_norm(hidden, weight, bias, eps), hidden


def layer_norm_of_sum(x, residual, weight, bias, eps):
    return layer_norm(x + residual, weight, bias, eps)


def fused_attention(query, key, value, mask, scale):
    """F.scaled_dot_product_attention, which transformers runs by default. Returns out; it has no lse to give."""
    if key.shape[1]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(query, key, value, None if mask.all() else mask, scale=scale)


def value_and_gradients(function, inputs, grads=None):
    """Outputs of function(*inputs) and the gradients of every input, flat.

    inputs may hold None, which has no gradient. grads: one gradient per output; None computes outputs only.
    Asserts that neither the inputs nor the gradients are written to.
    """
    before = [None if t is None else t.clone() for t in (*inputs, *(grads or ()))]
    leaves = [None if t is None else t.detach().requires_grad_(grads is not None) for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = () if grads is None else torch.autograd.grad(outputs, [t for t in leaves if t is not None], grads)
    for tensor, clone in zip((*inputs, *(grads or ())), before, strict=True):
        assert tensor is None or torch.equal(tensor.nan_to_num(), clone.nan_to_num()), "a caller's tensor was written"
    return *(t.detach() for t in outputs), *gradients


def doubled(tensors):
    """The same tensors in float64."""
    return tuple(None if t is None else t.double() for t in tensors)
