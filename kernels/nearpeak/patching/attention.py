"""Attention of transformers models, through transformers' own two doors.

A model whose configuration says `_attn_implementation = "nearpeak"` builds its masks with `mask` and calls
`attention_forward`. `mask` makes no more than the kernels need beside the options that they have themselves, which are
causal with the last query at the last key (any number of cached keys), with or without a sliding window, or full:

    None                            the options say it all
    (batch, 1, 1, keys)             the options, and a mask of padding, one row for all queries
    (batch, 1, queries, keys)       the mask says it all, as for PyTorch's SDPA

Of a single query the last two look alike: there, a mask always says it all.
"""

import sys

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

from .. import backends
from ..attention import attention
from ..attention.operator import MAX_HEAD_DIM, mask_and_bias
from ..attention.reference import allowed

NAME = "nearpeak"


def register() -> None:
    """Make the name "nearpeak" known to transformers; no model uses it until it is told to."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=False,
    config=None,
    **others,
):
    """transformers' mask interface: what `attention_forward` needs of the mask, as this module's docstring says.

    allow_is_causal_skip, allow_is_bidirectional_skip: set by transformers where `mask_function` is the plain causal
    (or sliding, or chunked) mask, or the full one, with nothing added to it.
    """
    if allow_is_causal_skip:
        # A static cache gives a tensor offset, and keys beyond the last query.
        last_at_last = not isinstance(q_offset, torch.Tensor) and q_offset + q_length == kv_offset + kv_length
        expressed = last_at_last and _is_band(config, kv_offset + kv_length, local_size)
    else:
        expressed = allow_is_bidirectional_skip and (local_size is None or kv_length < local_size)
    if expressed:
        padding = _padding(attention_mask, kv_length, kv_offset)
        if padding is None or q_length > 1:
            return padding
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **others,
    )


def _is_band(config, end, local_size) -> bool:
    """Whether a causal mask of `local_size` over keys up to position `end` is what `sliding_window` expresses.

    transformers gives both windows and chunks as local_size; chunks are no band once there is more than one.
    """
    if local_size is None or end <= local_size:
        return True
    return local_size == getattr(config, "sliding_window", None) != getattr(config, "attention_chunk_size", None)


def _padding(attention_mask, kv_length, kv_offset):
    """The keys that padding leaves, (batch, 1, 1, keys), or None where it leaves all."""
    if attention_mask is None:
        return None
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)[:, kv_offset : kv_offset + kv_length]
    # Values that cannot be read now may hide a key.
    if not is_tracing(attention_mask) and padding.all():
        return None
    return padding[:, None, None].to(torch.bool)


def attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    softcap=None,
    **others,
):
    """transformers' attention interface: (batch, heads, sequence, head_dim) in, (output, weights or None) out."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    window = others.get("sliding_window") if is_causal else None
    left = None if window is None else window - 1
    why = _why_transformers_serves(query, key, value, attention_mask, dropout, others)
    options_count = attention_mask is None or _is_padding(attention_mask, query)
    if why is None:
        if is_causal and options_count and "sliding_window" not in others:
            _check_window(module, key)
        masks = _masks(attention_mask, is_causal and options_count, left)
        out = attention(query, key, value, scale=scaling, softcap=softcap, sinks=others.get("s_aux"), **masks)
        return out.transpose(1, 2).contiguous(), None
    if (
        is_causal
        and options_count
        and (attention_mask is not None or left is not None or query.shape[2] != key.shape[2])
    ):
        band = allowed(query.shape[2], key.shape[2], left, 0, query.device)[None, None]
        attention_mask = band if attention_mask is None else band & attention_mask
    if softcap is not None or others.get("output_attentions"):
        backends.because(f"{why}: transformers' eager attention serves it")
        return _eager(module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap, others)
    backends.because(f"{why}: torch's scaled_dot_product_attention serves it")
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )


def _is_padding(attention_mask, query) -> bool:
    """Whether a mask is one of padding alone: see this module's docstring."""
    return attention_mask.dim() == 4 and attention_mask.shape[2] == 1 < query.shape[2]


def _masks(attention_mask, is_causal, left) -> dict:
    """attention's options for a mask that says it all, or for padding beside a causal mask and its window."""
    mask, bias = mask_and_bias(attention_mask)
    band = {"causal": True, "window": (left, None)} if is_causal else {}
    return {**band, "mask": mask, "bias": bias}


def _why_transformers_serves(query, key, value, attention_mask, dropout, others):
    """Why a call goes to transformers' own attention, or None if the kernels serve it."""
    if attention_mask is not None and attention_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return "the mask is neither boolean nor of query's dtype"
    if dropout > 0.0:
        return "dropout > 0"
    if others.get("output_attentions"):
        return "output_attentions asks for weights, which the kernels never hold"
    for name in ("position_bias", "cache"):
        if others.get(name) is not None:
            return f"{name} is given, which the kernels do not read yet"
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value differ in dtype"
    if not all(1 <= t.shape[-1] <= MAX_HEAD_DIM for t in (query, value)):
        return f"head_dim is not 1..{MAX_HEAD_DIM}"
    if any(t.stride(-1) != 1 for t in (query, key, value)):
        return "a last dimension is not dense"
    return None


def _check_window(module, key) -> None:
    """Refuse a call whose window nobody passed on: some modules rely on the mask alone for it."""
    window = getattr(getattr(module, "config", None), "sliding_window", None)
    if window is not None and key.shape[2] > window:
        raise RuntimeError(
            f"{type(module).__name__} does not pass its sliding window of {window} to the attention function, so "
            f'"{NAME}" cannot serve {key.shape[2]} keys: use attn_implementation="sdpa"'
        )


def _eager(module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap, others):
    """The model's own plain attention, which knows softcap and returns the weights."""
    serve = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if serve is None:
        raise NotImplementedError(f"{type(module).__module__} has no eager attention that could serve this call")
    if attention_mask is None and is_causal and query.shape[2] > 1:
        attention_mask = allowed(query.shape[2], key.shape[2], None, 0, query.device)[None, None]
    if attention_mask is not None and attention_mask.dtype is torch.bool:
        zeros = torch.zeros((), dtype=query.dtype, device=query.device)
        attention_mask = torch.where(attention_mask, zeros, torch.finfo(query.dtype).min)
    if softcap is not None:
        others = {**others, "softcap": softcap}
    return serve(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
