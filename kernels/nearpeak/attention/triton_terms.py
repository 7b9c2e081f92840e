"""What attention's Triton kernels add to the scores: bias, ALiBi and a boolean mask, each of which vanishes when off.

    score = log2(e) (product + bias - slope |p - k|),  -inf where the mask forbids

A mask or bias is read where it lies, by its strides: 0 where it broadcasts. Sinks are no term of a score, but one more
score of each row.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .triton_shared import LOG2_E

MOST_NEGATIVE = tl.constexpr(-3.4028234663852886e38)  # of float32


class Pairs(NamedTuple):
    """A mask or bias of (batch, heads, query length, key length), and its strides."""

    pointer: object
    batch: int
    head: int
    row: int
    key: int


class Terms(NamedTuple):
    """A kernel's argument: what one call adds to the scores, None for what it does not."""

    mask: Pairs | None
    bias: Pairs | None
    slopes: object  # (heads,) or (batch, heads), dense
    slopes_batch: int
    sinks: object  # (heads,), dense


class Places(NamedTuple):
    """Where the terms of a tile's rows lie; each member spreads over the tile's keys."""

    mask: object
    mask_key: object
    bias: object
    bias_key: object
    slope: object
    position: object


def pairs(tensor):
    """A tensor as a kernel's argument; a size of 1 broadcasts."""
    if tensor is None:
        return None
    strides = (0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return Pairs(tensor, *strides)


def terms(mask=None, bias=None, alibi_slopes=None, sinks=None):
    slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    slopes_batch = slopes.shape[1] if slopes is not None and slopes.dim() == 2 else 0
    return Terms(pairs(mask), pairs(bias), slopes, slopes_batch, None if sinks is None else sinks.contiguous())


WIDE = 16  # elements, and bytes of an address, whose multiples the compiler knows


def _loads_wide(pairs) -> bool:
    aligned = all(stride % WIDE == 0 for stride in pairs[1:4]) and pairs.pointer.data_ptr() % WIDE == 0
    return aligned and pairs.key == 1


def crowding(terms, bounds) -> int:
    """How far a mask or bias crowds a tile's registers: 1 where one can be loaded 16 bytes at once, else 2."""
    read = [pairs for pairs in (terms.mask, terms.bias) if pairs is not None]
    if len(read) == 1 and bounds.key_starts is None and _loads_wide(read[0]):
        return 1
    return 2 if read else 0


@triton.jit
def in_base_2(term):
    """A finite term stays finite, as in plain softmax: rows whose keys all have the most negative one see all."""
    term = term.to(tl.float32)
    return tl.maximum(tl.where(term == float("-inf"), term, MOST_NEGATIVE), term * LOG2_E)


@triton.jit
def _rows_of(pairs, batch, head, index, key):
    start = pairs.pointer + tl.cast(batch, tl.int64) * pairs.batch + tl.cast(key, tl.int64) * pairs.key
    return start + head.to(tl.int64) * pairs.head + index.to(tl.int64) * pairs.row


@triton.jit
def places(terms, batch, head, index, first_key, position):
    """Of rows of any shape that spreads over keys: their heads, and their indices and positions, which may differ."""
    mask, mask_key, bias, bias_key, slope = None, None, None, None, None
    if terms.mask is not None:
        mask, mask_key = _rows_of(terms.mask, batch, head, index, first_key), terms.mask.key
    if terms.bias is not None:
        bias, bias_key = _rows_of(terms.bias, batch, head, index, first_key), terms.bias.key
    if terms.slopes is not None:
        slope = tl.load(terms.slopes + batch * terms.slopes_batch + head).to(tl.float32) * LOG2_E
    return Places(mask, mask_key, bias, bias_key, slope, position)


@triton.jit
def places_of_tile(terms, row, batch, chosen, span, GROUP: tl.constexpr):
    """Of a tile's (position, head) rows; those behind the last one read the last one's terms.

    span: the sequence's (query start, query length, key start, key length).
    """
    index = span[0] + tl.maximum(tl.minimum(row // GROUP, span[1] - 1), 0)
    return places(terms, batch, chosen * GROUP + row % GROUP, index, span[2], row // GROUP + span[3] - span[1])


@triton.jit
def _load(rows, keys, step, inside):
    at = rows + keys.to(tl.int64) * step
    return tl.load(at) if inside is None else tl.load(at, mask=inside, other=0)


@triton.jit
def biased(score, places, keys, inside):
    """The score, in units of log2, with what is added to it. inside: None where all keys are."""
    if places.bias is not None:
        score += in_base_2(_load(places.bias, keys, places.bias_key, inside))
    if places.slope is not None:
        score -= places.slope * tl.abs(keys - places.position).to(tl.float32)
    return score


@triton.jit
def unmasked(places, keys, inside):
    """Where the boolean mask lets a row look at a key."""
    return _load(places.mask, keys, places.mask_key, inside) != 0


@triton.jit
def sink_of(terms, row, chosen, GROUP: tl.constexpr):
    """Each row's sink, in base 2."""
    return in_base_2(tl.load(terms.sinks + chosen * GROUP + row % GROUP))
