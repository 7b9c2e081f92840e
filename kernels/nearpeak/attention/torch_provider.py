"""nearpeak under every `F.scaled_dot_product_attention` of a program, by PyTorch's own door for such providers.

    >>> torch.nn.attention.activate_flash_attention_impl("nearpeak")
    >>> torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)  # nearpeak's kernels
    >>> torch.nn.attention.restore_flash_attention_impl()  # PyTorch's again

What PyTorch sends to its fused attention on the CPU then runs here, forward and backward: calls without dropout, with
any mask that needs no gradient. Results are laid out in memory as PyTorch's own, on which compiled graphs rely: `out`
as query is, the others sequence first.
"""

import warnings

import torch

from .. import backends
from . import reference
from .operator import MAX_HEAD_DIM, mask_and_bias, of_all_keys

NAME = "nearpeak"
FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


class _Handle:
    """What `restore_flash_attention_impl` undoes."""

    def __init__(self, library):
        self.library = library

    def remove(self) -> None:
        self.library._destroy()


def register() -> None:
    """Make the name known to PyTorch, from 2.11 on; nothing changes until a program activates it."""
    if hasattr(torch.nn.attention, "register_flash_attention_impl"):
        torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_activate)


def _activate():
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # That a kernel of PyTorch's own is replaced, which is what the program asked for.
        warnings.simplefilter("ignore", UserWarning)
        library.impl(FORWARD, _forward, "CPU")
        library.impl(BACKWARD, _backward, "CPU")
    return _Handle(library)


def _forward(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    query, key, value = _readable(query, key, value)
    serve = reference.attention if _plain_serves(query, value) else torch.ops.nearpeak.attention_inference
    out, lse = serve(query, key, value, *_options(query, key, is_causal, scale, attn_mask))
    return out, _sequence_first(lse)


def _backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None):
    query, key, value = _readable(query, key, value)
    serve = reference.attention_backward if _plain_serves(query, value) else torch.ops.nearpeak.attention_backward
    options = _options(query, key, is_causal, scale, attn_mask)
    *gradients, _ = serve(grad_out, None, query, key, value, out, logsumexp, *options)
    return tuple(_sequence_first(gradient) for gradient in gradients)


def _plain_serves(query, value) -> bool:
    """Whether the call is none of the kernels': its dtype, or a head_dim wider than they take."""
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        return True
    return backends.reference_serves(query, kernels=backends.WITHOUT_CUDA)


def _options(query, key, is_causal, scale, attn_mask):
    """What follows query, key and value in attention's operators."""
    mask, bias = mask_and_bias(None if attn_mask is None else of_all_keys(attn_mask, key))
    # PyTorch's causal mask aligns to the top left: query i sees keys up to i.
    right = query.shape[2] - key.shape[2] if is_causal else None
    return None, right, query.shape[3] ** -0.5 if scale is None else scale, None, mask, bias


def _readable(*tensors):
    return (t if t.stride(3) == 1 else t.contiguous() for t in tensors)


def _sequence_first(tensor):
    """(batch, heads, sequence, ...) stored as (batch, sequence, heads, ...)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)
