"""Sums over rows on the GPU, as the gradients of a norm's parameters are: every program keeps its share, and the shares
are added up by a kernel of their own, always in the same order. No atomics.
"""

import torch
import triton
import triton.language as tl

from . import triton_launch
from .triton_row_tiles import REDUCTION


@triton.jit
def store_sums(partial_ptr, program, column, width, sums):
    """A program's share of a parameter's gradient."""
    if partial_ptr is not None:
        tl.store(partial_ptr + program.to(tl.int64) * width + column, tl.sum(sums, axis=0), mask=column < width)


@triton.jit(do_not_specialize=["partials", "width_vectors"])
def _sum_partials(
    partial_ptr, sum_ptr, partials, width_vectors, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """A parameter's gradient from the programs' shares, always added in the same order."""
    width = width_vectors * VECTOR
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = column[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, partials, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < partials) & (columns < width)
        total += tl.load(partial_ptr + row.to(tl.int64) * width + columns, mask=inside, other=0.0)
    tl.store(sum_ptr + column, tl.sum(total, axis=0).to(sum_ptr.dtype.element_ty), mask=column < width)


def empty_partials(hidden, wanted, programs):
    """The shares of weight and bias: a row for each program, or None where the gradient is not wanted."""
    width = hidden.shape[1]
    return [hidden.new_empty(programs, width, dtype=torch.float32) if each else None for each in wanted]


def reduce(partial, total):
    """Adds up the shares, (programs, width), into total, (width,)."""
    programs, width = partial.shape
    device = triton_launch.describe(partial.device)
    vector = triton_launch.vector_length(4, width)
    _sum_partials[(triton.cdiv(width, REDUCTION.block),)](
        partial, total, programs, width // vector,
        VECTOR=vector, ROWS=REDUCTION.rows, BLOCK=REDUCTION.block, **device.options(REDUCTION.threads),
    )  # fmt: skip
