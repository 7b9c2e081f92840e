"""RMSNorm on the GPU: the kernels of norm/reference.py's formulas, and their launchers.

    hidden   = x + residual                 square = mean(hidden^2) + eps,   r = 1 / sqrt(square)
    y        = hidden r (offset + weight)   g = grad (offset + weight)
    d_hidden = r (g - hidden mean(g hidden) / square) + grad_hidden
    d_weight = sum over rows of grad hidden r

Every kernel is bound by memory. A row that fits in registers is read once; a wider one is read twice, the second
time mostly from the L2 cache, because a kernel that spills registers pays more than that.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import operators, triton_launch

# Widest row, in bytes forward and in elements backward (which keeps float32 sums), that one program holds in registers
# without spilling: read off the machine code of every target. 1024 threads have 64 registers each.
WHOLE_ROW_FORWARD = 65536
WHOLE_ROW_BACKWARD = 8192

# Elements per thread: 2 (16-bit) to 4 (float32) accesses of 16 bytes in flight forward, 1 to 2 of each input backward.
PER_THREAD_FORWARD = 16
PER_THREAD_BACKWARD = 8

MOST_THREADS = 1024
SMALLEST_TILE = 1024  # elements a program takes: narrower rows share a program
WIDE_BLOCK = 8192  # columns that a program takes at once of a row too wide for registers
RESIDENT_THREADS = 1024  # per processor, for kernels whose programs walk over the rows


class Tile(NamedTuple):
    rows: int
    block: int  # columns, a power of two
    threads: int


COLUMNS = Tile(rows=4, block=1024, threads=256)  # of the wide backward's second kernel
REDUCTION = Tile(rows=32, block=32, threads=128)  # narrow blocks: a 4096 wide weight still fills 128 processors


def forward_tile(width: int, itemsize: int) -> Tile:
    """Rows and columns that one program takes at once; block < width means a row in several passes."""
    return _tile(width, WHOLE_ROW_FORWARD // itemsize, PER_THREAD_FORWARD)


def backward_tile(width: int) -> Tile:
    return _tile(width, WHOLE_ROW_BACKWARD, PER_THREAD_BACKWARD)


def _tile(width, widest, per_thread):
    if width > widest:
        return Tile(1, WIDE_BLOCK, WIDE_BLOCK // per_thread)
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, SMALLEST_TILE // block)
    return Tile(rows, block, min(MOST_THREADS, rows * block // per_thread))


@triton.jit
def _load_weight(weight_ptr, columns, width, offset):
    """offset + weight in float32, [1, BLOCK]; 1 without a weight."""
    if weight_ptr is None:
        weight = tl.full(columns.shape, 1.0, tl.float32)
    else:
        weight = offset + tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    return weight


@triton.jit
def _load_hidden(x_rows, residual_rows, columns, inside):
    """x + residual as it is stored: normalised is what the caller gets back, rounding included."""
    hidden = tl.load(x_rows + columns, mask=inside, other=0.0)
    if residual_rows is not None:
        residual = tl.load(residual_rows + columns, mask=inside, other=0.0)
        hidden = (hidden.to(tl.float32) + residual.to(tl.float32)).to(hidden.dtype)
    return hidden


@triton.jit(do_not_specialize=["rows", "width_vectors", "x_stride_vectors", "residual_stride_vectors"])
def _forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    hidden_ptr,
    rows,
    width_vectors,
    x_stride_vectors,
    residual_stride_vectors,
    eps,
    offset,
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
    hidden = _load_hidden(x_rows, residual_rows, columns, inside)  # [ROWS, BLOCK]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + row * width + columns, hidden, mask=inside)
    wide = hidden.to(tl.float32)
    r = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / width + eps)  # [ROWS, 1]
    y = wide * r * _load_weight(weight_ptr, columns, width, offset)
    tl.store(y_ptr + row * width + columns, y.to(hidden.dtype), mask=inside)


@triton.jit(do_not_specialize=["width_vectors", "x_stride_vectors", "residual_stride_vectors"])
def _forward_wide(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    hidden_ptr,
    width_vectors,
    x_stride_vectors,
    residual_stride_vectors,
    eps,
    offset,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program, in two passes. Nothing is written before the second, since y may be x, or hidden residual."""
    width = width_vectors * VECTOR
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride_vectors * VECTOR
    residual_row = None
    if residual_ptr is not None:
        residual_row = residual_ptr + row * residual_stride_vectors * VECTOR
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        wide = _load_hidden(x_row, residual_row, columns, columns < width).to(tl.float32)
        squares += wide * wide
    r = tl.rsqrt(tl.sum(squares) / width + eps)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        hidden = _load_hidden(x_row, residual_row, columns, columns < width)
        y = hidden.to(tl.float32) * r * _load_weight(weight_ptr, columns, width, offset)
        if hidden_ptr is not None:
            tl.store(hidden_ptr + row * width + columns, hidden, mask=columns < width)
        tl.store(y_ptr + row * width + columns, y.to(hidden.dtype), mask=columns < width)


