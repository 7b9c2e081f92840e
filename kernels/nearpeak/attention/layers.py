"""The module that stands in for torch.nn.MultiheadAttention.

    out = concat(softmax(query Wq (key Wk)^T / sqrt(head_dim)) value Wv, over the heads) Wo

Each product adds its bias. The products of tensors that are one and the same, as in self-attention, are one product.
"""

import torch

from .. import backends
from ..linear import linear
from .operator import MAX_HEAD_DIM, attention
from .sdpa import scaled_dot_product_attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` served by `nearpeak.attention`: same constructor, same state dict, same numbers.

    The kernels serve calls with `need_weights=False` (torch's default is True, but weights are what they never hold),
    in training those without dropout. All others go to PyTorch's own layer, and `nearpeak.explain` says so. A query
    that may look at no key gets zeros before the last product, as from torch's `scaled_dot_product_attention`.

    >>> layer = nearpeak.nn.MultiheadAttention(640, 10, batch_first=True)
    >>> x = torch.randn(2, 7, 640)
    >>> padding = torch.arange(7) >= torch.tensor([7, 5])[:, None]  # True where a key is padding, as in torch
    >>> out, _ = layer(x, x, x, key_padding_mask=padding, need_weights=False)
    """

    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
        average_attn_weights=True, is_causal=False,
    ):  # fmt: skip
        rest = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        return multihead(self, torch.nn.MultiheadAttention.forward, query, key, value, *rest)


def multihead(
    layer, torchs, query, key, value,
    key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True, is_causal=False,
):  # fmt: skip
    """What a torch.nn.MultiheadAttention computes: by the kernels, or by torch's forward where they do not serve it."""
    why = _why_torch_serves(layer, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
    if why is not None:
        backends.because(f"{why}: torch's MultiheadAttention serves it")
        rest = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        return torchs(layer, query, key, value, *rest)
    unbatched = query.dim() == 2
    sequence_first = not unbatched and not layer.batch_first
    projected = _projections(layer, query, key, value)
    if unbatched:
        projected = [each.unsqueeze(0) for each in projected]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    # (batch, heads, length, head_dim)
    order = (1, 2, 0, 3) if sequence_first else (0, 2, 1, 3)
    q, k, v = (each.unflatten(-1, (layer.num_heads, layer.head_dim)).permute(order) for each in projected)
    k, v = _with_more_keys(layer, k, v)
    if is_causal and key_padding_mask is None:
        # As in torch, is_causal then stands for attn_mask, and aligns to the top left.
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mask, bias = _mask_and_bias(q, k, key_padding_mask, attn_mask)
        out = attention(q, k, v, mask=mask, bias=bias)
    out = out.permute((2, 0, 1, 3) if sequence_first else (0, 2, 1, 3)).flatten(2)
    out = _product(out, layer.out_proj.weight, layer.out_proj.bias)
    return out.squeeze(0) if unbatched else out, None


def _why_torch_serves(layer, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal):
    """Why a call goes to torch's own layer, which may refuse it; None if the kernels serve it."""
    if need_weights:
        return "need_weights=True asks for the weights"
    if layer.training and layer.dropout > 0.0:
        return "dropout > 0 in training"
    if layer.head_dim > MAX_HEAD_DIM:
        return f"head_dim is not 1..{MAX_HEAD_DIM}"
    if is_causal and attn_mask is None:
        return "is_causal is given without attn_mask"
    if not all(isinstance(each, torch.Tensor) and not each.is_nested for each in (query, key, value)):
        return "query, key and value are not all plain tensors"
    for mask in (key_padding_mask, attn_mask):
        if mask is not None and mask.dtype not in (torch.bool, query.dtype):
            return "a mask is neither boolean nor of query's dtype"
    if not _shapes_fit(layer, query, key, value, key_padding_mask, attn_mask):
        return "query, key, value and masks are not of shapes that fit"
    return None


def _shapes_fit(layer, query, key, value, key_padding_mask, attn_mask):
    if not query.dim() == key.dim() == value.dim() or query.dim() not in (2, 3):
        return False
    unbatched = query.dim() == 2
    length_dim = 1 if layer.batch_first and not unbatched else 0
    length, keys = query.shape[length_dim], key.shape[length_dim]
    batch = () if unbatched else (query.shape[1 - length_dim],)

    def shape(length, width):
        return (*batch, length, width) if length_dim else (length, *batch, width)

    of_heads = layer.num_heads * (1 if unbatched else batch[0])
    return (
        query.shape == shape(length, layer.embed_dim)
        and key.shape == shape(keys, layer.kdim)
        and value.shape == shape(keys, layer.vdim)
        and (key_padding_mask is None or key_padding_mask.shape == (*batch, keys))
        and (attn_mask is None or attn_mask.shape in ((length, keys), (of_heads, length, keys)))
    )


def _projections(layer, query, key, value):
    """query Wq, key Wk and value Wv: each (..., embed_dim), in as few products as there are different tensors."""
    bias = layer.in_proj_bias
    if layer.in_proj_weight is None:
        weights = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
    elif query is key and key is value:
        return _product(query, layer.in_proj_weight, bias).chunk(3, -1)
    elif key is value:
        width = layer.embed_dim
        of_query, of_others = (None, None) if bias is None else bias.split((width, 2 * width))
        query_weight, others = layer.in_proj_weight.split((width, 2 * width))
        return _product(query, query_weight, of_query), *_product(key, others, of_others).chunk(2, -1)
    else:
        weights = layer.in_proj_weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [_product(*each) for each in zip((query, key, value), weights, biases, strict=True)]


def _product(x, weight, bias):
    """On GPUs torch's own library is the one to use, even where the user forces a backend for attention."""
    return linear(x, weight, bias) if x.is_cpu else torch.nn.functional.linear(x, weight, bias)


def _with_more_keys(layer, k, v):
    """The layer's own key and value (add_bias_kv) and those of zeros (add_zero_attn) behind the others."""
    if layer.bias_k is not None:
        k, v = (
            torch.cat((each, own.to(each.dtype).view(1, *each.shape[1:2], 1, -1).expand(each.shape[0], -1, -1, -1)), 2)
            for each, own in ((k, layer.bias_k), (v, layer.bias_v))
        )
    if layer.add_zero_attn:
        k, v = (torch.nn.functional.pad(each, (0, 0, 0, 1)) for each in (k, v))
    return k, v


def _mask_and_bias(q, k, key_padding_mask, attn_mask):
    """attention's mask (True where a query may look, torch's is True where it may not) and bias, or None for none.

    The layer's own keys, behind those that the masks are of, may be looked at by all.
    """
    masks = []
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, q.shape[:2]) if attn_mask.dim() == 3 else attn_mask[None, None])
    more = k.shape[2] - (masks[0].shape[3] if masks else 0)
    masks = [torch.nn.functional.pad(each, (0, more)) if more else each for each in masks]
    forbidden = [each for each in masks if each.dtype is torch.bool]
    added = [each for each in masks if each.dtype is not torch.bool]
    mask = ~(forbidden[0] | forbidden[-1]) if forbidden else None
    bias = sum(added[1:], added[0]) if added else None
    # Under autocast q is narrower than the query whose dtype the masks have.
    return mask, bias if bias is None or bias.dtype is q.dtype else bias.float()
