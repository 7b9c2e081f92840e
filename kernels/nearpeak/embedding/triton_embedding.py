"""Embeddings on the GPU: the operators of embedding/operator.py by Triton kernels.

hidden = scale words[id] + positions[position] + segments[segment],   y = dropout(LayerNorm(hidden))

A program takes whole tokens, and holds their rows in registers: each table is read once, hidden is written nowhere, and
backward makes it again. The tables' gradients are triton_table_gradient.py's.
"""

import torch
import triton
import triton.language as tl

from .. import backends, triton_dropout, triton_launch
from ..triton_column_sums import empty_partials, reduce, store_sums
from ..triton_row_tiles import RESIDENT_THREADS, backward_tile, forward_tile
from ..triton_rows import load_weight, scale_of
from . import reference
from .triton_table_gradient import table_gradient

# Bytes of a row that has room in registers beside its gradient and its tables: 4096 of float32 spill on sm_120, 8192 of
# 16 bits on sm_90.
WIDEST_BACKWARD = 8192

__all__ = ["embedding", "hidden_gradient", "table_gradient"]


@triton.jit
def _add_row(hidden, table_ptr, ids_ptr, place, rows, vectors, columns, inside, scale, VECTOR: tl.constexpr):
    """hidden + scale times the rows of a table; NaN for an id that has none, as nothing may be read there."""
    if table_ptr is not None:
        row = place
        if ids_ptr is not None:
            row = tl.load(ids_ptr + place)
        there = (row >= 0) & (row < rows)
        values = tl.load(table_ptr + row * vectors * VECTOR + columns, mask=inside & there, other=0.0)
        hidden += scale * tl.where(there | (columns < 0), values.to(tl.float32), float("nan"))
    return hidden


@triton.jit
def _load_hidden(
    words_ptr, ids_ptr, positions_ptr, position_ids_ptr, segments_ptr, segment_ids_ptr,
    token, columns, inside, word_rows, word_vectors, position_rows, position_vectors, position_period,
    segment_rows, segment_vectors, segment_period, scale, VECTOR: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK] in float32, zeros where not inside. token: [ROWS, 1], each one that there is."""
    hidden = tl.zeros(inside.shape, tl.float32)
    hidden = _add_row(hidden, words_ptr, ids_ptr, token, word_rows, word_vectors, columns, inside, scale, VECTOR)
    hidden = _add_row(hidden, positions_ptr, position_ids_ptr, token % position_period, position_rows,
                      position_vectors, columns, inside, 1.0, VECTOR)  # fmt: skip
    hidden = _add_row(hidden, segments_ptr, segment_ids_ptr, token % segment_period, segment_rows,
                      segment_vectors, columns, inside, 1.0, VECTOR)  # fmt: skip
    return tl.where(inside, hidden, 0.0)


@triton.jit
def _dropped(values, hashes_ptr, token, columns, threshold, drop_scale):
    if hashes_ptr is not None:
        low, high = triton_dropout.halves(tl.load(hashes_ptr + token), 0)
        values = tl.where(triton_dropout.kept(low, high, columns, threshold), values * drop_scale, 0.0)
    return values


TABLE_SIZES = (
    "word_rows", "word_vectors", "position_rows", "position_vectors", "position_period",
    "segment_rows", "segment_vectors", "segment_period",
)  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "width_vectors", *TABLE_SIZES, "threshold"])
def _forward(
    words_ptr, ids_ptr, positions_ptr, position_ids_ptr, segments_ptr, segment_ids_ptr,
    weight_ptr, bias_ptr, hashes_ptr, y_ptr, tokens, width_vectors,
    word_rows, word_vectors, position_rows, position_vectors, position_period,
    segment_rows, segment_vectors, segment_period, scale, eps, threshold, drop_scale,
    NORMALISES: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens a program. A program's tokens beyond the last are the last again, and not stored."""
    width = width_vectors * VECTOR
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    inside = (token < tokens) & (columns < width)
    token = tl.minimum(token, tokens - 1)
    y = _load_hidden(
        words_ptr, ids_ptr, positions_ptr, position_ids_ptr, segments_ptr, segment_ids_ptr, token, columns, inside,
        word_rows, word_vectors, position_rows, position_vectors, position_period,
        segment_rows, segment_vectors, segment_period, scale, VECTOR,
    )  # fmt: skip
    if NORMALISES:
        y = tl.where(inside, y - tl.sum(y, axis=1, keep_dims=True) / width, 0.0)
        difference = tl.sum(y, axis=1, keep_dims=True) / width  # what the mean lost when it was rounded
        y = (y - difference) * scale_of(difference, tl.sum(y * y, axis=1, keep_dims=True) / width, eps, True)
        y *= load_weight(weight_ptr, columns, width, 0.0)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    y = _dropped(y, hashes_ptr, token, columns, threshold, drop_scale)
    tl.store(y_ptr + token * width + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "width_vectors", "grad_vectors", *TABLE_SIZES, "threshold"])
