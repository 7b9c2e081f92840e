"""What the norm kernels share: rows as they lie in memory, and how a row is normalised."""

import torch
import triton
import triton.language as tl


@triton.jit
def load_weight(weight_ptr, columns, width, offset):
    """offset + weight in float32, in the shape of `columns`; 1 without a weight."""
    if weight_ptr is None:
        weight = tl.full(columns.shape, 1.0, tl.float32)
    else:
        weight = offset + tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    return weight


@triton.jit
def load_hidden(x_rows, residual_rows, columns, inside):
    """x + residual as it is stored: normalised is what the caller gets back, rounding included."""
    hidden = tl.load(x_rows + columns, mask=inside, other=0.0)
    if residual_rows is not None:
        residual = tl.load(residual_rows + columns, mask=inside, other=0.0)
        hidden = (hidden.to(tl.float32) + residual.to(tl.float32)).to(hidden.dtype)
    return hidden


@triton.jit
def mean_of_row(x_row, residual_row, width, BLOCK: tl.constexpr):
    """The mean of hidden over one row, for rows too wide to keep."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        total += load_hidden(x_row, residual_row, columns, columns < width).to(tl.float32)
    return tl.sum(total) / width


@triton.jit
def scale_of(difference, square, eps, CENTRED: tl.constexpr):
    """r = 1 / sqrt(variance + eps), from the means of hidden - shift and of its square; the shift is nearly the mean.

    Not CENTRED: r = 1 / sqrt(mean square + eps), and difference is not asked for.
    """
    if CENTRED:
        square = tl.maximum(square - difference * difference, 0.0)
    return tl.rsqrt(square + eps)


def as_rows(tensor: torch.Tensor, laid_out: torch.Tensor) -> torch.Tensor:
    """(rows, width) with dense rows, in the order in which `laid_out`, a dense tensor of this shape, holds its rows.

    A view wherever the strides allow it.
    """
    if not laid_out.is_contiguous():
        tensor = tensor.permute(*sorted(range(tensor.dim() - 1), key=laid_out.stride, reverse=True), -1)
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
