"""`scaled_dot_product_attention` with torch's signature and torch's meaning."""

import torch
from torch import Tensor

from .. import backends
from ..operators import autocast
from .operator import MAX_HEAD_DIM, OPEN, attention, mask_and_bias


def _has_triton(device):
    return device.type == "cuda" and backends.missing("triton") is None


def _why_torch_serves(query, key, value, attn_mask, dropout_p, enable_gqa):
    """Why a call goes to PyTorch's own function, or None if the kernels serve it."""
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        return "attn_mask is neither boolean nor of query's dtype"
    if not 0.0 <= dropout_p < 1.0:
        return "dropout_p is not from 0 to less than 1"
    if dropout_p > 0.0 and query.device.type != "cpu" and not _has_triton(query.device):
        return "dropout_p > 0, which only the kernels for the CPU and Triton's apply"
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if not len(shape) == len(key_shape) == len(value_shape) == 4:
        return "query, key and value are not all four-dimensional"
    if value_shape[:3] != key_shape[:3]:
        return "value and key differ in shape"
    if shape[0] != key_shape[0] or shape[3] != key_shape[3]:
        return "query and key differ in batch or head_dim"
    if not (1 <= shape[3] <= MAX_HEAD_DIM and 1 <= value_shape[3] <= MAX_HEAD_DIM):
        return f"head_dim is not 1..{MAX_HEAD_DIM}"
    if shape[1] != key_shape[1] and not enable_gqa:
        return "query and key differ in heads without enable_gqa"
    if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        return "a last dimension is not dense"
    return None


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """`torch.nn.functional.scaled_dot_product_attention`: its signature, and its meaning to the letter.

    `is_causal` aligns to the top left: query i sees keys 0..i. A boolean `attn_mask` is True where a query may look
    at a key; one of query's dtype is added to the scores, and gets a gradient. Calls in shapes that the
    kernels do not serve go to PyTorch's own function, and `nearpeak.explain` says so.
    Dropout takes its seed from torch's generator, and drops other weights than PyTorch's.

    >>> query = torch.randn(1, 8, 10, 64)
    >>> out = nearpeak.scaled_dot_product_attention(query, query, query, is_causal=True)
    """
    # One expression where all is well: the loop takes 0.4 us.
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = autocast(query), autocast(key), autocast(value)
        if attn_mask is not None:
            attn_mask = autocast(attn_mask)
    why = _why_torch_serves(query, key, value, attn_mask, dropout_p, enable_gqa)
    if why is not None:
        backends.because(f"{why}: torch's scaled_dot_product_attention serves it")
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    # Top-left alignment in attention's bottom-right terms: query i sees keys up to i.
    window = (None, query.shape[2] - key.shape[2]) if is_causal else OPEN
    mask, bias = mask_and_bias(attn_mask)
    return attention(query, key, value, window=window, scale=scale, mask=mask, bias=bias, dropout_p=dropout_p)
