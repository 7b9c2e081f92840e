"""Linear layers with quantised weights on the GPU: the operator of linear/quantized.py by a Triton kernel.

    p[m, n] = bias[n] + sum over groups g of scale[n, g] * sum over k in g of x[m, k] (code[n, k] - zero[n, g])
    y[m, n] = f(p[m, n]) + residual[m, n]

One step of the inner loop is a group, or a part of it. Differences of codes are whole numbers of at most 8 bits and a
sign, which bfloat16 and float16 hold exactly: matrix instructions multiply them with x as they are, no weight is
rounded, and a scale is applied once, to its step's sum in float32. They are multiplied in units of 2^bits, so that
products overflow no earlier than x does. With few rows of x the weight's bytes, a half or a quarter of 16-bit ones, are
the limit; with many, products are.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import triton_launch
from ..operators import widened
from ..triton_activations import value_and_slope
from .epilogue import shapes
from .input_rounding import rounded
from .weights import CODE_BLOCK


class Tile(NamedTuple):
    """What one program computes of y, and with how many warps."""

    rows: int  # of x
    columns: int  # rows of the weight
    steps: int  # codes of a row at once, at most, within a group
    warps: int
    stages: int  # steps in flight


# By bytes of an element of x and rows of x, up to so many: the largest that spill no register on any target, at any
# group size (tests/test_triton_compile.py); few rows take narrow tiles, so that enough programs read the weight.
TILES = {
    2: {16: Tile(16, 32, 64, 4, 4), 64: Tile(64, 64, 64, 4, 3), None: Tile(128, 64, 64, 8, 3)},
    4: {16: Tile(16, 32, 32, 4, 3), None: Tile(32, 32, 32, 4, 2)},
}


def tile_of(rows, itemsize):
    return next(tile for most, tile in TILES[itemsize].items() if most is None or rows <= most)


@triton.jit
def _products(x_ptr, codes_ptr, zero, inside_rows, inside_columns, BITS: tl.constexpr, STEPS: tl.constexpr,
              HALF: tl.constexpr):  # fmt: skip
    """x (code UNIT - zero)^T over STEPS steps [M, N], with UNIT = 2^-BITS and zero [N, 1] in that unit.

    x_ptr [M, 1] and codes_ptr [N, 1] at their beginning; HALF: codes that one half of a block's bytes holds.
    """
    UNIT: tl.constexpr = 1.0 / (1 << BITS)
    if BITS == 8:
        k = tl.arange(0, STEPS)[None, :]
        x = tl.load(x_ptr + k, mask=inside_rows, other=0.0)  # [M, STEPS]
        codes = tl.load(codes_ptr + k, mask=inside_columns, other=0)  # [N, STEPS]
        products = tl.dot(x, tl.trans((codes.to(tl.float32) * UNIT - zero).to(x.dtype)), input_precision="ieee")
    else:
        i = tl.arange(0, STEPS // 2)[None, :]
        k = i // HALF * (2 * HALF) + i % HALF
        low_x = tl.load(x_ptr + k, mask=inside_rows, other=0.0)  # [M, STEPS / 2]
        high_x = tl.load(x_ptr + k + HALF, mask=inside_rows, other=0.0)
        codes = tl.load(codes_ptr + i, mask=inside_columns, other=0)  # [N, STEPS / 2]
        low = ((codes & 15).to(tl.float32) * UNIT - zero).to(low_x.dtype)
        high = ((codes >> 4).to(tl.float32) * UNIT - zero).to(low_x.dtype)
        products = tl.dot(low_x, tl.trans(low), input_precision="ieee")
        products = tl.dot(high_x, tl.trans(high), products, input_precision="ieee")
    return products


@triton.jit(do_not_specialize=["rows", "columns", "groups", "x_row"])
def _forward(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, residual_ptr, before_ptr, y_ptr, rows, columns, groups, x_row,
    BITS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, VECTOR: tl.constexpr, ZEROS: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, BEFORE: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * M + tl.arange(0, M)
    column = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside_rows, inside_columns = (row < rows)[:, None], column < columns
    x_at = x_ptr + row[:, None] * (x_row.to(tl.int64) * VECTOR)  # [M, 1]
    codes_at = codes_ptr + column[:, None] * (groups.to(tl.int64) * (GROUP * BITS // 8))  # [N, 1]
    group_at = column * groups  # [N]
    sums = tl.zeros((M, N), tl.float32)
    for step in range(groups * (GROUP // STEPS)):
        group = step // (GROUP // STEPS)
        scale = tl.load(scales_ptr + group_at + group, mask=inside_columns, other=0.0)  # [N]
        if ZEROS:
            zero = tl.load(zeros_ptr + group_at + group, mask=inside_columns, other=0).to(tl.float32)
            zero = zero[:, None] * (1.0 / (1 << BITS))
        else:
            zero = 0.5
        products = _products(x_at, codes_at, zero, inside_rows, inside_columns[:, None], BITS, STEPS, HALF)
        sums += products * (scale * (1 << BITS))[None, :]
        x_at += STEPS
        codes_at += STEPS * BITS // 8
    if BIAS:
        sums += tl.load(bias_ptr + column, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
    at, inside = row[:, None] * columns + column[None, :], inside_rows & inside_columns[None, :]
    if BEFORE:
        tl.store(before_ptr + at, sums.to(before_ptr.dtype.element_ty), mask=inside)
    if ACTIVATION is not None:
        sums, _ = value_and_slope(sums, ACTIVATION)
    if RESIDUAL:
        sums += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, sums.to(y_ptr.dtype.element_ty), mask=inside)


def quantized_linear(x, codes, scales, zeros, bias, bits, input_bits=None):
    """y = x W^T + bias, (..., out_features), for x (..., in_features)."""
    return quantized_linear_epilogue(x, codes, scales, zeros, bias, bits, None, None, False, input_bits)[0]


def quantized_linear_epilogue(x, codes, scales, zeros, bias, bits, residual, activation, keep, input_bits=None):
    """y = f(x W^T + bias) + residual, and with `keep` what f is of. x is rounded before, and multiplied in float32."""
    columns, groups = scales.shape
    if input_bits is not None:
        wide = rounded(x, input_bits, x.shape[-1] // groups)
        bias, residual = (None if each is None else widened(each) for each in (bias, residual))
        found = quantized_linear_epilogue(wide, codes, scales, zeros, bias, bits, residual, activation, keep)
        return tuple(each.to(x.dtype) for each in found)
    y, before = shapes(x, columns, keep)
    if y.numel() == 0:
        return y, before
    matrix = x.reshape(-1, x.shape[-1])
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    codes, scales = codes.contiguous(), scales.contiguous()
    rows, group = matrix.shape[0], x.shape[-1] // groups
    tile = tile_of(rows, x.element_size())
    vector = triton_launch.vector_length(x.element_size(), matrix.stride(0))
    zeros, bias, residual = (None if each is None else each.contiguous() for each in (zeros, bias, residual))
    with triton_launch.on(x.device):
        _forward[(triton.cdiv(columns, tile.columns), triton.cdiv(rows, tile.rows))](
            matrix, codes, scales, zeros, bias, residual, before if keep else None, y, rows, columns, groups,
            matrix.stride(0) // vector, BITS=bits, GROUP=group, HALF=CODE_BLOCK // 2, VECTOR=vector,
            ZEROS=zeros is not None, BIAS=bias is not None, ACTIVATION=activation, RESIDUAL=residual is not None,
            BEFORE=keep, M=tile.rows, N=tile.columns, STEPS=min(group, tile.steps),
            num_warps=tile.warps, num_stages=tile.stages, **triton_launch.OPTIONS,
        )  # fmt: skip
    return y, before
