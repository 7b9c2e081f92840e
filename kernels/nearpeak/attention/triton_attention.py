"""Attention on the GPU: launches triton_forward's kernel, and triton_merge's where keys are split over programs; for
the gradients triton_backward's three kernels, one after the other.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import backends, operators, triton_launch
from . import reference, triton_merge, triton_tiles
from .triton_backward import differentiate_key, differentiate_query, prepare
from .triton_forward import attend
from .triton_merge import merge

MAX_HEAD_DIM = 256
TERMS = ("mask", "bias", "alibi_slopes", "sinks", "query_starts", "key_starts", "key_ends", "dropout_seed")
SMALLEST_FACTOR = 1e-30  # stands for a scale of 0, which would make NaN of a masked score's -inf


class _Plan(NamedTuple):
    """How one call is laid out on the GPU."""

    left: int | None  # the window, without the sides that forbid nothing
    right: int | None
    tile: triton_tiles.Tile
    programs: int
    splits: int  # programs that share the keys of one tile


def _plain_serves(query, value, terms) -> bool:
    """Whether a call goes to the reference; `explain` hears why."""
    if query.shape[3] != value.shape[3] or query.shape[3] > MAX_HEAD_DIM:
        backends.because(f"head_dim is over {MAX_HEAD_DIM}, or another than value's: plain PyTorch serves it")
        return True
    # The dispatcher drops trailing arguments that have their default.
    given = [name for name, term in zip(TERMS, terms, strict=False) if term is not None]
    for name in given:
        backends.because(f"{name} is given, which the Triton kernel does not read yet: plain PyTorch serves it")
    return bool(given)


def attention(query, key, value, window_left, window_right, scale, softcap, *terms):
    if _plain_serves(query, value, terms):
        return reference.attention(query, key, value, window_left, window_right, scale, softcap, *terms)
    out = operators.empty_laid_out_like(query, value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    plan = _plan(query, key, window_left, window_right)
    with triton_launch.on(query.device):
        if plan.splits == 1:
            _launch(plan, query, key, value, out, (0, *out.stride()[:3]), lse, scale, softcap)
        else:
            parts = query.new_empty(plan.splits, *out.shape, dtype=torch.float32)
            part_lse = query.new_empty(plan.splits, *lse.shape, dtype=torch.float32)
            _launch(plan, query, key, value, parts, parts.stride()[:4], part_lse, scale, softcap)
            _launch_merge(parts, part_lse, out, lse)
    return out, lse


def _plan(query, key, window_left, window_right):
    batch, heads, length, head_dim = query.shape
    _, key_heads, key_length, _ = key.shape
    left, right = _needed_window(window_left, window_right, length, key_length)
    device = triton_launch.describe(query.device)
    rows = length * (heads // key_heads)
    tile = triton_tiles.tile_sizes(rows, head_dim, query.element_size(), device.architecture, left is not None)
    programs = batch * key_heads * triton.cdiv(rows, tile.rows)
    open_keys = key_length
    if left is not None and right is not None:
        open_keys = min(key_length, max(0, left + right + length))
    return _Plan(left, right, tile, programs, triton_tiles.splits(programs, open_keys, device.processors))


def _needed_window(left, right, query_length, key_length):
    """The window without the sides that forbid nothing, and within 32 bits."""
    reach = query_length + key_length
    if left is not None:
        left = None if left >= key_length - 1 else max(left, -reach)
    if right is not None:
        right = None if right >= query_length - 1 else max(right, -reach)
    return left, right


def _launch(plan, query, key, value, out, out_strides, lse, scale, softcap):
    """out_strides: of split, batch, head and position."""
    _, heads, length, head_dim = query.shape
    _, key_heads, key_length, _ = key.shape
    strides = [*(stride for t in (query, key, value) for stride in t.stride()[:3]), *out_strides]
    vector = triton_launch.vector_length(query.element_size(), *strides)
    factor = abs(scale) * math.log2(math.e) if softcap is None else abs(scale) / softcap
    reach_of_a_block = plan.tile.keys * max(key.stride(2), value.stride(2))
    attend[(plan.programs, plan.splits)](
        query, key, value, out, lse, length, key_length, key_heads, plan.left or 0, plan.right or 0,
        max(factor, SMALLEST_FACTOR), softcap, *(stride // vector for stride in strides),
        OFFSET=tl.int32 if reach_of_a_block < 2**31 else tl.int64,
        HAS_LEFT=plan.left is not None, HAS_RIGHT=plan.right is not None, NEGATIVE=scale < 0,
        GROUP=heads // key_heads, HEAD_DIM=head_dim, VECTOR=vector,
        BLOCK_M=plan.tile.rows, BLOCK_N=plan.tile.keys, BLOCK_D=triton_tiles.padded(head_dim),
        num_warps=plan.tile.warps, num_stages=plan.tile.stages, **triton_launch.OPTIONS,
    )  # fmt: skip


def _launch_merge(parts, part_lse, out, lse):
    splits, _, heads, length, head_dim = parts.shape
    vector = triton_launch.vector_length(out.element_size(), *out.stride()[:3])
    merge[(triton.cdiv(lse.numel(), triton_merge.ROWS),)](
        parts, part_lse, out, lse, splits, lse.numel(), heads, length,
        *(stride // vector for stride in out.stride()[:3]),
        VECTOR=vector, HEAD_DIM=head_dim, ROWS=triton_merge.ROWS, BLOCK_D=triton_tiles.padded(head_dim),
        **triton_launch.describe(out.device).options(triton_merge.THREADS),
    )  # fmt: skip


class _BackwardCall(NamedTuple):
    """The tensors and options that the backward kernels share."""

    grad_out: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    statistics: torch.Tensor  # (2 or 4, rows): lse in base 2, delta; of float32 also dLse and 1 / sum(P)
    left: int | None
    right: int | None
    scale: float
    softcap: float | None


def attention_backward(
    grad_out, grad_lse, query, key, value, out, lse, window_left, window_right, scale, softcap, *terms
):
    if _plain_serves(query, value, terms):
        options = window_left, window_right, scale, softcap, *terms
        return reference.attention_backward(grad_out, grad_lse, query, key, value, out, lse, *options)
    no_bias = query.new_empty(0)
    gradients = tuple(operators.empty_laid_out_like(tensor) for tensor in (query, key, value))
    if lse.numel() == 0 or key.numel() == 0:
        return *(gradient.zero_() for gradient in gradients), no_bias
    grad_out, out = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (grad_out, out))
    statistics = query.new_empty(4 if query.dtype is torch.float32 else 2, lse.numel(), dtype=torch.float32)
    left, right = _needed_window(window_left, window_right, query.shape[2], key.shape[2])
    architecture = triton_launch.describe(query.device).architecture
    call = _BackwardCall(grad_out, query, key, value, statistics, left, right, scale, softcap)
    query_tile, key_tile = triton_tiles.backward_tiles(query.shape[3], query.element_size(), architecture)
    with triton_launch.on(query.device):
        _launch_prepare(call, out, lse.contiguous(), None if grad_lse is None else grad_lse.contiguous())
        _launch_differentiate_query(call, query_tile, gradients[0])
        _launch_differentiate_key(call, key_tile, *gradients[1:])
    return *gradients, no_bias


def _launch_prepare(call, out, lse, grad_lse):
    batch, heads, length, head_dim = call.query.shape
    key_heads = call.key.shape[1]
    strides = *out.stride()[:3], *call.grad_out.stride()[:3]
    vector = triton_launch.vector_length(out.element_size(), *strides)
    tiles = triton.cdiv(length * (heads // key_heads), triton_tiles.PREPARE_ROWS)
    prepare[(batch * key_heads * tiles,)](
        out, call.grad_out, lse, grad_lse, call.statistics, lse.numel(), length, key_heads,
        *(stride // vector for stride in strides),
        EXACT=out.dtype is torch.float32, GROUP=heads // key_heads, HEAD_DIM=head_dim, VECTOR=vector,
        BLOCK_M=triton_tiles.PREPARE_ROWS, BLOCK_D=triton_tiles.padded(head_dim),
        num_warps=triton_tiles.PREPARE_WARPS, **triton_launch.OPTIONS,
    )  # fmt: skip


def _launch_differentiate_query(call, tile, d_query):
    batch, heads, length, _ = call.query.shape
    programs = batch * call.key.shape[1] * triton.cdiv(length * (heads // call.key.shape[1]), tile.rows)
    reach_of_a_block = tile.keys * max(call.key.stride(2), call.value.stride(2))
    _launch_differentiate(differentiate_query, call, programs, tile, reach_of_a_block, d_query)


def _launch_differentiate_key(call, tile, d_key, d_value):
    batch, heads, length, _ = call.query.shape
    _, key_heads, key_length, _ = call.key.shape
    programs = batch * key_heads * triton.cdiv(key_length, tile.keys)
    reach_of_a_key_head = max(
        tensor.stride(1) * (heads // key_heads) + tensor.stride(2) * length for tensor in (call.query, call.grad_out)
    )
    _launch_differentiate(differentiate_key, call, programs, tile, reach_of_a_key_head, d_key, d_value)


def _launch_differentiate(kernel, call, programs, tile, reach, *gradients):
    """reach: how far apart, in elements, the kernel's loop addresses what it loads at most."""
    _, heads, length, head_dim = call.query.shape
    _, key_heads, key_length, _ = call.key.shape
    tensors = call.query, call.key, call.value, call.grad_out
    strides = [stride for tensor in (*tensors, *gradients) for stride in tensor.stride()[:3]]
    vector = triton_launch.vector_length(call.query.element_size(), *strides)
    factor = call.scale * math.log2(math.e) if call.softcap is None else call.scale / call.softcap
    kernel[(programs,)](
        *tensors, call.statistics, *gradients, call.statistics.shape[1], length, key_length, key_heads,
        call.left or 0, call.right or 0, factor, call.softcap, call.scale, *(stride // vector for stride in strides),
        OFFSET=tl.int32 if reach < 2**31 else tl.int64,
        HAS_LEFT=call.left is not None, HAS_RIGHT=call.right is not None, EXACT=call.query.dtype is torch.float32,
        GROUP=heads // key_heads, HEAD_DIM=head_dim, VECTOR=vector,
        BLOCK_M=tile.rows, BLOCK_N=tile.keys, BLOCK_D=triton_tiles.padded(head_dim),
        num_warps=tile.warps, num_stages=tile.stages, **triton_launch.OPTIONS,
    )  # fmt: skip
