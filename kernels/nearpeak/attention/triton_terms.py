"""What attention's Triton kernels add to the scores: bias, ALiBi and a boolean mask, each of which vanishes when off.

    score  = log2(e) (product + bias - slope |p - k|),  -inf where the mask forbids
    weight = P kept / (1 - p)                           with dropout

A mask or bias is read where it lies, by its strides: 0 where it broadcasts. Sinks are no term of a score, but one more
score of each row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import triton_dropout
from ..triton_dropout import halves, kept
from . import triton_score_mod
from .triton_shared import LOG2_E

MOST_NEGATIVE = tl.constexpr(-3.4028234663852886e38)  # of float32


class Terms(NamedTuple):
    """A kernel's argument: what one call adds to the scores, None for what it does not.

    All in one tuple: Triton before 3.7 forgets inside a loop the constants of a tuple in a tuple.
    """

    mask: object  # (batch, heads, query length, key length)
    mask_batch: int | None  # strides
    mask_head: int | None
    mask_row: int | None
    mask_key: int | None
    bias: object  # as the mask
    bias_batch: int | None
    bias_head: int | None
    bias_row: int | None
    bias_key: int | None
    slopes: object  # (heads,) or (batch, heads), dense
    slopes_batch: int
    sinks: object  # (heads,), dense
    hashes: object  # (batch, heads, query length), dense: each row's number, which decides what dropout keeps
    hash_batch: int | None  # strides
    hash_head: int | None
    drop_threshold: int | None
    drop_scale: float | None  # 1 / (1 - p)
    modify: object = None  # what becomes of a score, and that with its derivative (triton_score_mod.py)
    differentiate: object = None
    table0: object = None  # what they look up, dense
    table1: object = None
    table2: object = None
    table3: object = None


class Places(NamedTuple):
    """Where the terms of a tile's rows lie; each member spreads over the tile's keys.

    Of a term that a call does not have it holds a 0 that nobody reads: before Triton 3.7 a function cannot return None
    in a tuple.
    """

    mask: object
    bias: object
    slope: object
    position: object
    low: object
    high: object
    batch: object  # numbers in the tensors
    head: object
    index: object
    first_key: object


def _strides(tensor):
    """Of a mask or bias, in which a size of 1 broadcasts."""
    if tensor is None:
        return (None,) * 4
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _dropping(query, seed, p):
    """The members of Terms that are dropout's."""
    if p == 0.0:
        return (None,) * 5
    hashes = triton_dropout.hashes(seed, *query.shape[:3])
    return hashes, *hashes.stride()[:2], *triton_dropout.threshold_and_scale(p)


def terms(
    query, mask=None, bias=None, alibi_slopes=None, sinks=None, dropout_seed=None, dropout_p=0.0,
    score_program=None, score_tensors=None,
):  # fmt: skip
    """The kernels' argument for a mask and bias of four dimensions, slopes ([batch,] heads) and sinks (heads,).

    With dropout it launches the kernel that hashes query's rows.
    """
    slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    slopes_batch = slopes.shape[1] if slopes is not None and slopes.dim() == 2 else 0
    sinks = None if sinks is None else sinks.contiguous()
    dropping = _dropping(query, dropout_seed, dropout_p)
    made = Terms(mask, *_strides(mask), bias, *_strides(bias), slopes, slopes_batch, sinks, *dropping)
    if score_program is None:
        return made
    modify, differentiate = triton_score_mod.functions(score_program)
    tables = dict(zip(triton_score_mod.TABLES, map(_single, score_tensors or ()), strict=False))
    return made._replace(modify=modify, differentiate=differentiate, **tables)


def _single(table):
    return table.to(torch.float32 if table.is_floating_point() else torch.int32).contiguous()


WIDE = 16  # elements, and bytes of an address, whose multiples the compiler knows


def _loads_wide(tensor) -> bool:
    *steps, key_step = _strides(tensor)
    return key_step == 1 and all(step % WIDE == 0 for step in steps) and tensor.data_ptr() % WIDE == 0


def crowding(terms, bounds) -> int:
    """How far a mask or bias crowds a tile's registers: 1 where one can be loaded 16 bytes at once, else 2.

    Dropout, which hashes a column and its row for each weight, takes as much as a mask that can. Of what score_mod
    takes nothing is known.
    """
    if terms.modify is not None:
        return 2
    read = [tensor for tensor in (terms.mask, terms.bias) if tensor is not None]
    if not read:
        return 0 if terms.hashes is None else 1
    wide = len(read) == 1 and bounds.key_starts is None and _loads_wide(read[0])
    return 1 if wide and terms.hashes is None else 2


@triton.jit
def in_base_2(term):
    """A finite term stays finite, as in plain softmax: rows whose keys all have the most negative one see all."""
    term = term.to(tl.float32)
    return tl.maximum(tl.where(term == float("-inf"), term, MOST_NEGATIVE), term * LOG2_E)


