"""What attention's Triton kernels share: where rows lie in memory, how a tile is loaded, and tanh."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """To 3 units in the last place everywhere; exponentials alone lose small values to cancellation."""
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2_E)) + 1.0)
    u = x * x
    # Least squares over Chebyshev nodes of [0, 0.625^2], relative error 1.4 units of float32.
    series = -0.00610494 * u + 0.02100363
    series = series * u - 0.0538525
    series = series * u + 0.13332782
    series = series * u - 0.33333329
    return tl.where(size < 0.625, x + x * u * series, tl.where(x < 0, -large, large))


@triton.jit
def load_tile(rows, columns, row_inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """A tile at rows + columns, zero outside; the masks that a full block of a full head_dim needs are none."""
    if MASKED:
        if HEAD_DIM < BLOCK_D:
            return tl.load(rows + columns, mask=row_inside & (columns < HEAD_DIM), other=0.0)
        return tl.load(rows + columns, mask=row_inside, other=0.0)
    if HEAD_DIM < BLOCK_D:
        return tl.load(rows + columns, mask=columns < HEAD_DIM, other=0.0)
    return tl.load(rows + columns)


@triton.jit
def rounded_up(n, BLOCK_N: tl.constexpr):
    """n as a multiple of BLOCK_N, not below n."""
    return tl.cdiv(n, BLOCK_N) * BLOCK_N


@triton.jit
def addresses(
    pointer, row, batch, key_head, batch_stride, head_stride, step, VECTOR: tl.constexpr, GROUP: tl.constexpr
):
    """Where each row begins: row r is head r % GROUP of the key head, at position r // GROUP. [M, 1]"""
    head = (key_head * GROUP + row % GROUP).to(tl.int64)
    index = (row // GROUP).to(tl.int64)
    start = pointer + batch.to(tl.int64) * batch_stride * VECTOR
    return (start + head * head_stride * VECTOR + index * step * VECTOR)[:, None]


@triton.jit
def shifted(pointer, rows, step, VECTOR: tl.constexpr):
    """The pointer, so many rows further."""
    return pointer + tl.cast(rows, tl.int64) * step * VECTOR


@triton.jit
def block_of(pointer, batch, head, row, batch_stride, head_stride, step, VECTOR: tl.constexpr):
    """Where a row of one head begins, or each of several."""
    start = pointer + batch.to(tl.int64) * batch_stride * VECTOR + head.to(tl.int64) * head_stride * VECTOR
    return shifted(start, row, step, VECTOR)
