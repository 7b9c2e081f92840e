"""The Triton kernels of attention's backward pass. With P = exp(score - lse), which is computed anew:

    delta = rowsum(dOut out)                             `prepare`: one number a row
    dS = P (dOut V^T - delta + dLse) dscore/dproduct     dQ = scale dS K                      `differentiate_query`
    dV = P^T dOut                                        dK = scale dS^T Q                    `differentiate_key`

With dropout dV is drop(P)^T dOut, and dOut V^T becomes drop(dOut V^T); delta, made of out, has it already.

A program of `differentiate_query` holds a tile of rows and walks the keys that they may look at; a program of
`differentiate_key` holds a block of keys and walks the rows that may look at them. Each result has one owner, which
sums it in registers in a fixed order: no atomics, the same bits every time. The two walks make seven products of a
tile where one walk would make five, but one walk's programs meet at dQ: 8 bytes of float32 traffic an element and
tile, and a wait for each other wherever the order of a sum must be fixed. In 16 bits, at head_dim 128 with tiles of
128 x 128, that traffic alone takes an H100's second-level cache (5.5 TB/s) 3.1 us, the two products that it saves
1.1 us.

Rows are the (position, head) pairs of one key head, as in triton_forward, so that the query heads that share a key
head are summed by the program that holds the key: nothing is expanded.

How far P is from the exact softmax depends on lse, which is rounded to float32: half a unit in the last place of an
lse of 1000 is an error of 3e-5, in all probabilities of the row alike. Where results are float32 (EXACT),
`differentiate_query` also sums P, which is 1 but for that error, and leaves 1 / sum(P) to `differentiate_key`; and dLse
is added last, as written. Otherwise `prepare` takes it off delta, whose rounding 16 bits do not show.

`probability` and `_d_product` are the only places that know how a score is made of a product.
Recomputation from lse: Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 4.

Letters: M rows of a tile, N keys of a block, D head_dim and V value's, padded to powers of two.
"""

import triton
import triton.language as tl

from .triton_sequences import key_block, key_blocks_of, row_tile, span_of_sharer, tiles_of
from .triton_shared import LOG2_E, addresses, block_of, load_tile, rounded_up, shifted, tanh
from .triton_terms import biased, d_probability, dropped, modified_and_slope, places_of_tile, sink_of, unmasked


@triton.jit
def probability(product, lse, allowed, terms, places, keys, inside, factor, softcap, MASKED: tl.constexpr):
    """exp(score - lse), zero where not allowed, the score in units of its softcap, and the slope of score_mod.

    lse: in base 2. factor: see _score_factor of triton_attention.py. inside: which keys there are, None for all.
    """
    score = product * factor
    if softcap is not None:
        product = tanh(score)
        score = product * (softcap if terms.modify is not None else softcap * LOG2_E)
    slope = product
    if terms.modify is not None:
        score, slope = modified_and_slope(score, terms, places, keys)
    exponent = biased(score, terms, places, keys, inside) - lse
    if terms.bias is not None or terms.modify is not None:
        # A row whose keys all have the most negative bias: its lse has no digits left, and must not make infinity of P.
        exponent = tl.minimum(exponent, 0.0)
    p = tl.exp2(exponent)
    if MASKED:
        # Not the score but its probability: a scale of 0 would make NaN of a score of -inf.
        p = tl.where(allowed, p, 0.0)
    if terms.mask is not None:
        p = tl.where(unmasked(terms, places, keys, inside), p, 0.0)
    return p, product, slope


@triton.jit
def d_score(p, d_p, delta, grad_lse):
    """The gradient of a score."""
    d_p -= delta
    if grad_lse is not None:
        d_p += grad_lse
    return p * d_p


@triton.jit
def _d_product(p, d_p, delta, grad_lse, capped, slope, terms, softcap):
    """The gradient of a product, but for the scale."""
    gradient = d_score(p, d_p, delta, grad_lse)
    if terms.modify is not None:
        gradient = tl.where(gradient == 0.0, 0.0, gradient * slope)  # where a score is none, its slope is none
    if softcap is not None:
        gradient *= 1.0 - capped * capped
    return gradient