@triton.jit
def _rows(pointer, batch_step, head_step, row_step, key_step, batch, head, index, key):
    start = pointer + tl.cast(batch, tl.int64) * batch_step + tl.cast(key, tl.int64) * key_step
    return start + head.to(tl.int64) * head_step + index.to(tl.int64) * row_step


@triton.jit
def places(terms, batch, head, index, first_key, position):
    """Of rows of any shape that spreads over keys: their heads, and their indices and positions, which may differ."""
    mask, bias, slope, low, high = 0, 0, 0, 0, 0
    if terms.mask is not None:
        steps = terms.mask_batch, terms.mask_head, terms.mask_row, terms.mask_key
        mask = _rows(terms.mask, *steps, batch, head, index, first_key)
    if terms.bias is not None:
        steps = terms.bias_batch, terms.bias_head, terms.bias_row, terms.bias_key
        bias = _rows(terms.bias, *steps, batch, head, index, first_key)
    if terms.slopes is not None:
        slope = tl.load(terms.slopes + batch * terms.slopes_batch + head).to(tl.float32) * LOG2_E
    if terms.hashes is not None:
        of_row = _rows(terms.hashes, terms.hash_batch, terms.hash_head, 1, 0, batch, head, index, 0)
        low, high = halves(tl.load(of_row), first_key)
    return Places(mask, bias, slope, position, low, high, batch, head, index, first_key)


@triton.jit
def places_of_tile(terms, row, batch, chosen, span, GROUP: tl.constexpr):
    """Of a tile's (position, head) rows; those behind the last one read the last one's terms, or the one's before.

    span: the sequence's (query start, query length, key start, key length).
    """
    index = tl.maximum(span[0] + tl.minimum(row // GROUP, span[1] - 1), 0)
    return places(terms, batch, chosen * GROUP + row % GROUP, index, span[2], row // GROUP + span[3] - span[1])


@triton.jit
def _load(rows, keys, step, inside):
    at = rows + keys.to(tl.int64) * step
    return tl.load(at) if inside is None else tl.load(at, mask=inside, other=0)


@triton.jit
def biased(score, terms, places, keys, inside):
    """The score, in units of log2, with what is added to it. inside: None where all keys are."""
    if terms.bias is not None:
        score += in_base_2(_load(places.bias, keys, terms.bias_key, inside))
    if terms.slopes is not None:
        score -= places.slope * tl.abs(keys - places.position).to(tl.float32)
    return score


@triton.jit
def _or_nan(score):
    """In units of log2; a maximum would make a number of NaN."""
    return tl.where(score != score, score, in_base_2(score))


@triton.jit
def _score_places(places, keys):
    """Numbers of batch entry, head, query and key in the tensors, each of two dimensions."""
    zero = tl.zeros([1, 1], tl.int32)
    first_key = tl.cast(places.first_key, tl.int32)
    return zero + tl.cast(places.batch, tl.int32), zero + places.head, zero + places.index, first_key + keys


@triton.jit
def modified(score, terms, places, keys):
    """What score_mod makes of a score, in units of log2."""
    batch, head, index, key = _score_places(places, keys)
    tables = terms.table0, terms.table1, terms.table2, terms.table3
    return _or_nan(terms.modify(score, batch, head, index, key, *tables))


@triton.jit
def modified_and_slope(score, terms, places, keys):
    """The same, and its derivative with respect to the score."""
    batch, head, index, key = _score_places(places, keys)
    tables = terms.table0, terms.table1, terms.table2, terms.table3
    score, slope = terms.differentiate(score, batch, head, index, key, *tables)
    return _or_nan(score), slope


@triton.jit
def unmasked(terms, places, keys, inside):
    """Where the boolean mask lets a row look at a key."""
    return _load(places.mask, keys, terms.mask_key, inside) != 0


@triton.jit
def dropped(weights, terms, places, keys):
    """The weights that dropout keeps, not yet multiplied by 1 / (1 - p), and zeros for the others."""
    if terms.hashes is not None:
        weights = tl.where(kept(places.low, places.high, keys, terms.drop_threshold), weights, 0.0)
    return weights


@triton.jit
def d_probability(d_weight, terms, places, keys):
    """The gradient of a probability, of which dropout makes a weight.

    A product last, so that what is subtracted from it is subtracted before rounding, in one instruction.
    """
    if terms.hashes is not None:
        d_weight *= tl.where(kept(places.low, places.high, keys, terms.drop_threshold), terms.drop_scale, 0.0)
    return d_weight


@triton.jit
def sink_of(terms, row, chosen, GROUP: tl.constexpr):
    """Each row's sink, in base 2."""
    return in_base_2(tl.load(terms.sinks + chosen * GROUP + row % GROUP))
