"""RMSNorm of query and key over head_dim on the GPU: both in one launch, wherever their rows lie.

n = x r,   r = 1 / sqrt(mean(x^2) + eps),   y = n (offset + weight),   g = grad (offset + weight)
d_x      = r (g - n mean(g n))
d_weight = sum over rows of grad n

Rows are short: a program takes several, of query or of key, and finds each by its three indices.
"""

import torch
import triton
import triton.language as tl

from .. import operators, triton_launch
from ..triton_column_sums import reduce
from ..triton_row_tiles import RESIDENT_THREADS, backward_tile, forward_tile
from ..triton_rows import load_weight
from . import triton_norm


@triton.jit
def _rows_of(pointer, row, size1, size2, stride0, stride1, stride2, VECTOR: tl.constexpr):
    """Pointers to rows number `row`, [ROWS, 1] in int64; strides in vectors."""
    index0, index1, index2 = row // size2 // size1, row // size2 % size1, row % size2
    return pointer + (index0 * stride0 + index1 * stride1 + index2 * stride2) * VECTOR


@triton.jit
def _normalise(
    x_ptr, weight_ptr, y_ptr, tile, rows, size1, size2, x0, x1, x2, y0, y1, y2, width, eps, offset,
    CAST_FIRST: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    inside = (row < rows) & (columns < width)
    x = tl.load(_rows_of(x_ptr, row, size1, size2, x0, x1, x2, VECTOR) + columns, mask=inside, other=0.0)
    n = x.to(tl.float32)
    n *= tl.rsqrt(tl.sum(n * n, axis=1, keep_dims=True) / width + eps)
    if CAST_FIRST:
        n = n.to(x.dtype).to(tl.float32)
    y = n * load_weight(weight_ptr, columns, width, offset)
    tl.store(_rows_of(y_ptr, row, size1, size2, y0, y1, y2, VECTOR) + columns, y.to(x.dtype), mask=inside)


SIZES_AND_STRIDES = [f"{tensor}_{each}" for tensor in "qk" for each in ("rows", "size1", "size2")]


@triton.jit(
    do_not_specialize=[
        "q_tiles", "width_vectors", *SIZES_AND_STRIDES, *(f"{t}{dim}" for t in ("q", "k", "yq", "yk") for dim in "012")
    ]
)  # fmt: skip
def _forward(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, yq_ptr, yk_ptr, q_tiles, width_vectors,
    q_rows, q_size1, q_size2, q0, q1, q2, yq0, yq1, yq2,
    k_rows, k_size1, k_size2, k0, k1, k2, yk0, yk1, yk2,
    eps, offset,
    CAST_FIRST: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, key's after query's."""
    program, width = tl.program_id(0), width_vectors * VECTOR
    if program < q_tiles:
        _normalise(q_ptr, q_weight_ptr, yq_ptr, program, q_rows, q_size1, q_size2, q0, q1, q2, yq0, yq1, yq2, width,
                   eps, offset, CAST_FIRST, VECTOR, ROWS, BLOCK)  # fmt: skip
    else:
        _normalise(k_ptr, k_weight_ptr, yk_ptr, program - q_tiles, k_rows, k_size1, k_size2, k0, k1, k2, yk0, yk1, yk2,
                   width, eps, offset, CAST_FIRST, VECTOR, ROWS, BLOCK)  # fmt: skip


@triton.jit
def _differentiate(
    grad_ptr, x_ptr, weight_ptr, d_ptr, partial_ptr, program, programs, rows, size1, size2,
    g0, g1, g2, x0, x1, x2, d0, d1, d2, width, eps, offset,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Walks over every `programs`-th tile, and keeps its share of d_weight: no atomics, one fixed order."""
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    weight = load_weight(weight_ptr, columns, width, offset)
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
        inside = (row < rows) & (columns < width)
        n = tl.load(_rows_of(x_ptr, row, size1, size2, x0, x1, x2, VECTOR) + columns, mask=inside, other=0.0)
        n = n.to(tl.float32)  # [ROWS, BLOCK]
        grad = tl.load(_rows_of(grad_ptr, row, size1, size2, g0, g1, g2, VECTOR) + columns, mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        r = tl.rsqrt(tl.sum(n * n, axis=1, keep_dims=True) / width + eps)  # [ROWS, 1]
        n *= r
        d_weight += grad * n
        g = grad * weight
        d = r * (g - n * (tl.sum(g * n, axis=1, keep_dims=True) / width))
        to = _rows_of(d_ptr, row, size1, size2, d0, d1, d2, VECTOR) + columns
        tl.store(to, d.to(d_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        column = tl.arange(0, BLOCK)
        to = partial_ptr + program.to(tl.int64) * width + column
        tl.store(to, tl.sum(d_weight, axis=0), mask=column < width)


@triton.jit(
    do_not_specialize=[
        "q_programs", "k_programs", "width_vectors", *SIZES_AND_STRIDES,
        *(f"{t}{dim}" for t in ("gq", "gk", "q", "k", "dq", "dk") for dim in "012"),
    ]
)  # fmt: skip
def _backward(
    gq_ptr, gk_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, dq_ptr, dk_ptr, q_partial_ptr, k_partial_ptr,
    q_programs, k_programs, width_vectors,
    q_rows, q_size1, q_size2, gq0, gq1, gq2, q0, q1, q2, dq0, dq1, dq2,
    k_rows, k_size1, k_size2, gk0, gk1, gk2, k0, k1, k2, dk0, dk1, dk2,
    eps, offset,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q_programs programs walk over query's rows, then k_programs over key's."""
    program, width = tl.program_id(0), width_vectors * VECTOR
    if program < q_programs:
        _differentiate(gq_ptr, q_ptr, q_weight_ptr, dq_ptr, q_partial_ptr, program, q_programs, q_rows, q_size1,
                       q_size2, gq0, gq1, gq2, q0, q1, q2, dq0, dq1, dq2, width, eps, offset,
                       VECTOR, ROWS, BLOCK)  # fmt: skip
    else:
        _differentiate(gk_ptr, k_ptr, k_weight_ptr, dk_ptr, k_partial_ptr, program - q_programs, k_programs, k_rows,
                       k_size1, k_size2, gk0, gk1, gk2, k0, k1, k2, dk0, dk1, dk2, width, eps, offset,
                       VECTOR, ROWS, BLOCK)  # fmt: skip


def _dense(tensor):
    """The tensor, its last dimension dense; weights too."""
    return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _addresses(vector, *tensors):
    """Rows, their two inner sizes, and three strides in vectors of each of the tensors, which have one shape."""
    size0, size1, size2, _ = tensors[0].shape
    strides = [stride // vector for tensor in tensors for stride in tensor.stride()[:3]]
    return size0 * size1 * size2, size1, size2, *strides


def _vector(width, *tensors):
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return triton_launch.vector_length(tensors[0].element_size(), width, *strides)


def qk_norm(query, key, query_weight, key_weight, eps, offset, cast_first):
    """y of query and of key, of their shapes, whose last dimension is head_dim; weights (head_dim,) or None."""
    if forward_tile(query.shape[3], query.element_size()).block < query.shape[3]:  # more than a program holds
        formula = eps, offset, cast_first
        return triton_norm.rms_norm(query, query_weight, *formula), triton_norm.rms_norm(key, key_weight, *formula)
    outs = operators.empty_laid_out_like(query), operators.empty_laid_out_like(key)
    query, key, query_weight, key_weight = map(_dense, (query, key, query_weight, key_weight))
    width = query.shape[3]
    vector = _vector(width, query, key, *outs)
    tile, device = forward_tile(width, query.element_size()), triton_launch.describe(query.device)
    q_tiles, k_tiles = (triton.cdiv(x.numel() // width, tile.rows) for x in (query, key))
    if q_tiles + k_tiles == 0:
        return outs
    with triton_launch.on(query.device):
        _forward[(q_tiles + k_tiles,)](
            query, key, query_weight, key_weight, *outs, q_tiles, width // vector,
            *_addresses(vector, query, outs[0]), *_addresses(vector, key, outs[1]), eps, offset,
            CAST_FIRST=cast_first, VECTOR=vector, ROWS=tile.rows, BLOCK=tile.block, **device.options(tile.threads),
        )  # fmt: skip
    return outs


def qk_norm_backward(grad_query, grad_key, query, key, query_weight, key_weight, eps, offset):
    """d_query, d_key, and the weights' gradients (head_dim,), empty without a weight."""
    if backward_tile(query.shape[3]).block < query.shape[3]:
        d_query, d_query_weight = triton_norm.rms_norm_backward(grad_query, query, query_weight, None, eps, offset)
        d_key, d_key_weight = triton_norm.rms_norm_backward(grad_key, key, key_weight, None, eps, offset)
        return d_query, d_key, d_query_weight, d_key_weight
    gradients = [operators.empty_laid_out_like(x) for x in (query, key)]
    weight_gradients = [query.new_empty(0) if w is None else torch.zeros_like(w) for w in (query_weight, key_weight)]
    tensors = [_dense(t) for t in (grad_query, grad_key, query, key)]
    weights = [_dense(w) for w in (query_weight, key_weight)]
    width = query.shape[3]
    vector = _vector(width, *tensors, *gradients)
    tile, device = backward_tile(width), triton_launch.describe(query.device)
    resident = device.processors * RESIDENT_THREADS // tile.threads
    programs = [min(triton.cdiv(x.numel() // width, tile.rows), resident) for x in (query, key)]
    if sum(programs) == 0:
        return *gradients, *weight_gradients
    partials = [
        None if weight is None else query.new_empty(count, width, dtype=torch.float32)
        for weight, count in zip(weights, programs, strict=True)
    ]
    with triton_launch.on(query.device):
        _backward[(sum(programs),)](
            *tensors, *weights, *gradients, *partials, *programs, width // vector,
            *_addresses(vector, tensors[0], tensors[2], gradients[0]),
            *_addresses(vector, tensors[1], tensors[3], gradients[1]), eps, offset,
            VECTOR=vector, ROWS=tile.rows, BLOCK=tile.block, **device.options(tile.threads),
        )  # fmt: skip
        for partial, total in zip(partials, weight_gradients, strict=True):
            if partial is not None and partial.shape[0] > 0:
                reduce(partial, total)
    return *gradients, *weight_gradients
