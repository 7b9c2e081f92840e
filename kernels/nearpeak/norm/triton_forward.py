"""The forward kernels of RMSNorm and LayerNorm, and their launcher.

hidden = x + residual,   n = (hidden - m) r,   y = n (offset + weight) + bias

RMSNorm      m = 0               r = 1 / sqrt(mean(hidden^2) + eps)
LayerNorm    m = mean(hidden)    r = 1 / sqrt(mean((hidden - m)^2) + eps)      (CENTRED; offset = 0)
"""

import triton
import triton.language as tl

from .. import triton_launch
from ..triton_row_tiles import forward_tile
from ..triton_rows import as_rows, load_hidden, load_weight, mean_of_row, scale_of


@triton.jit
def _scaled(n, weight_ptr, bias_ptr, columns, width, offset, dtype: tl.constexpr, CAST_FIRST: tl.constexpr):
    if CAST_FIRST:
        n = n.to(dtype).to(tl.float32)
    y = n * load_weight(weight_ptr, columns, width, offset)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["rows", "width_vectors", "x_stride_vectors", "residual_stride_vectors"])
def _forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    hidden_ptr,
    rows,
    width_vectors,
    x_stride_vectors,
    residual_stride_vectors,
    eps,
    offset,
    CENTRED: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS whole rows a program, each held in registers."""
    width = width_vectors * VECTOR
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    inside = (row < rows) & (columns < width)
    x_rows = x_ptr + row * x_stride_vectors * VECTOR
    residual_rows = None
    if residual_ptr is not None:
        residual_rows = residual_ptr + row * residual_stride_vectors * VECTOR
    hidden = load_hidden(x_rows, residual_rows, columns, inside)  # [ROWS, BLOCK]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + row * width + columns, hidden, mask=inside)
    wide = hidden.to(tl.float32)
    difference = 0.0
    if CENTRED:
        wide = tl.where(inside, wide - tl.sum(wide, axis=1, keep_dims=True) / width, 0.0)
        difference = tl.sum(wide, axis=1, keep_dims=True) / width  # [ROWS, 1]
    r = scale_of(difference, tl.sum(wide * wide, axis=1, keep_dims=True) / width, eps, CENTRED)  # [ROWS, 1]
    n = (wide - difference) * r
    y = _scaled(n, weight_ptr, bias_ptr, columns, width, offset, hidden.dtype, CAST_FIRST)
    tl.store(y_ptr + row * width + columns, y.to(hidden.dtype), mask=inside)


@triton.jit(do_not_specialize=["width_vectors", "x_stride_vectors", "residual_stride_vectors"])
def _forward_wide(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    hidden_ptr,
    width_vectors,
    x_stride_vectors,
    residual_stride_vectors,
    eps,
    offset,
    CENTRED: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program, in passes. Nothing is written before the last, since y may be x, or hidden residual."""
    width = width_vectors * VECTOR
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride_vectors * VECTOR
    residual_row = None
    if residual_ptr is not None:
        residual_row = residual_ptr + row * residual_stride_vectors * VECTOR
    shift = 0.0
    if CENTRED:
        shift = mean_of_row(x_row, residual_row, width, BLOCK)
    differences = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        wide = load_hidden(x_row, residual_row, columns, columns < width).to(tl.float32)
        if CENTRED:
            wide = tl.where(columns < width, wide - shift, 0.0)
            differences += wide
        squares += wide * wide
    difference = 0.0
    if CENTRED:
        difference = tl.sum(differences) / width
    r = scale_of(difference, tl.sum(squares) / width, eps, CENTRED)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        hidden = load_hidden(x_row, residual_row, columns, columns < width)
        n = hidden.to(tl.float32)
        if CENTRED:
            n = (n - shift) - difference
        y = _scaled(n * r, weight_ptr, bias_ptr, columns, width, offset, hidden.dtype, CAST_FIRST)
        if hidden_ptr is not None:
            tl.store(hidden_ptr + row * width + columns, hidden, mask=columns < width)
        tl.store(y_ptr + row * width + columns, y.to(hidden.dtype), mask=columns < width)


def forward(x, residual, weight, bias, y, hidden, eps, offset, centred, cast_first=False):
    """Writes y, and where it is not None hidden; both are dense, in one order."""
    if x.numel() == 0:
        return
    x = as_rows(x, y)
    residual = None if residual is None else as_rows(residual, y)
    weight, bias = (None if parameter is None else parameter.contiguous() for parameter in (weight, bias))
    rows, width = x.shape
    strides = x.stride(0), 0 if residual is None else residual.stride(0)
    vector = triton_launch.vector_length(x.element_size(), width, *strides)
    in_vectors = width // vector, *(stride // vector for stride in strides)
    tensors = x, residual, weight, bias, y, hidden
    tile, device = forward_tile(width, x.element_size()), triton_launch.describe(x.device)
    options = {"CENTRED": centred, "CAST_FIRST": cast_first and weight is not None, "VECTOR": vector}
    options |= {"BLOCK": tile.block, **device.options(tile.threads)}
    with triton_launch.on(x.device):
        if tile.block < width:
            _forward_wide[(rows,)](*tensors, *in_vectors, eps, offset, **options)
        else:
            _forward[(triton.cdiv(rows, tile.rows),)](
                *tensors, rows, *in_vectors, eps, offset, ROWS=tile.rows, **options
            )
