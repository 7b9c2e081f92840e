"""Feed-forward activations on the GPU, alone or gating a second input; see feedforward/reference.py.

Bound by memory: each program takes a run of columns of one row, 16 bytes a thread and access.
"""

import triton
import triton.language as tl

from .. import operators, triton_launch
from ..triton_activations import value_and_slope
from .reference import halves

THREADS = 128
BLOCK_BYTES = 2 * THREADS * triton_launch.WIDEST_ACCESS  # two accesses a thread and input hide more latency than one


@triton.jit
def _row(pointer, row, stride, VECTOR: tl.constexpr):
    return pointer + row.to(tl.int64) * (stride.to(tl.int64) * VECTOR)


@triton.jit(do_not_specialize=["width_vectors", "x_row", "up_row", "y_row"])
def _forward(
    x_ptr, up_ptr, y_ptr, width_vectors, x_row, up_row, y_row,
    GATED: tl.constexpr, KIND: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width_vectors.to(tl.int64) * VECTOR
    x = tl.load(_row(x_ptr, row, x_row, VECTOR) + columns, mask=inside, other=0.0)
    value, _ = value_and_slope(x.to(tl.float32), KIND)
    if GATED:
        value *= tl.load(_row(up_ptr, row, up_row, VECTOR) + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(_row(y_ptr, row, y_row, VECTOR) + columns, value.to(x.dtype), mask=inside)


@triton.jit(do_not_specialize=["width_vectors", "grad_row", "x_row", "up_row", "d_row"])
def _backward(
    grad_ptr, x_ptr, up_ptr, d_x_ptr, d_up_ptr, width_vectors, grad_row, x_row, up_row, d_row,
    GATED: tl.constexpr, KIND: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width_vectors.to(tl.int64) * VECTOR
    x = tl.load(_row(x_ptr, row, x_row, VECTOR) + columns, mask=inside, other=0.0)
    g = tl.load(_row(grad_ptr, row, grad_row, VECTOR) + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = value_and_slope(x.to(tl.float32), KIND)
    if GATED:
        up = tl.load(_row(up_ptr, row, up_row, VECTOR) + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(_row(d_up_ptr, row, d_row, VECTOR) + columns, (g * value).to(x.dtype), mask=inside)
        g *= up
    tl.store(_row(d_x_ptr, row, d_row, VECTOR) + columns, (g * slope).to(x.dtype), mask=inside)


def _as_rows(out, *inputs):
    """(rows, width, matrices) of tensors of one shape, rows in the order in which the dense tensor `out` holds them.

    One row where all are contiguous. Rows of an input that follow no single stride are copied.
    """
    tensors = (out, *inputs)
    if all(tensor.is_contiguous() for tensor in tensors):
        return 1, out.numel(), [tensor.view(1, -1) for tensor in tensors]
    width, last = out.shape[-1], out.dim() - 1
    order = [*sorted(range(last), key=out.stride, reverse=True), last]
    matrices = [tensor.permute(order).reshape(-1, width) for tensor in tensors]
    matrices = [matrix if matrix.stride(1) == 1 else matrix.contiguous() for matrix in matrices]
    return matrices[0].shape[0], width, matrices


# Rows lie on the grid's second axis, which ends here; longer inputs take several launches.
MOST_ROWS = 65535


def _launches(rows):
    return (slice(first, min(first + MOST_ROWS, rows)) for first in range(0, rows, MOST_ROWS))


def _run_forward(gate, up, y, kind):
    if y.numel() == 0:
        return
    rows, width, (out, x, other) = _as_rows(y, gate, gate if up is None else up)
    strides = [tensor.stride(0) for tensor in (x, other, out)]
    vector = triton_launch.vector_length(x.element_size(), width, *strides)
    block = BLOCK_BYTES // x.element_size()
    with triton_launch.on(x.device):
        for part in _launches(rows):
            _forward[(triton.cdiv(width, block), part.stop - part.start)](
                x[part], other[part], out[part], width // vector, *(stride // vector for stride in strides),
                GATED=up is not None, KIND=kind, VECTOR=vector, BLOCK=block,
                **triton_launch.describe(x.device).options(THREADS),
            )  # fmt: skip


def _run_backward(grad, gate, up, d_gate, d_up, kind):
    if gate.numel() == 0:
        return
    rows, width, (d_x, d_other, g, x, other) = _as_rows(d_gate, d_up, grad, gate, gate if up is None else up)
    strides = [tensor.stride(0) for tensor in (g, x, other, d_x)]
    vector = triton_launch.vector_length(x.element_size(), width, *strides)
    block = BLOCK_BYTES // x.element_size()
    with triton_launch.on(x.device):
        for part in _launches(rows):
            _backward[(triton.cdiv(width, block), part.stop - part.start)](
                g[part], x[part], other[part], d_x[part], d_other[part], width // vector,
                *(stride // vector for stride in strides),
                GATED=up is not None, KIND=kind, VECTOR=vector, BLOCK=block,
                **triton_launch.describe(x.device).options(THREADS),
            )  # fmt: skip


def activation(x, kind):
    """f(x), of x's shape."""
    return gated_activation(x, None, kind)


def gated_activation(gate, up, kind):
    """f(gate) up, of gate's shape; without up f(gate)."""
    y = operators.empty_laid_out_like(gate)
    _run_forward(gate, up, y, kind)
    return y


def packed_gated_activation(packed, kind, up_first):
    """f(gate) up of packed (..., 2 width): (..., width)."""
    return gated_activation(*halves(packed, up_first), kind)


def activation_backward(grad, x, kind):
    """dx = grad f'(x), of x's shape."""
    d_x = operators.empty_laid_out_like(x)
    _run_backward(grad, x, None, d_x, d_x, kind)
    return d_x


def gated_activation_backward(grad, gate, up, kind):
    """dgate = grad up f'(gate) and dup = grad f(gate), of gate's shape."""
    d_gate, d_up = operators.empty_laid_out_like(gate), operators.empty_laid_out_like(gate)
    _run_backward(grad, gate, up, d_gate, d_up, kind)
    return d_gate, d_up


def packed_gated_activation_backward(grad, packed, kind, up_first):
    """dgate and dup side by side, of packed's shape (..., 2 width)."""
    d_packed = operators.empty_laid_out_like(packed)
    _run_backward(grad, *halves(packed, up_first), *halves(d_packed, up_first), kind)
    return d_packed
