"""The Triton kernel of attention's forward pass: one tile of query rows against the key blocks that it may look at.

    s = query key^T                                          scores of a block, in units of log2 once times `factor`
    m' = max(m, max(s) factor),  p = exp2(s factor - m')     running row maximum and unnormalised probabilities
    l  = l exp2(m - m') + sum(p)                             acc = acc exp2(m - m') + p value
    out = acc / l,  lse = ln(2) (m + log2(l))

With dropout, acc takes the weights that are kept, l all of them, and out is divided by 1 - p.

The rows of a tile are (position, head) pairs of one key head, position by position, so that the query heads that
share a key head are multiplied together: nothing is expanded, and one decoded token still makes a tile of rows.
Online softmax: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867; tiling: Dao 2023,
https://arxiv.org/abs/2307.08691.

What a call adds to its scores, and where its sequences lie, is in triton_terms and triton_sequences; where a call has
neither, nothing of them is left in the machine code.

Letters: M query rows of a tile, N keys of a block, D head_dim and V value's, padded to powers of two; of wider ones
(triton_tiles.WIDEST) the part that a product takes, and the part that a program owns.
"""

import triton
import triton.language as tl

from .triton_sequences import row_tile, tiles_of
from .triton_shared import LN_2, LOG2_E, addresses, block_of, load_tile, rounded_up, shifted, tanh
from .triton_terms import biased, dropped, modified, places_of_tile, sink_of, unmasked


