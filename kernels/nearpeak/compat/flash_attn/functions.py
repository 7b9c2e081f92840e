"""flash-attn's functions for training and prefill: whole batches, and packed sequences of different lengths."""

import torch

from ...attention import attention
from .arguments import (
    check_grouped,
    check_heads,
    check_integers,
    check_parts,
    dense_last,
    options_of,
)
from .pages import gathered, used_pages

BATCHED = "(batch, sequence, heads, head_dim)"
PACKED = "(tokens, heads, head_dim)"
PAGED = "(num_blocks, page_size, heads, head_dim)"


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """flash-attn's attention of a batch: softmax(scale q k^T) v.

    Query i stands at position p = i + (key length - query length), so that the last query sees the last key.

    Args:
        q: (batch, query length, heads, head_dim), float32, bfloat16, float16 or float64.
        k, v: (batch, key length, key heads, head_dim), q's dtype; key heads must divide heads.
        dropout_p: the chance of a weight to be dropped; which, torch's generator decides (see `nearpeak.attention`).
        softmax_scale: None means 1 / sqrt(head_dim).
        causal: only keys at positions <= p, whatever the window's right side is.
        window_size: (left, right), only keys at p - left .. p + right; -1 leaves a side open.
        softcap: scores become softcap tanh(scores / softcap); 0.0 means none.
        alibi_slopes: (heads,) or (batch, heads), float32 or q's dtype: -slope |p - key's position| is added.
        deterministic: changes nothing, results always are.
        return_attn_probs: return (out, softmax_lse, None), None standing for the probabilities, which flash-attn
            returns with dropout only.

    Returns:
        out, of q's shape (with v's head_dim); or (out, softmax_lse, None), softmax_lse (batch, heads, query length) in
        float32 (float64 for float64), -inf for a query that sees no key. Gradients flow through both.

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape, device or option that does not fit.

    Dao 2023, https://arxiv.org/abs/2307.08691.

    >>> from nearpeak.compat.flash_attn import flash_attn_func
    >>> q, k = torch.randn(1, 10, 8, 64), torch.randn(1, 100, 2, 64)
    >>> out = flash_attn_func(q, k, k, causal=True, window_size=(64, 0))
    """
    check_heads("q", q, BATCHED)
    check_heads("k", k, BATCHED, q)
    check_heads("v", v, BATCHED, q)
    check_grouped(q, k, "k", v, "v")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have q's batch, {q.shape[0]}, not {k.shape[0]}")
    options = options_of(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p)
    query, key, value = (dense_last(tensor).transpose(1, 2) for tensor in (q, k, v))
    out, lse = attention(query, key, value, **options, return_lse=True)
    out = out.transpose(1, 2)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """`flash_attn_func` of keys and values in one tensor.

    kv: (batch, key length, 2, key heads, head_dim), keys before values. Everything else as in `flash_attn_func`.

    >>> from nearpeak.compat.flash_attn import flash_attn_kvpacked_func
    >>> out = flash_attn_kvpacked_func(torch.randn(1, 10, 8, 64), torch.randn(1, 100, 2, 2, 64), causal=True)
    """
    check_parts("kv", kv, "(batch, sequence, 2, heads, head_dim)")
    return flash_attn_func(
        q, *kv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """`flash_attn_func` of queries, keys and values in one tensor.

    qkv: (batch, length, 3, heads, head_dim), in this order. Everything else as in `flash_attn_func`.

    >>> from nearpeak.compat.flash_attn import flash_attn_qkvpacked_func
    >>> out = flash_attn_qkvpacked_func(torch.randn(1, 10, 3, 8, 64), causal=True)
    """
    check_parts("qkv", qkv, "(batch, sequence, 3, heads, head_dim)")
    return flash_attn_func(
        *qkv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """flash-attn's attention of packed sequences, which lie one behind the other, none looking at another.

    Args:
        q: (query tokens, heads, head_dim).
        k, v: (key tokens, key heads, head_dim); with block_table (num_blocks, page_size, key heads, head_dim).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32 or int64, where each sequence begins, and where the last
            one ends: from 0, for q to the number of its tokens.
        max_seqlen_q, max_seqlen_k: the longest sequences, which the kernels here find out by themselves.
        alibi_slopes: (heads,) or (sequences, heads).
        block_table: (sequences, pages) int32 or int64, the pages of each sequence, whose lengths cu_seqlens_k gives.
        the others as in `flash_attn_func`, positions counting within a sequence.

    Returns:
        out, of q's shape (with v's head_dim); or (out, softmax_lse, None), softmax_lse being (heads, query tokens).

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape, device, option or number that does not fit.

    >>> from nearpeak.compat.flash_attn import flash_attn_varlen_func
    >>> qkv, starts = torch.randn(10, 3, 8, 64), torch.tensor([0, 3, 10], dtype=torch.int32)  # 3 and 7 tokens
    >>> out = flash_attn_varlen_func(*qkv.unbind(1), starts, starts, 7, 7, causal=True)
    """
    layout = PACKED if block_table is None else PAGED
    check_heads("q", q, PACKED)
    check_heads("k", k, layout, q)
    check_heads("v", v, layout, q)
    check_grouped(q, k, "k", v, "v")
    check_integers("cu_seqlens_q", cu_seqlens_q, (None,), q.device)
    check_integers("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, q.device)
    options = options_of(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p)
    bounds = {"query_starts": cu_seqlens_q, "key_starts": cu_seqlens_k}
    if block_table is not None:
        k, v, bounds["key_starts"], bounds["key_ends"] = _sequences_of_pages(k, v, cu_seqlens_k, block_table)
    tensors = tuple(dense_last(tensor).transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
    try:
        if alibi_slopes is not None and alibi_slopes.dim() == 2:
            _check_starts("cu_seqlens_q", cu_seqlens_q, q.shape[0], exactly=True)
            _check_starts("cu_seqlens_k", cu_seqlens_k, k.shape[0], exactly=False)
            out, lse = _one_by_one(tensors, bounds, options)
        else:
            out, lse = attention(*tensors, **bounds, **options, return_lse=True)
    except (RuntimeError, ValueError):
        _check_starts("cu_seqlens_q", cu_seqlens_q, q.shape[0], exactly=True)
        _check_starts("cu_seqlens_k", cu_seqlens_k, k.shape[0], exactly=False)
        raise
    out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """`flash_attn_varlen_func` of keys and values in one tensor.

    kv: (key tokens, 2, key heads, head_dim), keys before values. Everything else as in `flash_attn_varlen_func`.

    >>> from nearpeak.compat.flash_attn import flash_attn_varlen_kvpacked_func
    >>> q, kv, starts = torch.randn(10, 8, 64), torch.randn(10, 2, 2, 64), torch.tensor([0, 3, 10])
    >>> out = flash_attn_varlen_kvpacked_func(q, kv, starts, starts, 7, 7, causal=True)
    """
    check_parts("kv", kv, "(tokens, 2, heads, head_dim)")
    return flash_attn_varlen_func(
        q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """`flash_attn_varlen_func` of queries, keys and values in one tensor.

    qkv: (tokens, 3, heads, head_dim), in this order; cu_seqlens and max_seqlen are those of all three. Everything else
    as in `flash_attn_varlen_func`.

    >>> from nearpeak.compat.flash_attn import flash_attn_varlen_qkvpacked_func
    >>> out = flash_attn_varlen_qkvpacked_func(torch.randn(10, 3, 8, 64), torch.tensor([0, 3, 10]), 7, causal=True)
    """
    check_parts("qkv", qkv, "(tokens, 3, heads, head_dim)")
    check_integers("cu_seqlens", cu_seqlens, (None,), qkv.device)
    return flash_attn_varlen_func(
        *qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _sequences_of_pages(k, v, cu_seqlens_k, block_table):
    """Keys and values of all sequences as packed tensors, and where those of each begin and end."""
    lengths = cu_seqlens_k.long().diff()
    table = used_pages(k, block_table, lengths)
    k, v = gathered(k, table), gathered(v, table)
    starts = torch.arange(lengths.shape[0] + 1, device=k.device) * k.shape[1]
    return k.flatten(0, 1), v.flatten(0, 1), starts, starts[:-1] + lengths


def _one_by_one(tensors, bounds, options):
    """Each sequence by itself, with its row of ALiBi slopes, which attention takes one of for a packed batch."""
    query, key, value = tensors
    slopes = options.pop("alibi_slopes")
    query_starts, key_starts = (bounds[name].tolist() for name in ("query_starts", "key_starts"))
    key_ends = bounds["key_ends"].tolist() if "key_ends" in bounds else key_starts[1:]
    if slopes.shape[0] != len(key_ends):
        raise ValueError(f"alibi_slopes must have a row for each of {len(key_ends)} sequences, not {slopes.shape[0]}")
    if not key_ends:
        return attention(*tensors, **bounds, **options, return_lse=True)
    results = []
    for index, row in enumerate(slopes):
        queries = slice(query_starts[index], query_starts[index + 1])
        keys = slice(key_starts[index], key_ends[index])
        part = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        results.append(attention(*part, **options, alibi_slopes=row, return_lse=True))
    return tuple(torch.cat(each, 2) for each in zip(*results, strict=True))


def _check_starts(name, starts, tokens, exactly):
    numbers = starts.tolist()
    if not numbers or numbers[0] != 0 or numbers != sorted(numbers):
        raise ValueError(f"{name} must rise from 0, not be {numbers}")
    if numbers[-1] > tokens or (exactly and numbers[-1] != tokens):
        raise ValueError(f"{name} must end with the number of tokens, {tokens}, not {numbers[-1]}")