def _backward(
    grad_ptr, words_ptr, ids_ptr, positions_ptr, position_ids_ptr, segments_ptr, segment_ids_ptr,
    weight_ptr, hashes_ptr, d_hidden_ptr, weight_partial_ptr, bias_partial_ptr, tokens, width_vectors, grad_vectors,
    word_rows, word_vectors, position_rows, position_vectors, position_period,
    segment_rows, segment_vectors, segment_period, scale, eps, threshold, drop_scale,
    NORMALISES: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program walks over tiles of tokens, and keeps its share of the norm's gradients in registers."""
    width, program = width_vectors * VECTOR, tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    d_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(program * ROWS, tokens, tl.num_programs(0) * ROWS):
        token = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
        inside = (token < tokens) & (columns < width)
        token = tl.minimum(token, tokens - 1)
        grad = tl.load(grad_ptr + token * grad_vectors * VECTOR + columns, mask=inside, other=0.0).to(tl.float32)
        grad = _dropped(grad, hashes_ptr, token, columns, threshold, drop_scale)
        if NORMALISES:
            n = _load_hidden(
                words_ptr, ids_ptr, positions_ptr, position_ids_ptr, segments_ptr, segment_ids_ptr, token, columns,
                inside, word_rows, word_vectors, position_rows, position_vectors, position_period,
                segment_rows, segment_vectors, segment_period, scale, VECTOR,
            )  # fmt: skip
            n = tl.where(inside, n - tl.sum(n, axis=1, keep_dims=True) / width, 0.0)
            difference = tl.sum(n, axis=1, keep_dims=True) / width
            r = scale_of(difference, tl.sum(n * n, axis=1, keep_dims=True) / width, eps, True)  # [ROWS, 1]
            n = (n - difference) * r
            d_weight += grad * n
            if bias_partial_ptr is not None:
                d_bias += grad
            g = grad * load_weight(weight_ptr, columns, width, 0.0)  # again for each tile: it would take registers
            of_n = tl.sum(g * n, axis=1, keep_dims=True) / width
            grad = (g - n * of_n - tl.sum(g, axis=1, keep_dims=True) / width) * r
        tl.store(d_hidden_ptr + token * width + columns, grad.to(d_hidden_ptr.dtype.element_ty), mask=inside)
    column = tl.arange(0, BLOCK)
    store_sums(weight_partial_ptr, program, column, width, d_weight)
    store_sums(bias_partial_ptr, program, column, width, d_bias)


def _dense(tensor):
    return None if tensor is None else tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Call:
    """What both kernels take of an operator's arguments. strides: of other tensors, which vectors must divide."""

    def __init__(self, arguments, *strides):
        ids, weight, positions, position_ids, segments, segment_ids, *norm, scale, eps, seed, p = arguments
        self.tokens, width = ids.numel(), weight.shape[1]
        tables = [_dense(table) for table in (weight, positions, segments)]
        strides = [*strides, *(0 if table is None else table.stride(0) for table in tables)]
        self.vector = triton_launch.vector_length(weight.element_size(), width, *strides)
        self.width_vectors = width // self.vector
        words, *others = (
            (0, 0) if table is None else (table.shape[0], table.stride(0) // self.vector) for table in tables
        )
        counted = (ids.shape[-1] if ids.dim() > 0 else 1), 1
        periods = (
            count if numbers is None else max(1, numbers.numel())
            for count, numbers in zip(counted, (position_ids, segment_ids), strict=True)
        )
        self.sizes = [
            *words,
            *(size for table, period in zip(others, periods, strict=True) for size in (*table, period)),
        ]
        numbers = [None if each is None else each.contiguous() for each in (ids, position_ids, segment_ids)]
        self.pointers = [each for pair in zip(tables, numbers, strict=True) for each in pair]
        self.norm = [None if parameter is None else parameter.contiguous() for parameter in norm]
        self.hashes = None if p == 0.0 else triton_dropout.hashes(seed, self.tokens)
        self.formula = scale, 0.0 if eps is None else eps, *triton_dropout.threshold_and_scale(p)
        self.options = {"NORMALISES": eps is not None, "VECTOR": self.vector}


def embedding(*arguments):
    """y of the operator `embedding`, (*ids, width)."""
    (ids, weight), operands = arguments[:2], arguments[:-2]
    tile, device = forward_tile(weight.shape[1], weight.element_size()), triton_launch.describe(weight.device)
    if tile.block < weight.shape[1]:
        backends.because("rows wider than a program's registers have no kernel: plain PyTorch serves them")
        return reference.embedding(*arguments)
    y = weight.new_empty((*ids.shape, weight.shape[1]))
    if y.numel() == 0:
        return y
    with triton_launch.on(weight.device):
        call = _Call(operands)
        _forward[(triton.cdiv(call.tokens, tile.rows),)](
            *call.pointers, *call.norm, call.hashes, y, call.tokens, call.width_vectors, *call.sizes, *call.formula,
            ROWS=tile.rows, BLOCK=tile.block, **call.options, **device.options(tile.threads),
        )  # fmt: skip
    return y


def hidden_gradient(grad, *arguments):
    """d_hidden (tokens, width), and the norm's gradients (width,), empty where there is none."""
    (ids, weight), norm = arguments[:2], arguments[6:8]
    tile, device = backward_tile(weight.shape[1]), triton_launch.describe(weight.device)
    if min(tile.block, WIDEST_BACKWARD // weight.element_size()) < weight.shape[1]:
        return reference.hidden_gradient(grad, *arguments)
    d_hidden = grad.new_empty(ids.numel(), weight.shape[1])
    d_norm = [weight.new_empty(0) if parameter is None else torch.zeros_like(parameter) for parameter in norm]
    if d_hidden.numel() == 0:
        return d_hidden, *d_norm
    grad = _dense(grad.reshape(d_hidden.shape))
    with triton_launch.on(weight.device):
        call = _Call(arguments, grad.stride(0))
        resident = device.processors * RESIDENT_THREADS // tile.threads
        programs = min(triton.cdiv(call.tokens, tile.rows), resident)
        partials = empty_partials(d_hidden, [parameter is not None for parameter in norm], programs)
        _backward[(programs,)](
            grad, *call.pointers, call.norm[0], call.hashes, d_hidden, *partials, call.tokens, call.width_vectors,
            grad.stride(0) // call.vector, *call.sizes, *call.formula,
            ROWS=tile.rows, BLOCK=tile.block, **call.options, **device.options(tile.threads),
        )  # fmt: skip
        for partial, total in zip(partials, d_norm, strict=True):
            if partial is not None:
                reduce(partial, total)
    return d_hidden, *d_norm