@triton.jit(
    do_not_specialize=[
        "rows_in_all", "query_length", "key_heads",
        "out_batch", "out_head", "out_step", "grad_batch", "grad_head", "grad_step",
    ]
)  # fmt: skip
def prepare(
    out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, statistics_ptr, rows_in_all, query_length, key_heads,
    out_batch, out_head, out_step, grad_batch, grad_head, grad_step,
    EXACT: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lse in base 2, delta, and where it is EXACT dLse of each row, ordered as (batch, key head, position, head).

    delta is read off the diagonal of a product, so that it sums in the very order of dOut V^T: a row that sees one
    key only, whose out is that key's value, gets the zero gradient that it should.
    """
    tiles = tl.cdiv(query_length * GROUP, BLOCK_M)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, chosen = pair // key_heads, pair % key_heads
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = row < query_length * GROUP
    out_rows = addresses(out_ptr, row, batch, chosen, out_batch, out_head, out_step, VECTOR, GROUP)
    out = load_tile(out_rows, column, inside[:, None], HEAD_DIM, BLOCK_D, True)  # [M, D]
    grad_rows = addresses(grad_ptr, row, batch, chosen, grad_batch, grad_head, grad_step, VECTOR, GROUP)
    grad = load_tile(grad_rows, column, inside[:, None], HEAD_DIM, BLOCK_D, True)  # [M, D]
    products = tl.dot(grad, tl.trans(out), input_precision="ieee")  # [M, M]
    diagonal = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
    delta = tl.sum(tl.where(diagonal, products, 0.0), axis=1)
    heads = key_heads.to(tl.int64) * GROUP
    at = (batch * heads + chosen * GROUP + row % GROUP) * query_length + row // GROUP
    grad_lse = tl.zeros_like(delta)
    if grad_lse_ptr is not None:
        grad_lse = tl.load(grad_lse_ptr + at, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + at, mask=inside, other=0.0) * LOG2_E
    # A row without keys: what it would make of any score is 0.
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    to = statistics_ptr + pair.to(tl.int64) * query_length * GROUP + row
    rows_in_all = rows_in_all.to(tl.int64)
    tl.store(to, lse, mask=inside)
    if EXACT:
        tl.store(to + rows_in_all, delta, mask=inside)
        tl.store(to + 2 * rows_in_all, grad_lse, mask=inside)
    else:
        tl.store(to + rows_in_all, delta - grad_lse, mask=inside)


@triton.jit
def load_statistic(pointer, inside, outside, MASKED: tl.constexpr):
    """One number a row, `outside` for rows that are not inside."""
    if MASKED:
        return tl.load(pointer, mask=inside, other=outside)
    return tl.load(pointer)


@triton.jit
def _add_keys(
    state, q, grad, lse, delta, grad_lse, terms, places, key_ptr, value_ptr, key_step, value_step, begin, end,
    key_length, lowest, highest, factor, softcap, OFFSET: tl.constexpr, HAS_LEFT: tl.constexpr, EXACT: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Walk over the key blocks of begin..end. lowest, highest: [M, 1], the keys that each row may look at."""
    d_query, total = state  # [M, D], [M]
    offsets = tl.arange(0, BLOCK_N).to(OFFSET)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = (keys < key_length)[:, None]
        k_rows = key_ptr + tl.cast(start, tl.int64) * key_step + (offsets * key_step.to(OFFSET))[:, None]
        k = load_tile(k_rows, tl.arange(0, BLOCK_D)[None, :], inside, HEAD_DIM, BLOCK_D, MASKED)  # [N, D]
        v_rows = value_ptr + tl.cast(start, tl.int64) * value_step + (offsets * value_step.to(OFFSET))[:, None]
        v = load_tile(v_rows, tl.arange(0, BLOCK_V)[None, :], inside, VALUE_DIM, BLOCK_V, MASKED)  # [N, V]
        allowed = None
        if MASKED:
            allowed = keys[None, :] <= highest
            if HAS_LEFT:
                allowed &= keys[None, :] >= lowest
        product = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
        among = (keys < key_length)[None, :] if MASKED else None
        terms_keys = (start // BLOCK_N * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]  # so that their loads may be wide
        p, capped, slope = probability(
            product, lse[:, None], allowed, terms, places, terms_keys, among, factor, softcap, MASKED
        )
        if EXACT:
            total += tl.sum(p, axis=1)
        d_p = tl.dot(grad, tl.trans(v), input_precision="ieee")  # [M, N]
        d_p = d_probability(d_p, terms, places, keys[None, :])
        d_lse = None if grad_lse is None else grad_lse[:, None]
        d_product = _d_product(p, d_p, delta[:, None], d_lse, capped, slope, terms, softcap)
        d_query = tl.dot(d_product.to(k.dtype), k, d_query, input_precision="ieee")
    return d_query, total


@triton.jit
def _add_window_of_keys(
    state, q, grad, lse, delta, grad_lse, terms, places, key_ptr, value_ptr, key_step, value_step, tile, span,
    window_left, window_right, factor, softcap, OFFSET: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, EXACT: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The key blocks that the window opens to the tile's rows: masked at its left edge, whole, masked at its right."""
    _, query_length, _, key_length = span
    shift = key_length - query_length
    first = tile * BLOCK_M // GROUP + shift
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, query_length - 1) + shift
    begin, whole = 0, 0
    if HAS_LEFT:
        begin = tl.maximum(first - window_left, 0)
        if terms.mask is not None or terms.bias is not None or terms.slopes is not None or terms.modify is not None:
            begin = begin // BLOCK_N * BLOCK_N
        whole = begin + rounded_up(tl.maximum(last - window_left - begin, 0), BLOCK_N)
    end, whole_end = key_length, key_length
    if HAS_RIGHT:
        end = tl.minimum(end, last + window_right + 1)
        whole_end = tl.minimum(whole_end, first + window_right + 1)
    whole = tl.minimum(whole, tl.maximum(begin, end))
    whole_end = whole + tl.maximum(whole_end - whole, 0) // BLOCK_N * BLOCK_N
    position = (tile * BLOCK_M + tl.arange(0, BLOCK_M)) // GROUP + shift
    lowest, highest = (position - window_left)[:, None], tl.zeros_like(position)[:, None] + (key_length - 1)
    if HAS_RIGHT:
        highest = tl.minimum(highest, (position + window_right)[:, None])
    if HAS_LEFT:
        state = _add_keys(
            state, q, grad, lse, delta, grad_lse, terms, places, key_ptr, value_ptr, key_step, value_step,
            begin, whole, key_length, lowest, highest, factor, softcap, OFFSET, HAS_LEFT, EXACT,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True,
        )  # fmt: skip
    state = _add_keys(
        state, q, grad, lse, delta, grad_lse, terms, places, key_ptr, value_ptr, key_step, value_step,
        whole, whole_end, key_length, None, None, factor, softcap, OFFSET, HAS_LEFT, EXACT,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, False,
    )  # fmt: skip
    return _add_keys(
        state, q, grad, lse, delta, grad_lse, terms, places, key_ptr, value_ptr, key_step, value_step,
        whole_end, end, key_length, lowest, highest, factor, softcap, OFFSET, HAS_LEFT, EXACT,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True,
    )  # fmt: skip


@triton.jit
def _share_of_sinks(terms, row, chosen, lse, GROUP: tl.constexpr):
    """What a row's probabilities sum to before the first key."""
    share = tl.zeros_like(lse)
    if terms.sinks is not None:
        share += tl.exp2(sink_of(terms, row, chosen, GROUP) - lse)
    return share


@triton.jit(
    do_not_specialize=[
        "rows_in_all", "query_length", "key_length", "key_heads", "window_left", "window_right",
        "factor", "softcap", "scale",
        "query_batch", "query_head", "query_step", "key_batch", "key_head", "key_step",
        "value_batch", "value_head", "value_step", "grad_batch", "grad_head", "grad_step",
        "d_query_batch", "d_query_head", "d_query_step",
    ]
)  # fmt: skip
def differentiate_query(
    query_ptr, key_ptr, value_ptr, grad_ptr, statistics_ptr, terms, bounds, d_query_ptr,
    rows_in_all, query_length, key_length, key_heads, window_left, window_right, factor, softcap, scale,
    query_batch, query_head, query_step,  # strides from here on, in vectors
    key_batch, key_head, key_step,
    value_batch, value_head, value_step,
    grad_batch, grad_head, grad_step,
    d_query_batch, d_query_head, d_query_step,
    OFFSET: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EXACT: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of rows, and where it is EXACT 1 / sum(P) of each."""
    tiles = tiles_of(bounds, query_length * GROUP, BLOCK_M)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, chosen = pair // key_heads, pair % key_heads
    if HAS_RIGHT:
        tile = tiles - 1 - tile  # longest rows first, so that short ones fill the end
    tile, span = row_tile(bounds, batch, tile, query_length, key_length, GROUP, BLOCK_M)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column, inside = tl.arange(0, BLOCK_D)[None, :], row < span[1] * GROUP
    query_ptr = shifted(query_ptr, span[0], query_step, VECTOR)
    q_rows = addresses(query_ptr, row, batch, chosen, query_batch, query_head, query_step, VECTOR, GROUP)
    q = load_tile(q_rows, column, inside[:, None], HEAD_DIM, BLOCK_D, True)  # [M, D]
    grad_ptr = shifted(grad_ptr, span[0], grad_step, VECTOR)
    grad_rows = addresses(grad_ptr, row, batch, chosen, grad_batch, grad_head, grad_step, VECTOR, GROUP)
    grad = load_tile(grad_rows, tl.arange(0, BLOCK_V)[None, :], inside[:, None], VALUE_DIM, BLOCK_V, True)  # [M, V]
    statistics = shifted(statistics_ptr + pair.to(tl.int64) * query_length * GROUP, span[0], GROUP, 1) + row
    lse = load_statistic(statistics, inside, float("inf"), True)
    rows_in_all = rows_in_all.to(tl.int64)
    delta = load_statistic(statistics + rows_in_all, inside, 0.0, True)
    grad_lse = None
    if EXACT:
        grad_lse = load_statistic(statistics + 2 * rows_in_all, inside, 0.0, True)
    d_query, total = _add_window_of_keys(
        (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), _share_of_sinks(terms, row, chosen, lse, GROUP)),
        q, grad, lse, delta, grad_lse, terms, places_of_tile(terms, row[:, None], batch, chosen, span, GROUP),
        block_of(key_ptr, batch, chosen, span[2], key_batch, key_head, key_step, VECTOR),
        block_of(value_ptr, batch, chosen, span[2], value_batch, value_head, value_step, VECTOR),
        key_step.to(tl.int64) * VECTOR, value_step.to(tl.int64) * VECTOR,
        tile, span, window_left, window_right, factor, softcap,
        OFFSET, HAS_LEFT, HAS_RIGHT, EXACT, GROUP, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    if EXACT:
        correction = 1.0 / tl.where(total > 0.0, total, 1.0)
        tl.store(statistics + 3 * rows_in_all, correction, mask=inside)
        d_query *= correction[:, None]
    d_query_ptr = shifted(d_query_ptr, span[0], d_query_step, VECTOR)
    d_rows = addresses(d_query_ptr, row, batch, chosen, d_query_batch, d_query_head, d_query_step, VECTOR, GROUP)
    d_query = (d_query * scale).to(d_query_ptr.dtype.element_ty)
    tl.store(d_rows + column, d_query, mask=inside[:, None] & (column < HEAD_DIM))


@triton.jit
def _add_rows(
    state, k, v, keys, terms, batch, chosen, span, query_ptr, query_head, query_step, grad_ptr, grad_head, grad_step,
    statistics_ptr, rows_in_all, begin, end, window_left, window_right, factor, softcap, OFFSET: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EXACT: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, MASKED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Walk over the row tiles of begin..end. Scores lie as (key, row), so that no operand is turned in registers.

    Keys behind the last one need no mask: what they make, NaN included, reaches their own rows of dK and dV alone.
    Keys of others do, where sequences have them to share.
    """
    d_key, d_value = state  # [N, D], [N, V]
    for start in range(begin, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < end
        head, index = (row % GROUP).to(OFFSET)[:, None], (row // GROUP).to(OFFSET)[:, None]
        q_rows = query_ptr + (head * query_head.to(OFFSET) + index * query_step.to(OFFSET))
        q = load_tile(q_rows, tl.arange(0, BLOCK_D)[None, :], inside[:, None], HEAD_DIM, BLOCK_D, MASKED)  # [M, D]
        grad_rows = grad_ptr + (head * grad_head.to(OFFSET) + index * grad_step.to(OFFSET))
        grad = load_tile(grad_rows, tl.arange(0, BLOCK_V)[None, :], inside[:, None], VALUE_DIM, BLOCK_V, MASKED)
        statistics = statistics_ptr + row
        lse = load_statistic(statistics, inside, float("inf"), MASKED)
        delta = load_statistic(statistics + rows_in_all, inside, 0.0, MASKED)
        grad_lse = None
        if EXACT:
            grad_lse = load_statistic(statistics + 2 * rows_in_all, inside, 0.0, MASKED)
        allowed = None
        if MASKED:
            position = (row // GROUP + (span[3] - span[1]))[None, :]
            allowed = inside[None, :]
            if HAS_RIGHT:
                allowed &= keys[:, None] <= position + window_right
            if HAS_LEFT:
                allowed &= keys[:, None] >= position - window_left
        product = tl.dot(k, tl.trans(q), input_precision="ieee")  # [N, M]
        places = places_of_tile(terms, row[None, :], batch, chosen, span, GROUP)
        among = (keys < span[3])[:, None]
        p, capped, slope = probability(
            product, lse[None, :], allowed, terms, places, keys[:, None], among, factor, softcap, MASKED
        )
        if SHARED:
            p = tl.where(((keys >= 0) & (keys < span[3]))[:, None], p, 0.0)
        if EXACT:
            p *= load_statistic(statistics + 3 * rows_in_all, inside, 0.0, MASKED)[None, :]
        weights = dropped(p, terms, places, keys[:, None])
        d_value = tl.dot(weights.to(grad.dtype), grad, d_value, input_precision="ieee")
        d_p = tl.dot(v, tl.trans(grad), input_precision="ieee")  # [N, M]
        d_p = d_probability(d_p, terms, places, keys[:, None])
        d_lse = None if grad_lse is None else grad_lse[None, :]
        d_product = _d_product(p, d_p, delta[None, :], d_lse, capped, slope, terms, softcap)
        if SHARED:
            d_product = tl.where(((keys >= 0) & (keys < span[3]))[:, None], d_product, 0.0)
        d_key = tl.dot(d_product.to(q.dtype), q, d_key, input_precision="ieee")
    return d_key, d_value


@triton.jit
def _add_window_of_rows(
    state, k, v, first_key, terms, batch, chosen, span, query_ptr, query_head, query_step,
    grad_ptr, grad_head, grad_step, statistics_ptr, rows_in_all, window_left, window_right, factor, softcap,
    OFFSET: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EXACT: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """The row tiles to which the window opens the block's keys: masked at its right edge, whole, masked at its left."""
    _, query_length, _, key_length = span
    shift = key_length - query_length
    last_key = tl.minimum(first_key + BLOCK_N, key_length) - 1
    keys = first_key + tl.arange(0, BLOCK_N)
    begin, whole = 0, 0
    if HAS_RIGHT:
        begin = tl.maximum(first_key - window_right - shift, 0) * GROUP
        whole = begin + rounded_up(tl.maximum((last_key - window_right - shift) * GROUP - begin, 0), BLOCK_M)
    end, whole_end = query_length * GROUP, query_length * GROUP
    if HAS_LEFT:
        end = tl.minimum(end, (last_key + window_left - shift + 1) * GROUP)
        whole_end = tl.minimum(whole_end, (first_key + window_left - shift + 1) * GROUP)
    whole = tl.minimum(whole, tl.maximum(begin, end))
    whole_end = whole + tl.maximum(whole_end - whole, 0) // BLOCK_M * BLOCK_M
    if HAS_RIGHT:
        state = _add_rows(
            state, k, v, keys, terms, batch, chosen, span, query_ptr, query_head, query_step,
            grad_ptr, grad_head, grad_step, statistics_ptr, rows_in_all, begin, whole, window_left, window_right,
            factor, softcap, OFFSET, HAS_LEFT, HAS_RIGHT, EXACT, GROUP,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, True, SHARED,
        )  # fmt: skip
    state = _add_rows(
        state, k, v, keys, terms, batch, chosen, span, query_ptr, query_head, query_step,
        grad_ptr, grad_head, grad_step, statistics_ptr, rows_in_all, whole, whole_end, window_left, window_right,
        factor, softcap, OFFSET, HAS_LEFT, HAS_RIGHT, EXACT, GROUP,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, False, SHARED,
    )  # fmt: skip
    return _add_rows(
        state, k, v, keys, terms, batch, chosen, span, query_ptr, query_head, query_step,
        grad_ptr, grad_head, grad_step, statistics_ptr, rows_in_all, whole_end, end, window_left, window_right,
        factor, softcap, OFFSET, HAS_LEFT, HAS_RIGHT, EXACT, GROUP,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, True, SHARED,
    )  # fmt: skip


@triton.jit
def _add_sequence(
    state, k, v, first_key, terms, batch, chosen, span, rows, window_left, window_right, factor, softcap,
    OFFSET: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EXACT: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """What one sequence's rows add to dK and dV of a block of keys."""
    query_ptr, query_batch, query_head, query_step, grad_ptr, grad_batch, grad_head, grad_step = rows[:8]
    statistics_ptr, pair, query_length, rows_in_all, first_head = rows[8:]
    return _add_window_of_rows(
        state, k, v, first_key, terms, batch, chosen, span,
        block_of(query_ptr, batch, first_head, span[0], query_batch, query_head, query_step, VECTOR),
        query_head.to(tl.int64) * VECTOR, query_step.to(tl.int64) * VECTOR,
        block_of(grad_ptr, batch, first_head, span[0], grad_batch, grad_head, grad_step, VECTOR),
        grad_head.to(tl.int64) * VECTOR, grad_step.to(tl.int64) * VECTOR,
        shifted(statistics_ptr + pair.to(tl.int64) * query_length * GROUP, span[0], GROUP, 1),
        rows_in_all.to(tl.int64), window_left, window_right, factor, softcap,
        OFFSET, HAS_LEFT, HAS_RIGHT, EXACT, GROUP, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, SHARED,
    )  # fmt: skip


@triton.jit
def _block(pointer, batch, head, keys, first_key, batch_stride, head_stride, step, VECTOR: tl.constexpr):
    """Where each key's row begins, [N, 1]."""
    start = block_of(pointer, batch, head, first_key, batch_stride, head_stride, step, VECTOR)
    return start + (keys.to(tl.int64) * step * VECTOR)[:, None]


@triton.jit(
    do_not_specialize=[
        "rows_in_all", "query_length", "key_length", "key_heads", "window_left", "window_right",
        "factor", "softcap", "scale",
        "query_batch", "query_head", "query_step", "key_batch", "key_head", "key_step",
        "value_batch", "value_head", "value_step", "grad_batch", "grad_head", "grad_step",
        "d_key_batch", "d_key_head", "d_key_step", "d_value_batch", "d_value_head", "d_value_step",
    ]
)  # fmt: skip
def differentiate_key(
    query_ptr, key_ptr, value_ptr, grad_ptr, statistics_ptr, terms, bounds, d_key_ptr, d_value_ptr,
    rows_in_all, query_length, key_length, key_heads, window_left, window_right, factor, softcap, scale,
    query_batch, query_head, query_step,  # strides from here on, in vectors
    key_batch, key_head, key_step,
    value_batch, value_head, value_step,
    grad_batch, grad_head, grad_step,
    d_key_batch, d_key_head, d_key_step,
    d_value_batch, d_value_head, d_value_step,
    OFFSET: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EXACT: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys, which several sequences may share where their ends are given."""
    blocks = key_blocks_of(bounds, key_length, BLOCK_N)
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, chosen = pair // key_heads, pair % key_heads
    # The block is the tensor's, or one of the only sequence that has its keys.
    SHARED: tl.constexpr = bounds.query_starts is not None and bounds.key_ends is not None
    span = 0, query_length, 0, key_length
    if not SHARED:
        block, span = key_block(bounds, batch, block, query_length, key_length, BLOCK_N)
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    column, value_column = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_V)[None, :]
    inside = (keys < span[3])[:, None]
    k_rows = _block(key_ptr, batch, chosen, keys, span[2], key_batch, key_head, key_step, VECTOR)
    k = load_tile(k_rows, column, inside, HEAD_DIM, BLOCK_D, True)  # [N, D]
    v_rows = _block(value_ptr, batch, chosen, keys, span[2], value_batch, value_head, value_step, VECTOR)
    v = load_tile(v_rows, value_column, inside, VALUE_DIM, BLOCK_V, True)  # [N, V]
    first_head = chosen.to(tl.int64) * GROUP
    state = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    rows = (
        query_ptr, query_batch, query_head, query_step, grad_ptr, grad_batch, grad_head, grad_step,
        statistics_ptr, pair, query_length, rows_in_all, first_head,
    )  # fmt: skip
    if SHARED:
        for sequence in range(bounds.sequences):
            sharer = span_of_sharer(bounds, sequence, block * BLOCK_N, query_length, key_length, BLOCK_N)
            state = _add_sequence(
                state, k, v, block * BLOCK_N - sharer[2], terms, batch, chosen, sharer, rows,
                window_left, window_right, factor, softcap, OFFSET, HAS_LEFT, HAS_RIGHT, EXACT,
                GROUP, HEAD_DIM, VALUE_DIM, VECTOR, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, SHARED,
            )  # fmt: skip
    else:
        state = _add_sequence(
            state, k, v, block * BLOCK_N, terms, batch, chosen, span, rows,
            window_left, window_right, factor, softcap, OFFSET, HAS_LEFT, HAS_RIGHT, EXACT,
            GROUP, HEAD_DIM, VALUE_DIM, VECTOR, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, SHARED,
        )  # fmt: skip
    d_key, d_value = state
    d_rows = _block(d_key_ptr, batch, chosen, keys, span[2], d_key_batch, d_key_head, d_key_step, VECTOR)
    d_key = (d_key * scale).to(d_key_ptr.dtype.element_ty)
    tl.store(d_rows + column, d_key, mask=inside & (column < HEAD_DIM))
    if terms.hashes is not None:
        d_value *= terms.drop_scale
    d_rows = _block(d_value_ptr, batch, chosen, keys, span[2], d_value_batch, d_value_head, d_value_step, VECTOR)
    d_value = d_value.to(d_value_ptr.dtype.element_ty)
    tl.store(d_rows + value_column, d_value, mask=inside & (value_column < VALUE_DIM))
