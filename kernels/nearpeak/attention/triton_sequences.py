"""Which sequence of a packed batch a program of attention's Triton kernels serves, and which keys a batch entry has.

The host does not know the sequences' lengths, and does not wait for the GPU to tell it. So sequence i gets the tiles
from start_i // tile + i on: as many as it needs, for ceil((end - start) / tile) <= end // tile - start // tile + 1. At
most one tile a sequence is empty. A program finds its sequence by bisection.

Bounds that do not fit cannot be named without waiting: they are clamped to what there is, so that nothing else is read.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Bounds(NamedTuple):
    """A kernel's argument: `attention`'s arguments of the same names, None for what is not given."""

    query_starts: object
    key_starts: object
    key_ends: object
    sequences: int  # packed ones, or 0
    steps: int  # of the bisection


def bounds(query, query_starts=None, key_starts=None, key_ends=None):
    """The kernels' argument for (sequences + 1,) starts and (sequences,) or (batch,) ends, None where not given."""
    _check(query, query_starts, key_starts, key_ends)
    sequences = 0 if query_starts is None else query_starts.numel() - 1
    dense = (None if t is None else t.contiguous() for t in (query_starts, key_starts, key_ends))
    return Bounds(*dense, sequences, sequences.bit_length())


def _check(query, query_starts, key_starts, key_ends):
    """What can be told of bounds without reading them."""
    packed = query_starts is not None
    count = query_starts.numel() - 1 if packed else query.shape[0]
    if packed and (query.shape[0] != 1 or count < 0):
        raise ValueError(f"query_starts must hold a number per sequence and one more, in a batch of 1, not {count + 1}")
    sizes = (key_starts, count + packed), (key_ends, count)
    if not all(tensor is None or tensor.numel() == size for tensor, size in sizes):
        raise ValueError(f"key_starts and key_ends must fit {count} sequences")


def tiles(bounds, extent, tile):
    """How many tiles a head's rows or keys take."""
    return extent // tile + bounds.sequences if bounds.sequences else triton.cdiv(extent, tile)


def shares_keys(bounds) -> bool:
    """Whether packed sequences may have keys in common."""
    return bounds.query_starts is not None and bounds.key_ends is not None


def key_blocks(bounds, key_length, block):
    """How many blocks a head's keys take: in place, not sequence by sequence, where sequences may share them."""
    return triton.cdiv(key_length, block) if bounds.key_ends is not None else tiles(bounds, key_length, block)


@triton.jit
def tiles_of(bounds, extent, TILE: tl.constexpr):
    """As `tiles`, in a kernel."""
    if bounds.query_starts is not None:
        return extent // TILE + bounds.sequences
    else:
        return tl.cdiv(extent, TILE)


@triton.jit
def key_blocks_of(bounds, key_length, BLOCK: tl.constexpr):
    """As `key_blocks`, in a kernel."""
    if bounds.key_ends is not None:
        return tl.cdiv(key_length, BLOCK)
    else:
        return tiles_of(bounds, key_length, BLOCK)


@triton.jit
def _clamped(pointer, index, length):
    return tl.minimum(tl.maximum(tl.load(pointer + index).to(tl.int32), 0), length)


@triton.jit
def _span_of(bounds, sequence, query_length, key_length):
    """(query start, query length, key start, key length) of a packed sequence, or of a batch entry."""
    query_start, query_end, key_start, key_end = 0, query_length, 0, key_length
    if bounds.key_starts is not None:
        key_start = _clamped(bounds.key_starts, sequence, key_length)
    if bounds.key_ends is not None:
        key_end = _clamped(bounds.key_ends, sequence, key_length)
    elif bounds.query_starts is not None:
        key_end = _clamped(bounds.key_starts, sequence + 1, key_length)
    if bounds.key_starts is not None or bounds.key_ends is not None:
        key_length = tl.maximum(key_end - key_start, 0)
    if bounds.query_starts is not None:
        query_start = _clamped(bounds.query_starts, sequence, query_length)
        query_end = _clamped(bounds.query_starts, sequence + 1, query_length)
        query_length = tl.maximum(query_end - query_start, 0)
    return query_start, query_length, key_start, key_length


@triton.jit
def _first_tile(starts, sequence, unit, TILE: tl.constexpr):
    return tl.load(starts + sequence).to(tl.int32) * unit // TILE + sequence


@triton.jit
def _find(bounds, starts, tile, unit, TILE: tl.constexpr):
    """The packed sequence that has this tile, and the tile's place in it. starts: each of `unit` rows."""
    low, high = 0 * tile, 0 * tile + bounds.sequences - 1
    for _ in range(bounds.steps):
        middle = (low + high + 1) // 2
        reached = _first_tile(starts, middle, unit, TILE) <= tile
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low, tile - _first_tile(starts, low, unit, TILE)


@triton.jit
def row_tile(bounds, batch, tile, query_length, key_length, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile's place among its sequence's rows, and the sequence's span."""
    sequence = batch
    if bounds.query_starts is not None:
        sequence, tile = _find(bounds, bounds.query_starts, tile, GROUP, BLOCK_M)
    return tile, _span_of(bounds, sequence, query_length, key_length)


@triton.jit
def key_block(bounds, batch, block, query_length, key_length, BLOCK_N: tl.constexpr):
    """A block's place among its sequence's keys, and the sequence's span."""
    sequence = batch
    if bounds.query_starts is not None:
        sequence, block = _find(bounds, bounds.key_starts, block, 1, BLOCK_N)
    return block, _span_of(bounds, sequence, query_length, key_length)


@triton.jit
def span_of_sharer(bounds, sequence, first_key, query_length, key_length, BLOCK_N: tl.constexpr):
    """The span of a packed sequence, without queries if it has no key of the block that begins with first_key."""
    query_start, queries, key_start, keys = _span_of(bounds, sequence, query_length, key_length)
    apart = (first_key >= key_start + keys) | (first_key + BLOCK_N <= key_start)
    return query_start, tl.where(apart, 0, queries), key_start, keys


@triton.jit
def spans_of_rows(bounds, batch, index, query_length, key_length):
    """The span of each row's sequence, for rows that may belong to several."""
    sequence = batch
    if bounds.query_starts is not None:
        low, high = 0 * index, 0 * index + bounds.sequences - 1
        for _ in range(bounds.steps):
            middle = (low + high + 1) // 2
            reached = tl.load(bounds.query_starts + middle).to(tl.int32) <= index
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle - 1)
        sequence = low
    return _span_of(bounds, sequence, query_length, key_length)
