"""Rotary position embedding on the GPU: query and key in one launch.

    a' = a cos - b sin,   b' = b cos + a sin          for each pair (a, b); see rotary/reference.py

Bound by memory, so each program reads its rows of the tables once and turns several heads with them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import operators, triton_launch

HEADS = 8  # heads that share one read of the tables, where that leaves programs for every processor
PAIRS = 1024  # pairs of elements that a program turns at once: 8 a thread, one 16-byte access in 16-bit types
THREADS = 128


class Tile(NamedTuple):
    """What one program turns at once."""

    rows: int  # positions
    block: int  # pairs, a power of two
    threads: int


def tile_sizes(rows: int, half: int) -> Tile:
    """What one program turns at once of `rows` positions of `half` pairs."""
    block = min(triton.next_power_of_2(half), PAIRS)
    tall = min(triton.next_power_of_2(rows), max(1, PAIRS // block))
    return Tile(tall, block, THREADS * tall * block // PAIRS)


def heads_per_program(heads: int, programs_a_head: int, processors: int) -> int:
    """As many heads as share the tables, fewer where that would leave processors idle."""
    together = HEADS
    while together > 1 and triton.cdiv(heads, together) * programs_a_head < 2 * processors:
        together //= 2
    return together


@triton.jit
def _turn(a, b, cos, sin):
    a, b = a.to(tl.float32), b.to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _turn_head(
    in_rows, out_rows, cos, sin, first, half, rest, row_inside,
    INTERLEAVED: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of a tile of positions. in_rows, out_rows: [ROWS, 1] pointers; cos, sin: [ROWS, BLOCK]."""
    if INTERLEAVED:
        columns = 2 * first + tl.arange(0, 2 * BLOCK)[None, :]
        inside = row_inside & (columns < 2 * half)
        x = tl.load(in_rows + columns, mask=inside, other=0.0)  # [ROWS, 2 * BLOCK]
        a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK, 2)))
        a, b = _turn(a, b, cos, sin)
        tl.store(out_rows + columns, tl.reshape(tl.join(a, b), x.shape).to(x.dtype), mask=inside)
    else:
        columns = first + tl.arange(0, BLOCK)[None, :]
        inside = row_inside & (columns < half)
        x = tl.load(in_rows + columns, mask=inside, other=0.0)  # [ROWS, BLOCK]
        y = tl.load(in_rows + half + columns, mask=inside, other=0.0)
        a, b = _turn(x, y, cos, sin)
        tl.store(out_rows + columns, a.to(x.dtype), mask=inside)
        tl.store(out_rows + half + columns, b.to(x.dtype), mask=inside)
    if REST:
        for start in range(first, rest, tl.num_programs(2) * BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            is_rest = row_inside & (column < rest)
            tl.store(out_rows + 2 * half + column, tl.load(in_rows + 2 * half + column, mask=is_rest), mask=is_rest)


@triton.jit
def _rows_at(pointer, batch, position, batch_stride, position_stride, VECTOR: tl.constexpr):
    return pointer + batch * (batch_stride.to(tl.int64) * VECTOR) + position * (position_stride.to(tl.int64) * VECTOR)


@triton.jit(
    do_not_specialize=[
        "rows", "sequence", "half_vectors", "rest_vectors", "query_heads", "key_heads", "heads_together",
        "query_batch", "query_head", "query_position", "key_batch", "key_head", "key_position",
        "out_query_batch", "out_query_head", "out_query_position", "out_key_batch", "out_key_head", "out_key_position",
        "cos_batch", "cos_position", "sin_batch", "sin_position",
    ]
)  # fmt: skip
def _rotate(
    query_ptr, key_ptr, out_query_ptr, out_key_ptr, cos_ptr, sin_ptr,
    rows, sequence, half_vectors, rest_vectors, query_heads, key_heads, heads_together,
    query_batch, query_head, query_position,  # strides from here on, in vectors
    key_batch, key_head, key_position,
    out_query_batch, out_query_head, out_query_position,
    out_key_batch, out_key_head, out_key_position,
    cos_batch, cos_position, sin_batch, sin_position,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS positions (of all batches in turn) and `heads_together` heads a program, key's heads after query's."""
    half, rest = half_vectors * VECTOR, rest_vectors * VECTOR
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    inside = row < rows
    batch, position = (row // sequence).to(tl.int64), (row % sequence).to(tl.int64)
    first = tl.program_id(2) * BLOCK
    pair = first + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    table_inside = inside & (pair < half)
    cos_rows = _rows_at(cos_ptr, batch, position, cos_batch, cos_position, VECTOR)
    sin_rows = _rows_at(sin_ptr, batch, position, sin_batch, sin_position, VECTOR)
    cos = tl.load(cos_rows + pair, mask=table_inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    sin = tl.load(sin_rows + pair, mask=table_inside, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    begin = tl.program_id(1) * heads_together
    end = tl.minimum(begin + heads_together, query_heads + key_heads)
    in_rows = _rows_at(query_ptr, batch, position, query_batch, query_position, VECTOR)
    out_rows = _rows_at(out_query_ptr, batch, position, out_query_batch, out_query_position, VECTOR)
    for head in range(begin, tl.minimum(end, query_heads)):
        in_head = in_rows + tl.cast(head, tl.int64) * query_head * VECTOR
        out_head = out_rows + tl.cast(head, tl.int64) * out_query_head * VECTOR
        _turn_head(in_head, out_head, cos, sin, first, half, rest, inside, INTERLEAVED, REST, BLOCK)
    in_rows = _rows_at(key_ptr, batch, position, key_batch, key_position, VECTOR)
    out_rows = _rows_at(out_key_ptr, batch, position, out_key_batch, out_key_position, VECTOR)
    for head in range(tl.maximum(begin, query_heads) - query_heads, end - query_heads):
        in_head = in_rows + tl.cast(head, tl.int64) * key_head * VECTOR
        out_head = out_rows + tl.cast(head, tl.int64) * out_key_head * VECTOR
        _turn_head(in_head, out_head, cos, sin, first, half, rest, inside, INTERLEAVED, REST, BLOCK)


def apply_rotary(query, key, cos, sin, interleaved, inverse, rotary_dim):
    """query and key (batch, heads, sequence, head_dim), turned by tables ([batch,] sequence, rotary_dim / 2)."""
    out_query, out_key = operators.empty_laid_out_like(query), operators.empty_laid_out_like(key)
    rest = query.shape[3] - rotary_dim
    _launch(query, key, out_query, out_key, cos, sin, interleaved, inverse, rotary_dim, rest)
    return out_query, out_key


def apply_rotary_(query, key, cos, sin, interleaved, inverse, rotary_dim):
    """As `apply_rotary`, in place."""
    _launch(query, key, query, key, cos, sin, interleaved, inverse, rotary_dim, 0)


def _launch(query, key, out_query, out_key, cos, sin, interleaved, inverse, rotary_dim, rest):
    """rest: how many elements after rotary_dim are copied."""
    if query.numel() == 0 and key.numel() == 0:
        return
    batch, query_heads, sequence, _ = query.shape
    rows, half, heads = batch * sequence, rotary_dim // 2, query_heads + key.shape[1]
    strides = [stride for t in (query, key, out_query, out_key) for stride in t.stride()[:3]]
    has_batch = cos.dim() == 3 and cos.shape[0] > 1
    strides += [stride for t in (cos, sin) for stride in (t.stride(0) if has_batch else 0, t.stride(-2))]
    vector = triton_launch.vector_length(query.element_size(), half, rest, *strides)
    tile = tile_sizes(rows, half)
    row_tiles, column_tiles = triton.cdiv(rows, tile.rows), triton.cdiv(half, tile.block)
    device = triton_launch.describe(query.device)
    together = heads_per_program(heads, row_tiles * column_tiles, device.processors)
    with triton_launch.on(query.device):
        _rotate[(row_tiles, triton.cdiv(heads, together), column_tiles)](
            query, key, out_query, out_key, cos, sin,
            rows, sequence, half // vector, rest // vector, query_heads, key.shape[1], together,
            *(stride // vector for stride in strides),
            INTERLEAVED=interleaved, INVERSE=inverse, REST=rest > 0,
            VECTOR=vector, ROWS=tile.rows, BLOCK=tile.block, **device.options(tile.threads),
        )  # fmt: skip