@triton.jit(
    do_not_specialize=["rows", "width_vectors", "grad_stride_vectors", "hidden_stride_vectors", "extra_stride_vectors"]
)
def _backward(
    grad_ptr,
    hidden_ptr,
    weight_ptr,
    extra_ptr,
    d_hidden_ptr,
    partial_ptr,
    rows,
    width_vectors,
    grad_stride_vectors,
    hidden_stride_vectors,
    extra_stride_vectors,
    eps,
    offset,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program walks over row tiles and keeps its share of d_weight in registers: no atomics, one fixed order."""
    width = width_vectors * VECTOR
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
        inside = (row < rows) & (columns < width)
        hidden_rows = hidden_ptr + row * hidden_stride_vectors * VECTOR
        hidden = tl.load(hidden_rows + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        grad_rows = grad_ptr + row * grad_stride_vectors * VECTOR
        grad = tl.load(grad_rows + columns, mask=inside, other=0.0).to(tl.float32)
        square = tl.sum(hidden * hidden, axis=1, keep_dims=True) / width + eps  # [ROWS, 1]
        r = tl.rsqrt(square)
        d_weight += grad * (hidden * r)
        g = grad * _load_weight(weight_ptr, columns, width, offset)  # again for each tile: it would take registers
        share = tl.sum(g * hidden, axis=1, keep_dims=True) / width / square
        d_hidden = r * (g - hidden * share)
        if extra_ptr is not None:
            extra_rows = extra_ptr + row * extra_stride_vectors * VECTOR
            d_hidden += tl.load(extra_rows + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_hidden_ptr + row * width + columns, d_hidden.to(d_hidden_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        column = tl.arange(0, BLOCK)
        partial_row = partial_ptr + program.to(tl.int64) * width
        tl.store(partial_row + column, tl.sum(d_weight, axis=0), mask=column < width)


@triton.jit(do_not_specialize=["width_vectors", "grad_stride_vectors", "hidden_stride_vectors"])
def _backward_wide_sums(
    grad_ptr,
    hidden_ptr,
    weight_ptr,
    r_ptr,
    share_ptr,
    width_vectors,
    grad_stride_vectors,
    hidden_stride_vectors,
    eps,
    offset,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """r and mean(g hidden) / square of one row a program, for rows too wide to keep."""
    width = width_vectors * VECTOR
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        hidden = tl.load(hidden_ptr + row * hidden_stride_vectors * VECTOR + columns, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + row * grad_stride_vectors * VECTOR + columns, mask=inside, other=0.0)
        wide = hidden.to(tl.float32)
        squares += wide * wide
        products += wide * (grad.to(tl.float32) * _load_weight(weight_ptr, columns, width, offset))
    square = tl.sum(squares) / width + eps
    tl.store(r_ptr + row, tl.rsqrt(square))
    tl.store(share_ptr + row, tl.sum(products) / width / square)


@triton.jit(
    do_not_specialize=["rows", "width_vectors", "grad_stride_vectors", "hidden_stride_vectors", "extra_stride_vectors"]
)
def _backward_wide(
    grad_ptr,
    hidden_ptr,
    weight_ptr,
    extra_ptr,
    r_ptr,
    share_ptr,
    d_hidden_ptr,
    partial_ptr,
    rows,
    width_vectors,
    grad_stride_vectors,
    hidden_stride_vectors,
    extra_stride_vectors,
    offset,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of columns a program, over every num_programs(1)-th row tile, with the row sums at hand."""
    width = width_vectors * VECTOR
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = column[None, :]  # [1, BLOCK]
    weight = _load_weight(weight_ptr, columns, width, offset)
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
        inside = (row < rows) & (columns < width)
        hidden_rows = hidden_ptr + row * hidden_stride_vectors * VECTOR
        hidden = tl.load(hidden_rows + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        grad_rows = grad_ptr + row * grad_stride_vectors * VECTOR
        grad = tl.load(grad_rows + columns, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row, mask=row < rows, other=0.0)  # [ROWS, 1]
        d_weight += grad * (hidden * r)
        d_hidden = r * (grad * weight - hidden * tl.load(share_ptr + row, mask=row < rows, other=0.0))
        if extra_ptr is not None:
            extra_rows = extra_ptr + row * extra_stride_vectors * VECTOR
            d_hidden += tl.load(extra_rows + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_hidden_ptr + row * width + columns, d_hidden.to(d_hidden_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        partial_row = partial_ptr + tl.program_id(1).to(tl.int64) * width
        tl.store(partial_row + column, tl.sum(d_weight, axis=0), mask=column < width)


@triton.jit(do_not_specialize=["partials", "width_vectors"])
def _sum_partials(
    partial_ptr, sum_ptr, partials, width_vectors, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """d_weight from the programs' shares, always added in the same order."""
    width = width_vectors * VECTOR
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = column[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, partials, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < partials) & (columns < width)
        total += tl.load(partial_ptr + row.to(tl.int64) * width + columns, mask=inside, other=0.0)
    tl.store(sum_ptr + column, tl.sum(total, axis=0).to(sum_ptr.dtype.element_ty), mask=column < width)


def _as_rows(tensor: torch.Tensor, laid_out: torch.Tensor) -> torch.Tensor:
    """(rows, width) with dense rows, in the order in which `laid_out`, a dense tensor of this shape, holds its rows.

    A view wherever the strides allow it.
    """
    if not laid_out.is_contiguous():
        tensor = tensor.permute(*sorted(range(tensor.dim() - 1), key=laid_out.stride, reverse=True), -1)
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def rms_norm(x, weight, eps, offset):
    y = operators.empty_laid_out_like(x)
    rms_norm_out(x, weight, None, eps, offset, y, None)
    return y


def add_rms_norm(x, residual, weight, eps, offset):
    y, hidden = operators.empty_laid_out_like(x), operators.empty_laid_out_like(x)
    rms_norm_out(x, weight, residual, eps, offset, y, hidden)
    return y, hidden


def rms_norm_out(x, weight, residual, eps, offset, out, residual_out):
    if x.numel() == 0:
        return
    x = _as_rows(x, out)
    residual = None if residual is None else _as_rows(residual, out)
    weight = None if weight is None else weight.contiguous()
    rows, width = x.shape
    strides = x.stride(0), 0 if residual is None else residual.stride(0)
    vector = triton_launch.vector_length(x.element_size(), width, *strides)
    in_vectors = width // vector, *(stride // vector for stride in strides)
    tensors = x, residual, weight, out, residual_out
    tile, device = forward_tile(width, x.element_size()), triton_launch.describe(x.device)
    with triton_launch.on(x.device):
        if tile.block < width:
            _forward_wide[(rows,)](
                *tensors,
                *in_vectors,
                eps,
                offset,
                VECTOR=vector,
                BLOCK=tile.block,
                **device.options(tile.threads),
            )
        else:
            _forward[(triton.cdiv(rows, tile.rows),)](
                *tensors, rows, *in_vectors, eps, offset,
                VECTOR=vector, ROWS=tile.rows, BLOCK=tile.block, **device.options(tile.threads),
            )  # fmt: skip


def rms_norm_backward(grad, hidden, weight, grad_hidden, eps, offset):
    d_hidden = operators.empty_laid_out_like(hidden)
    d_weight = hidden.new_empty(0) if weight is None else torch.empty_like(weight)
    if hidden.numel() == 0:
        return d_hidden, d_weight.zero_()
    grad, hidden = _as_rows(grad, d_hidden), _as_rows(hidden, d_hidden)
    extra = None if grad_hidden is None else _as_rows(grad_hidden, d_hidden)
    dense_weight = None if weight is None else weight.contiguous()
    strides = grad.stride(0), hidden.stride(0), 0 if extra is None else extra.stride(0)
    vector = triton_launch.vector_length(hidden.element_size(), hidden.shape[1], *strides)
    in_vectors = hidden.shape[1] // vector, *(stride // vector for stride in strides)
    launch = _backward_in_one if backward_tile(hidden.shape[1]).block >= hidden.shape[1] else _backward_in_two
    with triton_launch.on(hidden.device):
        partial = launch(grad, hidden, dense_weight, extra, d_hidden, in_vectors, eps, offset, vector)
        if weight is not None:
            _reduce(partial, d_weight)
    return d_hidden, d_weight


def _backward_in_one(grad, hidden, weight, extra, d_hidden, in_vectors, eps, offset, vector):
    rows, width = hidden.shape
    tile, device = backward_tile(width), triton_launch.describe(hidden.device)
    resident = device.processors * RESIDENT_THREADS // tile.threads
    programs = min(triton.cdiv(rows, tile.rows), resident)
    partial = None if weight is None else hidden.new_empty(programs, width, dtype=torch.float32)
    _backward[(programs,)](
        grad, hidden, weight, extra, d_hidden, partial, rows, *in_vectors, eps, offset,
        VECTOR=vector, ROWS=tile.rows, BLOCK=tile.block, **device.options(tile.threads),
    )  # fmt: skip
    return partial


def _backward_in_two(grad, hidden, weight, extra, d_hidden, in_vectors, eps, offset, vector):
    rows, width = hidden.shape
    tile, device = backward_tile(width), triton_launch.describe(hidden.device)
    r, share = hidden.new_empty(2, rows, dtype=torch.float32)
    _backward_wide_sums[(rows,)](
        grad, hidden, weight, r, share, *in_vectors[:3], eps, offset,
        VECTOR=vector, BLOCK=tile.block, **device.options(tile.threads),
    )  # fmt: skip
    columns = triton.cdiv(width, COLUMNS.block)
    resident = device.processors * RESIDENT_THREADS // COLUMNS.threads
    programs = max(1, min(triton.cdiv(rows, COLUMNS.rows), resident // columns))
    partial = None if weight is None else hidden.new_empty(programs, width, dtype=torch.float32)
    _backward_wide[(columns, programs)](
        grad, hidden, weight, extra, r, share, d_hidden, partial, rows, *in_vectors, offset,
        VECTOR=vector, ROWS=COLUMNS.rows, BLOCK=COLUMNS.block, **device.options(COLUMNS.threads),
    )  # fmt: skip
    return partial


def _reduce(partial, total):
    programs, width = partial.shape
    device = triton_launch.describe(partial.device)
    vector = triton_launch.vector_length(4, width)
    _sum_partials[(triton.cdiv(width, REDUCTION.block),)](
        partial, total, programs, width // vector,
        VECTOR=vector, ROWS=REDUCTION.rows, BLOCK=REDUCTION.block, **device.options(REDUCTION.threads),
    )  # fmt: skip
