"""Attention on the GPU: launches triton_forward's kernel, and triton_merge's where keys are split over programs."""

import math

import torch
import triton
import triton.language as tl

from .. import operators, triton_launch
from . import triton_merge, triton_tiles
from .triton_forward import attend
from .triton_merge import merge

SMALLEST_FACTOR = 1e-30  # stands for a scale of 0, which would make NaN of a masked score's -inf


def attention(query, key, value, window_left, window_right, scale, softcap):
    out = operators.empty_laid_out_like(query, value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    batch, heads, length, head_dim = query.shape
    left, right = _needed_window(window_left, window_right, length, key.shape[2])
    programs, splits, tile = _grid(query, key, left, right)
    with triton_launch.on(query.device):
        if splits == 1:
            _launch(query, key, value, out, lse, left, right, scale, softcap, programs, splits, tile)
            return out, lse
        parts = query.new_empty(splits, batch, heads, length, head_dim, dtype=torch.float32)
        part_lse = query.new_empty(splits, batch, heads, length, dtype=torch.float32)
        _launch(query, key, value, parts, part_lse, left, right, scale, softcap, programs, splits, tile)
        _launch_merge(parts, part_lse, out, lse)
    return out, lse


def _needed_window(left, right, query_length, key_length):
    """The window without the sides that forbid nothing, and within 32 bits."""
    reach = query_length + key_length
    if left is not None:
        left = None if left >= key_length - 1 else max(left, -reach)
    if right is not None:
        right = None if right >= query_length - 1 else max(right, -reach)
    return left, right


def _grid(query, key, left, right):
    """How many programs there are, over how many each one's keys are split, and what tile each takes."""
    batch, heads, length, head_dim = query.shape
    _, key_heads, key_length, _ = key.shape
    device = triton_launch.describe(query.device)
    rows = length * (heads // key_heads)
    tile = triton_tiles.tile_sizes(rows, head_dim, query.element_size(), device.architecture, left is not None)
    programs = batch * key_heads * triton.cdiv(rows, tile.rows)
    open_keys = key_length
    if left is not None and right is not None:
        open_keys = min(key_length, max(0, left + right + length))
    return programs, triton_tiles.splits(programs, open_keys, device.processors), tile


def _launch(query, key, value, out, lse, left, right, scale, softcap, programs, splits, tile):
    _, heads, length, head_dim = query.shape
    _, key_heads, key_length, _ = key.shape
    strides = [stride for t in (query, key, value) for stride in t.stride()[:3]]
    strides += [0, *out.stride()[:3]] if out.dim() == 4 else out.stride()[:4]
    vector = triton_launch.vector_length(query.element_size(), *strides)
    farthest = tile.keys * max(key.stride(2), value.stride(2))
    factor = abs(scale) * math.log2(math.e) if softcap is None else abs(scale) / softcap
    attend[(programs, splits)](
        query, key, value, out, lse, length, key_length, key_heads, left or 0, right or 0,
        max(factor, SMALLEST_FACTOR), softcap, *(stride // vector for stride in strides),
        OFFSET=tl.int32 if farthest < 2**31 else tl.int64, HAS_LEFT=left is not None, HAS_RIGHT=right is not None, NEGATIVE=scale < 0, GROUP=heads // key_heads, HEAD_DIM=head_dim,
        VECTOR=vector, BLOCK_M=tile.rows, BLOCK_N=tile.keys, BLOCK_D=triton_tiles.padded(head_dim),
        num_warps=tile.warps, num_stages=tile.stages, **triton_launch.OPTIONS,
    )  # fmt: skip


def _launch_merge(parts, part_lse, out, lse):
    splits, _, heads, length, head_dim = parts.shape
    vector = triton_launch.vector_length(out.element_size(), *out.stride()[:3])
    merge[(triton.cdiv(lse.numel(), triton_merge.ROWS),)](
        parts, part_lse, out, lse, splits, lse.numel(), heads, length, *(stride // vector for stride in out.stride()[:3]),
        VECTOR=vector, HEAD_DIM=head_dim, ROWS=triton_merge.ROWS, BLOCK_D=triton_tiles.padded(head_dim),
        **triton_launch.describe(out.device).options(triton_merge.THREADS),
    )  # fmt: skip
