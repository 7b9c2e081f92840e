"""The backward kernels of RMSNorm and LayerNorm, and their launchers.

n        = (hidden - m) r, as forward has it              g = grad (offset + weight)
d_hidden = r (g - n mean(g n)) + grad_hidden              RMSNorm
d_hidden = r (g - mean(g) - n mean(g n)) + grad_hidden    LayerNorm (CENTRED; offset = 0)
d_weight = sum over rows of grad n                        d_bias = sum over rows of grad
"""

import torch
import triton
import triton.language as tl

from .. import triton_launch
from ..triton_column_sums import empty_partials, reduce, store_sums
from ..triton_row_tiles import COLUMNS, RESIDENT_THREADS, backward_tile, row_sums_tile
from ..triton_rows import as_rows, load_weight, mean_of_row, scale_of


@triton.jit
def _store_d_hidden(d_hidden_ptr, d_hidden, extra_ptr, extra_stride, row, columns, width, inside):
    if extra_ptr is not None:
        d_hidden += tl.load(extra_ptr + row * extra_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_hidden_ptr + row * width + columns, d_hidden.to(d_hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["rows", "width_vectors", "grad_stride_vectors", "hidden_stride_vectors", "extra_stride_vectors"]
)
def _backward(
    grad_ptr,
    hidden_ptr,
    weight_ptr,
    extra_ptr,
    d_hidden_ptr,
    weight_partial_ptr,
    bias_partial_ptr,
    rows,
    width_vectors,
    grad_stride_vectors,
    hidden_stride_vectors,
    extra_stride_vectors,
    eps,
    offset,
    CENTRED: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program walks over row tiles and keeps its share of d_weight in registers: no atomics, one fixed order."""
    width = width_vectors * VECTOR
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    d_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
        inside = (row < rows) & (columns < width)
        hidden_rows = hidden_ptr + row * hidden_stride_vectors * VECTOR
        n = tl.load(hidden_rows + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        grad_rows = grad_ptr + row * grad_stride_vectors * VECTOR
        grad = tl.load(grad_rows + columns, mask=inside, other=0.0).to(tl.float32)
        difference = 0.0
        if CENTRED:
            n = tl.where(inside, n - tl.sum(n, axis=1, keep_dims=True) / width, 0.0)
            difference = tl.sum(n, axis=1, keep_dims=True) / width  # [ROWS, 1]
        r = scale_of(difference, tl.sum(n * n, axis=1, keep_dims=True) / width, eps, CENTRED)  # [ROWS, 1]
        n = (n - difference) * r
        d_weight += grad * n
        if bias_partial_ptr is not None:
            d_bias += grad
        g = grad * load_weight(weight_ptr, columns, width, offset)  # again for each tile: it would take registers
        d_hidden = g - n * (tl.sum(g * n, axis=1, keep_dims=True) / width)
        if CENTRED:
            d_hidden -= tl.sum(g, axis=1, keep_dims=True) / width
        extra_stride = extra_stride_vectors * VECTOR
        _store_d_hidden(d_hidden_ptr, d_hidden * r, extra_ptr, extra_stride, row, columns, width, inside)
    column = tl.arange(0, BLOCK)
    store_sums(weight_partial_ptr, program, column, width, d_weight)
    store_sums(bias_partial_ptr, program, column, width, d_bias)


@triton.jit(do_not_specialize=["rows", "width_vectors", "grad_stride_vectors", "hidden_stride_vectors"])
def _backward_wide_sums(
    grad_ptr,
    hidden_ptr,
    weight_ptr,
    row_sums_ptr,
    rows,
    width_vectors,
    grad_stride_vectors,
    hidden_stride_vectors,
    eps,
    offset,
    CENTRED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """r, mean(g n), and where CENTRED shift, difference and mean(g) of one row a program, for rows too wide to keep."""
    width = width_vectors * VECTOR
    row = tl.program_id(0).to(tl.int64)
    hidden_row = hidden_ptr + row * hidden_stride_vectors * VECTOR
    shift = 0.0
    if CENTRED:
        shift = mean_of_row(hidden_row, None, width, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    differences = tl.zeros([BLOCK], tl.float32)
    gradients = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        wide = tl.load(hidden_row + columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride_vectors * VECTOR + columns, mask=inside, other=0.0).to(tl.float32)
        g = grad * load_weight(weight_ptr, columns, width, offset)
        if CENTRED:
            wide = tl.where(inside, wide - shift, 0.0)
            differences += wide
            gradients += g
        squares += wide * wide
        products += wide * g
    difference = 0.0
    product = tl.sum(products) / width
    if CENTRED:
        difference = tl.sum(differences) / width
        mean_g = tl.sum(gradients) / width
        product -= difference * mean_g
        tl.store(row_sums_ptr + 2 * rows + row, shift)
        tl.store(row_sums_ptr + 3 * rows + row, difference)
        tl.store(row_sums_ptr + 4 * rows + row, mean_g)
    r = scale_of(difference, tl.sum(squares) / width, eps, CENTRED)
    tl.store(row_sums_ptr + row, r)
    tl.store(row_sums_ptr + rows + row, r * product)


@triton.jit(
    do_not_specialize=["rows", "width_vectors", "grad_stride_vectors", "hidden_stride_vectors", "extra_stride_vectors"]
)
def _backward_wide(
    grad_ptr,
    hidden_ptr,
    weight_ptr,
    extra_ptr,
    row_sums_ptr,
    d_hidden_ptr,
    weight_partial_ptr,
    bias_partial_ptr,
    rows,
    width_vectors,
    grad_stride_vectors,
    hidden_stride_vectors,
    extra_stride_vectors,
    offset,
    CENTRED: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of columns a program, over every num_programs(1)-th row tile, with the row sums at hand."""
    width = width_vectors * VECTOR
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = column[None, :]  # [1, BLOCK]
    weight = load_weight(weight_ptr, columns, width, offset)
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    d_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
        inside = (row < rows) & (columns < width)
        hidden_rows = hidden_ptr + row * hidden_stride_vectors * VECTOR
        n = tl.load(hidden_rows + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        grad_rows = grad_ptr + row * grad_stride_vectors * VECTOR
        grad = tl.load(grad_rows + columns, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            n -= tl.load(row_sums_ptr + 2 * rows + row, mask=row < rows, other=0.0)
            n -= tl.load(row_sums_ptr + 3 * rows + row, mask=row < rows, other=0.0)
        r = tl.load(row_sums_ptr + row, mask=row < rows, other=0.0)  # [ROWS, 1]
        n *= r
        d_weight += grad * n
        if bias_partial_ptr is not None:
            d_bias += grad
        d_hidden = grad * weight - n * tl.load(row_sums_ptr + rows + row, mask=row < rows, other=0.0)
        if CENTRED:
            d_hidden -= tl.load(row_sums_ptr + 4 * rows + row, mask=row < rows, other=0.0)
        extra_stride = extra_stride_vectors * VECTOR
        _store_d_hidden(d_hidden_ptr, d_hidden * r, extra_ptr, extra_stride, row, columns, width, inside)
    program = tl.program_id(1)
    store_sums(weight_partial_ptr, program, column, width, d_weight)
    store_sums(bias_partial_ptr, program, column, width, d_bias)


def backward(grad, hidden, weight, grad_hidden, d_hidden, d_weight, d_bias, eps, offset, centred):
    """Writes d_hidden, which is dense, and where they are not None d_weight and d_bias."""
    gradients = [gradient for gradient in (d_weight, d_bias) if gradient is not None]
    if hidden.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    grad, hidden = as_rows(grad, d_hidden), as_rows(hidden, d_hidden)
    extra = None if grad_hidden is None else as_rows(grad_hidden, d_hidden)
    weight = None if weight is None else weight.contiguous()
    rows, width = hidden.shape
    strides = grad.stride(0), hidden.stride(0), 0 if extra is None else extra.stride(0)
    vector = triton_launch.vector_length(hidden.element_size(), width, *strides)
    sizes = rows, width // vector, *(stride // vector for stride in strides)
    formula = eps, offset, {"CENTRED": centred, "VECTOR": vector}
    wanted = [gradient is not None for gradient in (d_weight, d_bias)]
    launch = _in_one if backward_tile(width).block >= width else _in_two
    with triton_launch.on(hidden.device):
        partials = launch((grad, hidden, weight, extra), d_hidden, wanted, sizes, formula)
        for partial, gradient in zip((p for p in partials if p is not None), gradients, strict=True):
            reduce(partial, gradient)


def _in_one(inputs, d_hidden, wanted, sizes, formula):
    hidden, (rows, width) = inputs[1], inputs[1].shape
    eps, offset, options = formula
    tile, device = backward_tile(width), triton_launch.describe(hidden.device)
    resident = device.processors * RESIDENT_THREADS // tile.threads
    programs = min(triton.cdiv(rows, tile.rows), resident)
    partials = empty_partials(hidden, wanted, programs)
    _backward[(programs,)](
        *inputs, d_hidden, *partials, *sizes, eps, offset,
        ROWS=tile.rows, BLOCK=tile.block, **options, **device.options(tile.threads),
    )  # fmt: skip
    return partials


def _in_two(inputs, d_hidden, wanted, sizes, formula):
    hidden, (rows, width) = inputs[1], inputs[1].shape
    eps, offset, options = formula
    tile, device = row_sums_tile(options["CENTRED"]), triton_launch.describe(hidden.device)
    row_sums = hidden.new_empty(5 if options["CENTRED"] else 2, rows, dtype=torch.float32)
    _backward_wide_sums[(rows,)](
        *inputs[:3], row_sums, *sizes[:4], eps, offset,
        BLOCK=tile.block, **options, **device.options(tile.threads),
    )  # fmt: skip
    columns = triton.cdiv(width, COLUMNS.block)
    resident = device.processors * RESIDENT_THREADS // COLUMNS.threads
    programs = max(1, min(triton.cdiv(rows, COLUMNS.rows), resident // columns))
    partials = empty_partials(hidden, wanted, programs)
    _backward_wide[(columns, programs)](
        *inputs, row_sums, d_hidden, *partials, *sizes, offset,
        ROWS=COLUMNS.rows, BLOCK=COLUMNS.block, **options, **device.options(COLUMNS.threads),
    )  # fmt: skip
    return partials
