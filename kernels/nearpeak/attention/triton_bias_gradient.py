"""The Triton kernel of the gradient of attention's bias: dS, summed over what the bias broadcasts to.

    dS = P (dOut V^T - delta + dLse)        dbias = sum of dS over the bias's dimensions of size 1

A program owns one tile of the bias, (positions or one, keys) of one of its batch entries and heads, and walks the
heads, batch entries and tiles of positions that share it, computing dS anew from what triton_backward's `prepare` left:
each element has one owner, which sums in registers in a fixed order. So it must run after `differentiate_query`, which
leaves 1 / sum(P). Packed sequences are told apart row by row, since a tile may hold several.

Letters: M positions of a tile, N keys of a block, D head_dim and V value's, padded to powers of two.
"""

import triton
import triton.language as tl

from .triton_backward import d_score, load_statistic, probability
from .triton_sequences import spans_of_rows
from .triton_shared import block_of, load_tile
from .triton_terms import d_probability, places


@triton.jit
def _allowed(
    index, keys, spans, query_length, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """Which keys each position may look at, [M, N], and where it stands, [M, 1]: both counted in the whole tensors."""
    query_start, queries, key_start, key_count = spans
    position = (index - query_start + key_start + key_count - queries)[:, None]
    allowed = (index[:, None] < query_length) & (keys >= (key_start + index * 0)[:, None])
    allowed &= keys < (key_start + key_count + index * 0)[:, None]
    if HAS_LEFT:
        allowed &= keys >= position - window_left
    if HAS_RIGHT:
        allowed &= keys <= position + window_right
    return allowed, position


@triton.jit
def _d_score(
    q_rows, k_rows, v_rows, grad_rows, statistics, rows_in_all, terms, batch, head, index, keys, spans,
    query_length, key_length, window_left, window_right, factor, softcap,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EXACT: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dS of one head's tile, [M, N]."""
    column, value_column = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_V)[None, :]
    inside, key_inside = index < query_length, (keys < key_length)
    q = load_tile(q_rows[:, None], column, inside[:, None], HEAD_DIM, BLOCK_D, True)  # [M, D]
    k = load_tile(k_rows[:, None], column, key_inside[:, None], HEAD_DIM, BLOCK_D, True)  # [N, D]
    v = load_tile(v_rows[:, None], value_column, key_inside[:, None], VALUE_DIM, BLOCK_V, True)  # [N, V]
    grad = load_tile(grad_rows[:, None], value_column, inside[:, None], VALUE_DIM, BLOCK_V, True)  # [M, V]
    lse = load_statistic(statistics, inside, float("inf"), True)[:, None]
    delta = load_statistic(statistics + rows_in_all, inside, 0.0, True)[:, None]
    grad_lse = None
    if EXACT:
        grad_lse = load_statistic(statistics + 2 * rows_in_all, inside, 0.0, True)[:, None]
    keys = keys[None, :]
    allowed, position = _allowed(index, keys, spans, query_length, window_left, window_right, HAS_LEFT, HAS_RIGHT)
    row = tl.minimum(index, query_length - 1)[:, None]
    here = places(terms, batch, head, row, 0, position)
    product = tl.dot(q, tl.trans(k), input_precision="ieee")
    p, _, _ = probability(product, lse, allowed, terms, here, keys, key_inside[None, :], factor, softcap, True)
    if EXACT:
        p *= load_statistic(statistics + 3 * rows_in_all, inside, 0.0, True)[:, None]
    d_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
    d_p = d_probability(d_p, terms, here, keys)
    # Keys that no sequence has may hold NaN.
    return tl.where(allowed, d_score(p, d_p, delta, grad_lse), 0.0)


@triton.jit
def _open_rows(
    tile, first_key, bounds, query_length, key_length, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, KEEPS_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The positions, in whole tiles from the first on, that the program walks: none where the window forbids all."""
    begin, end = 0, query_length
    if KEEPS_ROWS:
        begin, end = tile * BLOCK_M, tl.minimum(tile * BLOCK_M + BLOCK_M, query_length)
    if bounds.key_starts is None and bounds.key_ends is None:
        first = first_key - (key_length - query_length)
        if HAS_RIGHT:
            begin = tl.maximum(begin, tl.maximum(first - window_right, 0) // BLOCK_M * BLOCK_M)
        if HAS_LEFT:
            end = tl.minimum(end, first + BLOCK_N + window_left)
    return begin, end


@triton.jit(
    do_not_specialize=[
        "rows_in_all", "query_length", "key_length", "key_heads", "window_left", "window_right", "factor", "softcap",
        "query_batch", "query_head", "query_step", "key_batch", "key_head", "key_step",
        "value_batch", "value_head", "value_step", "grad_batch", "grad_head", "grad_step",
        "batches", "bias_batches", "bias_heads",
    ]
)  # fmt: skip
def differentiate_bias(
    query_ptr, key_ptr, value_ptr, grad_ptr, statistics_ptr, terms, bounds, d_bias_ptr,
    rows_in_all, query_length, key_length, key_heads, window_left, window_right, factor, softcap,
    query_batch, query_head, query_step,  # strides, in vectors
    key_batch, key_head, key_step,
    value_batch, value_head, value_step,
    grad_batch, grad_head, grad_step,
    batches, bias_batches, bias_heads,  # numbers of them
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EXACT: tl.constexpr, KEEPS_ROWS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One tile of the bias's gradient, which is dense. KEEPS_ROWS: whether the bias has a row for each position."""
    blocks, tiles = tl.cdiv(key_length, BLOCK_N), tl.cdiv(query_length, BLOCK_M) if KEEPS_ROWS else 1
    program = tl.program_id(0)
    first_key, tile, owned = program % blocks * BLOCK_N, program // blocks % tiles, program // blocks // tiles
    sharing_heads = key_heads * GROUP // bias_heads
    sharing = batches // bias_batches * sharing_heads
    begin, end = _open_rows(
        tile, first_key, bounds, query_length, key_length, window_left, window_right,
        HAS_LEFT, HAS_RIGHT, KEEPS_ROWS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    steps = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)
    keys = first_key + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M if KEEPS_ROWS else 1, BLOCK_N], tl.float32)
    for step in range(sharing * steps):
        batch = owned // bias_heads + step // steps // sharing_heads
        head = owned % bias_heads + step // steps % sharing_heads
        index = begin + step % steps * BLOCK_M + tl.arange(0, BLOCK_M)
        q_rows = block_of(query_ptr, batch, head, index, query_batch, query_head, query_step, VECTOR)
        grad_rows = block_of(grad_ptr, batch, head, index, grad_batch, grad_head, grad_step, VECTOR)
        k_rows = block_of(key_ptr, batch, head // GROUP, keys, key_batch, key_head, key_step, VECTOR)
        v_rows = block_of(value_ptr, batch, head // GROUP, keys, value_batch, value_head, value_step, VECTOR)
        pair = (batch * key_heads + head // GROUP).to(tl.int64)
        statistics = statistics_ptr + (pair * query_length + index) * GROUP + head % GROUP
        spans = spans_of_rows(bounds, batch, index, query_length, key_length)
        gradient = _d_score(
            q_rows, k_rows, v_rows, grad_rows, statistics, rows_in_all.to(tl.int64), terms, batch, head, index, keys,
            spans, query_length, key_length, window_left, window_right, factor, softcap,
            HAS_LEFT, HAS_RIGHT, EXACT, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V,
        )  # fmt: skip
        total += gradient if KEEPS_ROWS else tl.sum(gradient, axis=0)[None, :]
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M if KEEPS_ROWS else 1)
    rows = query_length if KEEPS_ROWS else 1
    to = d_bias_ptr + (owned.to(tl.int64) * rows + row)[:, None] * key_length + keys[None, :]
    tl.store(to, total.to(d_bias_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (keys < key_length)[None, :])