@triton.jit
def _summed_products(
    q_rows, k_rows, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """query key^T, [M, N], of a head_dim over BLOCK_D: the sum over parts of it, for which both are read anew."""
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.static_range(0, HEAD_DIM, BLOCK_D):
        column = tl.arange(0, BLOCK_D)
        q = load_tile(q_rows + first, column[None, :], None, HEAD_DIM - first, BLOCK_D, False)  # [M, D]
        k = load_tile(k_rows + first, column[:, None], inside, HEAD_DIM - first, BLOCK_D, MASKED)  # [D, N]
        product = tl.dot(q, k, product, input_precision="ieee")
    return product


@triton.jit
def _scores(product, terms, places, keys, inside, factor, softcap):
    """Scores, and by what they are to be multiplied to be in units of log2: most often with the maximum alone."""
    if terms.modify is not None:
        score = product * factor
        if softcap is not None:
            score = tanh(score) * softcap
        product, factor = modified(score, terms, places, keys), 1.0
    elif softcap is not None:
        product, factor = tanh(product * factor) * (softcap * LOG2_E), 1.0
    if terms.bias is not None or terms.slopes is not None:
        product, factor = biased(product * factor, terms, places, keys, inside), 1.0
    return product, factor


@triton.jit
def _attend(
    state, q, terms, places, key_ptr, value_ptr, key_step, value_step, begin, end, key_length, lowest, highest,
    factor, softcap, OFFSET: tl.constexpr, HAS_LEFT: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Walk over the key blocks of begin..end. lowest, highest: [M, 1], the keys that each row may look at.

    q: the tile, or of a head_dim over BLOCK_D where its rows begin.
    """
    acc, top, total = state  # [M, V], [M], [M]
    # Within a block 32 bits do, unless rows lie very far apart; the block's own place always takes 64.
    offsets = tl.arange(0, BLOCK_N).to(OFFSET)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < key_length
        k_rows = key_ptr + tl.cast(start, tl.int64) * key_step + (offsets * key_step.to(OFFSET))[None, :]
        if HEAD_DIM <= BLOCK_D:
            k = load_tile(k_rows, tl.arange(0, BLOCK_D)[:, None], inside[None, :], HEAD_DIM, BLOCK_D, MASKED)  # [D, N]
            s = tl.dot(q, k, input_precision="ieee")  # [M, N]
        else:
            s = _summed_products(q, k_rows, inside[None, :], HEAD_DIM, BLOCK_D, q.shape[0], BLOCK_N, MASKED)
        among = inside[None, :] if MASKED else None
        terms_keys = (start // BLOCK_N * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]  # so that their loads may be wide
        s, scores_factor = _scores(s, terms, places, terms_keys, among, factor, softcap)
        if MASKED:
            allowed = keys[None, :] <= highest
            if HAS_LEFT:
                allowed &= keys[None, :] >= lowest
            s = tl.where(allowed, s, float("-inf"))
        if terms.mask is not None:
            s = tl.where(unmasked(terms, places, terms_keys, among), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1) * scores_factor)
        shift = new_top
        if MASKED or terms.mask is not None or terms.bias is not None or terms.modify is not None:
            # A row that has met no key yet: exp2(-inf - -inf) would be NaN.
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s * scores_factor - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(p, axis=1)
        p = dropped(p, terms, places, terms_keys)
        v_rows = value_ptr + tl.cast(start, tl.int64) * value_step + (offsets * value_step.to(OFFSET))[:, None]
        v = load_tile(v_rows, tl.arange(0, BLOCK_V)[None, :], inside[:, None], VALUE_DIM, BLOCK_V, MASKED)  # [N, V]
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def _share(begin, end, BLOCK_N: tl.constexpr):
    """The part of begin..end, in whole blocks, that falls to this program of the split over keys."""
    blocks = tl.cdiv(tl.maximum(end - begin, 0), tl.num_programs(1) * BLOCK_N)
    first = begin + tl.program_id(1) * blocks * BLOCK_N
    return first, tl.minimum(end, first + blocks * BLOCK_N)


@triton.jit
def _rows(tile, total, BLOCK_M: tl.constexpr):
    """The rows of a tile, counted anew from the state between the loops.

    `total` is never negative, which the compiler cannot know: so it counts again, where it would carry the rows and
    the addresses made of them through the loops, in registers that the loops have to spill (8 words on sm_80).
    """
    return tile * BLOCK_M + tl.arange(0, BLOCK_M) + (total < 0.0).to(tl.int32)


@triton.jit
def _highest(row, shift, key_length, window_right, HAS_RIGHT: tl.constexpr, GROUP: tl.constexpr):
    """The last key that each row may look at, [M, 1]."""
    highest = tl.zeros_like(row) + (key_length - 1)
    if HAS_RIGHT:
        highest = tl.minimum(highest, row // GROUP + shift + window_right)
    return highest[:, None]


@triton.jit
def _attend_window(
    state, q, terms, key_ptr, value_ptr, key_step, value_step, tile, batch, chosen, span, window_left, window_right,
    factor, softcap, OFFSET: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The key blocks that the window opens to the tile's rows: masked at its left edge, whole, masked at its right."""
    _, query_length, _, key_length = span
    shift = key_length - query_length
    first = tile * BLOCK_M // GROUP + shift
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, query_length - 1) + shift
    begin, whole = 0, 0
    if HAS_LEFT:
        begin = tl.maximum(first - window_left, 0) // BLOCK_N * BLOCK_N
        whole = rounded_up(tl.maximum(last - window_left, 0), BLOCK_N)
    end, whole_end = key_length, key_length
    if HAS_RIGHT:
        end = tl.minimum(end, last + window_right + 1)
        whole_end = tl.maximum(tl.minimum(whole_end, first + window_right + 1), 0)
    begin, end = _share(begin, end, BLOCK_N)
    whole = tl.minimum(tl.maximum(whole, begin), tl.maximum(begin, end))
    whole_end = tl.minimum(tl.maximum(whole_end // BLOCK_N * BLOCK_N, whole), tl.maximum(whole, end))
    if HAS_LEFT:
        row = _rows(tile, state[2], BLOCK_M)
        state = _attend(
            state, q, terms, places_of_tile(terms, row[:, None], batch, chosen, span, GROUP),
            key_ptr, value_ptr, key_step, value_step, begin, whole, key_length,
            (row // GROUP + shift - window_left)[:, None],
            _highest(row, shift, key_length, window_right, HAS_RIGHT, GROUP),
            factor, softcap, OFFSET, HAS_LEFT, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True,
        )  # fmt: skip
    state = _attend(
        state, q, terms, places_of_tile(terms, _rows(tile, state[2], BLOCK_M)[:, None], batch, chosen, span, GROUP),
        key_ptr, value_ptr, key_step, value_step, whole, whole_end, key_length, None, None,
        factor, softcap, OFFSET, HAS_LEFT, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, False,
    )  # fmt: skip
    row = _rows(tile, state[2], BLOCK_M)
    return _attend(
        state, q, terms, places_of_tile(terms, row[:, None], batch, chosen, span, GROUP),
        key_ptr, value_ptr, key_step, value_step, whole_end, end, key_length,
        (row // GROUP + shift - window_left)[:, None],
        _highest(row, shift, key_length, window_right, HAS_RIGHT, GROUP),
        factor, softcap, OFFSET, HAS_LEFT, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True,
    )  # fmt: skip


@triton.jit
def _nothing_yet(terms, row, chosen, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """The state before the first key: of a row with a sink, which the first part of the keys takes, that one score."""
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if terms.sinks is not None:
        first = tl.program_id(1) == 0
        top = tl.where(first, sink_of(terms, row, chosen, GROUP), top)
        total += tl.where(first, 1.0, 0.0)
    return tl.zeros([BLOCK_M, BLOCK_V], tl.float32), top, total


@triton.jit(
    do_not_specialize=[
        "query_length", "key_length", "key_heads", "window_left", "window_right", "factor", "softcap",
        "query_batch", "query_head", "query_step", "key_batch", "key_head", "key_step",
        "value_batch", "value_head", "value_step", "out_split", "out_batch", "out_head", "out_step",
    ]
)  # fmt: skip
def attend(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, terms, bounds,
    query_length, key_length, key_heads, window_left, window_right, factor, softcap,
    query_batch, query_head, query_step,  # strides from here on, in vectors
    key_batch, key_head, key_step,
    value_batch, value_head, value_step,
    out_split, out_batch, out_head, out_step,
    OFFSET: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, NEGATIVE: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of rows over this program's share of the keys (axis 1 of the grid splits them).

    Where value's head_dim is wider than BLOCK_V, of that part of it which axis 2 says, scores being made anew.
    """
    tiles = tiles_of(bounds, query_length * GROUP, BLOCK_M)
    batch, chosen = tl.program_id(0) // tiles // key_heads, tl.program_id(0) // tiles % key_heads
    tile = tl.program_id(0) % tiles
    if HAS_RIGHT:
        tile = tiles - 1 - tile  # longest rows first, so that short ones fill the end
    tile, span = row_tile(bounds, batch, tile, query_length, key_length, GROUP, BLOCK_M)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if HEAD_DIM <= BLOCK_D:
        query_ptr = shifted(query_ptr, span[0], query_step, VECTOR)
        q_rows = addresses(query_ptr, row, batch, chosen, query_batch, query_head, query_step, VECTOR, GROUP)
        column, inside = tl.arange(0, BLOCK_D)[None, :], (row < span[1] * GROUP)[:, None]
        q = load_tile(q_rows, column, inside, HEAD_DIM, BLOCK_D, True)  # [M, D]
        if NEGATIVE:
            # `factor` is positive, so that the largest product is the largest score; q takes the scale's sign, exactly.
            q = (-q.to(tl.float32)).to(q.dtype)
    else:
        # Rows behind the last one read the last one, or that of the sequence before: so loads need no mask.
        begin = tl.minimum(span[0], query_length - 1)
        last = tl.maximum(tl.minimum(row, span[1] * GROUP - 1), 0)
        query_ptr = shifted(query_ptr, begin, query_step, VECTOR)
        q = addresses(query_ptr, last, batch, chosen, query_batch, query_head, query_step, VECTOR, GROUP)
    if VALUE_DIM > BLOCK_V:
        # The last part begins earlier where BLOCK_V does not divide value's head_dim; the columns that two programs
        # make have the same bits.
        part = tl.program_id(2)
        first_value = tl.where(part == tl.num_programs(2) - 1, VALUE_DIM - BLOCK_V, part * BLOCK_V)
        value_ptr, out_ptr = value_ptr + first_value, out_ptr + first_value
    acc, top, total = _attend_window(
        _nothing_yet(terms, row, chosen, GROUP, BLOCK_M, BLOCK_V), q, terms,
        block_of(key_ptr, batch, chosen, span[2], key_batch, key_head, key_step, VECTOR),
        block_of(value_ptr, batch, chosen, span[2], value_batch, value_head, value_step, VECTOR),
        key_step.to(tl.int64) * VECTOR, value_step.to(tl.int64) * VECTOR,
        tile, batch, chosen, span, window_left, window_right, factor, softcap,
        OFFSET, HAS_LEFT, HAS_RIGHT, GROUP, HEAD_DIM, min(VALUE_DIM, BLOCK_V), BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    row = _rows(tile, total, BLOCK_M)
    inside = (row < span[1] * GROUP)[:, None]
    split = tl.program_id(1).to(tl.int64)
    factor = 1.0 / tl.where(total > 0.0, total, 1.0)
    if terms.hashes is not None:
        factor *= terms.drop_scale
    out = acc * factor[:, None]
    out_ptr = shifted(out_ptr + split * out_split * VECTOR, span[0], out_step, VECTOR)
    out_rows = addresses(out_ptr, row, batch, chosen, out_batch, out_head, out_step, VECTOR, GROUP)
    column = tl.arange(0, BLOCK_V)[None, :]
    tl.store(out_rows + column, out.to(out_ptr.dtype.element_ty), mask=inside & (column < VALUE_DIM))
    heads = key_heads.to(tl.int64) * GROUP
    batches = tl.num_programs(0) // tiles // key_heads
    lse_ptr += split * batches * heads * query_length + span[0]
    lse_rows = addresses(lse_ptr, row, batch, chosen, heads * query_length, query_length, 1, 1, GROUP)
    tl.store(lse_rows, ((top + tl.log2(total)) * LN_2)[:, None], mask=inside)
