"""Attention on the GPU: launches triton_forward's kernel, and triton_merge's where keys are split over programs."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import backends, operators, triton_launch
from . import reference, triton_merge, triton_tiles
from .triton_forward import attend
from .triton_merge import merge

SMALLEST_FACTOR = 1e-30  # stands for a scale of 0, which would make NaN of a masked score's -inf


class _Plan(NamedTuple):
    """How one call is laid out on the GPU."""

    left: int | None  # the window, without the sides that forbid nothing
    right: int | None
    tile: triton_tiles.Tile
    programs: int
    splits: int  # programs that share the keys of one tile


MAX_HEAD_DIM = 256


def _why_reference(query, value, terms):
    """Why a call goes to the reference, or None if the kernel serves it."""
    if query.shape[3] != value.shape[3] or query.shape[3] > MAX_HEAD_DIM:
        return f"head_dim is over {MAX_HEAD_DIM}, or another than value's"
    for name, term in terms.items():
        if term is not None:
            return f"{name} is given, which the Triton kernel does not read yet"
    return None


def attention(
    query, key, value, window_left, window_right, scale, softcap,
    mask=None, bias=None, alibi_slopes=None, sinks=None, query_starts=None, key_starts=None, key_ends=None,
):  # fmt: skip
    terms = {
        **{"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks},
        **{"query_starts": query_starts, "key_starts": key_starts, "key_ends": key_ends},
    }
    why = _why_reference(query, value, terms)
    if why is not None:
        backends.because(f"{why}: plain PyTorch serves it")
        return reference.attention(query, key, value, window_left, window_right, scale, softcap, **terms)
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
