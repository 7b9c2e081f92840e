"""Attention on the GPU: launches triton_forward's kernel, and triton_merge's where keys are split over programs; for
the gradients triton_backward's three kernels, one after the other, and triton_bias_gradient's.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import backends, operators, triton_launch
from . import reference, triton_merge, triton_score_mod, triton_sequences, triton_terms, triton_tiles
from .triton_backward import differentiate_key, differentiate_query, prepare
from .triton_bias_gradient import differentiate_bias
from .triton_forward import attend
from .triton_merge import merge

SMALLEST_FACTOR = 1e-30  # stands for a scale of 0, which would make NaN of a masked score's -inf


class _Plan(NamedTuple):
    """How one call is laid out on the GPU."""

    left: int | None  # the window, without the sides that forbid nothing
    right: int | None
    terms: triton_terms.Terms
    bounds: triton_sequences.Bounds
    tile: triton_tiles.Tile
    programs: int
    splits: int  # programs that share the keys of one tile


def attention(
    query, key, value, window_left, window_right, scale, softcap, mask=None, bias=None, alibi_slopes=None, sinks=None,
    query_starts=None, key_starts=None, key_ends=None, dropout_seed=None, dropout_p=0.0,
    score_program=None, score_tensors=None,
):  # fmt: skip
    """out (batch, heads, query length, value's head_dim) and lse (batch, heads, query length)."""
    if _plain_modifies(score_program, score_tensors):
        options = window_left, window_right, scale, softcap, mask, bias, alibi_slopes, sinks
        bounds = query_starts, key_starts, key_ends
        return reference.attention(
            query, key, value, *options, *bounds, dropout_seed, dropout_p, score_program, score_tensors
        )
    bounds = triton_sequences.bounds(query, query_starts, key_starts, key_ends)
    out = operators.empty_laid_out_like(query, value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    with triton_launch.on(query.device):
        terms = triton_terms.terms(
            query, mask, bias, alibi_slopes, sinks, dropout_seed, dropout_p, score_program, score_tensors
        )
        plan = _plan(query, key, value, window_left, window_right, terms, bounds)
        if plan.splits == 1:
            _launch(plan, query, key, value, out, (0, *out.stride()[:3]), lse, scale, softcap)
        else:
            parts = query.new_empty(plan.splits, *out.shape, dtype=torch.float32)
            part_lse = query.new_empty(plan.splits, *lse.shape, dtype=torch.float32)
            _launch(plan, query, key, value, parts, parts.stride()[:4], part_lse, scale, softcap)
            _launch_merge(parts, part_lse, out, lse)
    return out, lse


def _plan(query, key, value, window_left, window_right, terms, bounds):
    batch, heads, length, head_dim = query.shape
    _, key_heads, key_length, _ = key.shape
    left, right = _needed_window(window_left, window_right, length, key_length)
    device = triton_launch.describe(query.device)
    group = heads // key_heads
    # What a packed sequence has of both on average is all that is known here.
    sequences = max(1, bounds.sequences)
    rows, open_keys = triton.cdiv(length, sequences) * group, triton.cdiv(key_length, sequences)
    if left is not None and right is not None:
        open_keys = min(open_keys, max(0, left + right + length))
    width, crowding = max(head_dim, value.shape[3]), triton_terms.crowding(terms, bounds)
    tile = triton_tiles.tile_sizes(rows, width, query.element_size(), device.architecture, left is not None, crowding)
    programs = batch * key_heads * triton_sequences.tiles(bounds, length * group, tile.rows)
    splits = triton_tiles.splits(programs, open_keys, device.processors)
    return _Plan(left, right, terms, bounds, tile, programs, splits)


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
    if scale < 0 and query.shape[3] > triton_tiles.WIDEST:
        # The kernel turns the signs of a query that it holds.
        query, scale = -query, -scale
    _, heads, length, head_dim = query.shape
    _, key_heads, key_length, value_dim = value.shape
    strides = [*(stride for t in (query, key, value) for stride in t.stride()[:3]), *out_strides]
    vector = triton_launch.vector_length(query.element_size(), *strides)
    block_d, block_v = triton_tiles.part_of_head_dim(head_dim), triton_tiles.part_of_value_dim(value_dim)
    factor = _score_factor(abs(scale), softcap, plan.terms)
    reach_of_a_block = plan.tile.keys * max(key.stride(2), value.stride(2))
    attend[(plan.programs, plan.splits, triton.cdiv(value_dim, block_v))](
        query, key, value, out, lse, plan.terms, plan.bounds, length, key_length, key_heads,
        plan.left or 0, plan.right or 0, max(factor, SMALLEST_FACTOR), softcap,
        *(stride // vector for stride in strides),
        OFFSET=tl.int32 if reach_of_a_block < 2**31 else tl.int64,
        HAS_LEFT=plan.left is not None, HAS_RIGHT=plan.right is not None, NEGATIVE=scale < 0,
        GROUP=heads // key_heads, HEAD_DIM=head_dim, VALUE_DIM=value_dim, VECTOR=vector,
        BLOCK_M=plan.tile.rows, BLOCK_N=plan.tile.keys, BLOCK_D=block_d, BLOCK_V=block_v,
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
    terms: triton_terms.Terms
    bounds: triton_sequences.Bounds
    left: int | None
    right: int | None
    scale: float
    softcap: float | None


def attention_backward(
    grad_out, grad_lse, query, key, value, out, lse, window_left, window_right, scale, softcap,
    mask=None, bias=None, alibi_slopes=None, sinks=None,
    query_starts=None, key_starts=None, key_ends=None, dropout_seed=None, dropout_p=0.0,
    score_program=None, score_tensors=None, bias_gradient=False,
):  # fmt: skip
    """dQ, dK and dV, of the shapes of query, key and value, and dbias, of bias's shape or empty."""
    terms, starts = (mask, bias, alibi_slopes, sinks), (query_starts, key_starts, key_ends)
    if _plain_modifies(score_program, score_tensors) or _plain_differentiates(query, value):
        tensors = grad_out, grad_lse, query, key, value, out, lse
        options = window_left, window_right, scale, softcap, *terms, *starts, dropout_seed, dropout_p
        return reference.attention_backward(*tensors, *options, score_program, score_tensors, bias_gradient)
    bounds = triton_sequences.bounds(query, *starts)
    gradients = tuple(operators.empty_laid_out_like(tensor) for tensor in (query, key, value))
    d_bias = bias.new_empty(bias.shape) if bias_gradient else query.new_empty(0)
    if lse.numel() == 0 or key.numel() == 0:
        return *(gradient.zero_() for gradient in gradients), d_bias.zero_()
    grad_out, out = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (grad_out, out))
    statistics = query.new_empty(4 if query.dtype is torch.float32 else 2, lse.numel(), dtype=torch.float32)
    window = _needed_window(window_left, window_right, query.shape[2], key.shape[2])
    with triton_launch.on(query.device):
        terms = triton_terms.terms(query, *terms, dropout_seed, dropout_p, score_program, score_tensors)
        call = _BackwardCall(grad_out, query, key, value, statistics, terms, bounds, *window, scale, softcap)
        _launch_prepare(call, out, lse.contiguous(), None if grad_lse is None else grad_lse.contiguous())
        _launch_differentiate(call, *gradients)
        if bias_gradient:
            _launch_differentiate_bias(call, d_bias)
    return *gradients, d_bias


def _score_factor(scale, softcap, terms):
    """What makes a score of a product: in units of its softcap, as it is for score_mod, else in units of log2."""
    if softcap is not None:
        return scale / softcap
    return scale if terms.modify is not None else scale * math.log2(math.e)


def _plain_modifies(score_program, score_tensors) -> bool:
    """Whether only the reference has what score_mod asks for; `explain` hears why."""
    why = None if score_program is None else triton_score_mod.why_not_served(score_program, score_tensors)
    if why is not None:
        backends.because(why)
    return why is not None


def _plain_differentiates(query, value) -> bool:
    """Whether only the reference has the gradients of a call; `explain` hears why."""
    if max(query.shape[3], value.shape[3]) > triton_tiles.WIDEST:
        backends.because(f"head_dim is over {triton_tiles.WIDEST}: plain PyTorch makes the gradients")
        return True
    return False


def _launch_prepare(call, out, lse, grad_lse):
    batch, heads, length, value_dim = call.grad_out.shape
    key_heads = call.key.shape[1]
    strides = *out.stride()[:3], *call.grad_out.stride()[:3]
    vector = triton_launch.vector_length(out.element_size(), *strides)
    tiles = triton.cdiv(length * (heads // key_heads), triton_tiles.PREPARE_ROWS)
    prepare[(batch * key_heads * tiles,)](
        out, call.grad_out, lse, grad_lse, call.statistics, lse.numel(), length, key_heads,
        *(stride // vector for stride in strides),
        EXACT=out.dtype is torch.float32, GROUP=heads // key_heads, HEAD_DIM=value_dim, VECTOR=vector,
        BLOCK_M=triton_tiles.PREPARE_ROWS, BLOCK_D=triton_tiles.padded(value_dim),
        num_warps=triton_tiles.PREPARE_WARPS, **triton_launch.OPTIONS,
    )  # fmt: skip


def _launch_differentiate(call, d_query, d_key, d_value):
    batch, heads, length, head_dim = call.query.shape
    _, key_heads, key_length, value_dim = call.value.shape
    pairs, group = batch * key_heads, heads // key_heads
    architecture = triton_launch.describe(call.query.device).architecture
    width, size = max(head_dim, value_dim), call.query.element_size()
    crowding = triton_terms.crowding(call.terms, call.bounds)
    query_tile, key_tile = triton_tiles.backward_tiles(width, size, architecture, crowding)
    if head_dim != value_dim and crowding == 0:
        # Two widths keep two sets of addresses: at 192 and 128 they spill 16 bytes on sm_90.
        query_tile, _ = triton_tiles.backward_tiles(width, size, architecture, crowding=1)
    if triton_sequences.shares_keys(call.bounds) and crowding == 0 and (size == 2 or width > 64):
        # A loop around the loop over rows takes registers. (In float32 at 64 it is smaller tiles that spill.)
        _, key_tile = triton_tiles.backward_tiles(width, size, architecture, crowding=1)
    programs = pairs * triton_sequences.tiles(call.bounds, length * group, query_tile.rows)
    reach_of_a_block = query_tile.keys * max(call.key.stride(2), call.value.stride(2))
    _launch_walk(differentiate_query, call, programs, query_tile, reach_of_a_block, d_query)
    if call.bounds.key_starts is not None or call.bounds.key_ends is not None:
        # Keys that no sequence has belong to no program.
        d_key.zero_(), d_value.zero_()
    programs = pairs * triton_sequences.key_blocks(call.bounds, key_length, key_tile.keys)
    reach_of_a_key_head = max(
        tensor.stride(1) * group + tensor.stride(2) * length for tensor in (call.query, call.grad_out)
    )
    _launch_walk(differentiate_key, call, programs, key_tile, reach_of_a_key_head, d_key, d_value)


def _launch_walk(kernel, call, programs, tile, reach, *gradients):
    """reach: how far apart, in elements, the kernel's loop addresses what it loads at most."""
    _, heads, length, head_dim = call.query.shape
    _, key_heads, key_length, value_dim = call.value.shape
    tensors = call.query, call.key, call.value, call.grad_out
    strides = [stride for tensor in (*tensors, *gradients) for stride in tensor.stride()[:3]]
    vector = triton_launch.vector_length(call.query.element_size(), *strides)
    factor = _score_factor(call.scale, call.softcap, call.terms)
    kernel[(programs,)](
        *tensors, call.statistics, call.terms, call.bounds, *gradients,
        call.statistics.shape[1], length, key_length, key_heads,
        call.left or 0, call.right or 0, factor, call.softcap, call.scale, *(stride // vector for stride in strides),
        OFFSET=tl.int32 if reach < 2**31 else tl.int64,
        HAS_LEFT=call.left is not None, HAS_RIGHT=call.right is not None, EXACT=call.query.dtype is torch.float32,
        GROUP=heads // key_heads, HEAD_DIM=head_dim, VALUE_DIM=value_dim, VECTOR=vector,
        BLOCK_M=tile.rows, BLOCK_N=tile.keys,
        BLOCK_D=triton_tiles.padded(head_dim), BLOCK_V=triton_tiles.padded(value_dim),
        num_warps=tile.warps, num_stages=tile.stages, **triton_launch.OPTIONS,
    )  # fmt: skip


def _launch_differentiate_bias(call, d_bias):
    batch, heads, length, head_dim = call.query.shape
    _, key_heads, key_length, value_dim = call.value.shape
    tensors = call.query, call.key, call.value, call.grad_out
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    vector = triton_launch.vector_length(call.query.element_size(), *strides)
    factor = _score_factor(call.scale, call.softcap, call.terms)
    architecture = triton_launch.describe(call.query.device).architecture
    tile = triton_tiles.bias_gradient_tile(max(head_dim, value_dim), call.query.element_size(), architecture)
    bias_batches, bias_heads, bias_rows, _ = d_bias.shape
    # A bias of one row for all positions, or for the only one, is summed over positions.
    row_tiles = triton.cdiv(bias_rows, tile.rows)
    programs = bias_batches * bias_heads * row_tiles * triton.cdiv(key_length, tile.keys)
    differentiate_bias[(programs,)](
        *tensors, call.statistics, call.terms, call.bounds, d_bias,
        call.statistics.shape[1], length, key_length, key_heads, call.left or 0, call.right or 0, factor, call.softcap,
        *(stride // vector for stride in strides), batch, bias_batches, bias_heads,
        HAS_LEFT=call.left is not None, HAS_RIGHT=call.right is not None, EXACT=call.query.dtype is torch.float32,
        KEEPS_ROWS=bias_rows > 1, GROUP=heads // key_heads, HEAD_DIM=head_dim, VALUE_DIM=value_dim, VECTOR=vector,
        BLOCK_M=tile.rows, BLOCK_N=tile.keys,
        BLOCK_D=triton_tiles.padded(head_dim), BLOCK_V=triton_tiles.padded(value_dim),
        num_warps=tile.warps, num_stages=tile.stages, **triton_launch.OPTIONS,
    )  # fmt: skip
