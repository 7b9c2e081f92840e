"""Which elements dropout keeps, in the Triton kernels: dropout.py, which defines it, bit for bit.

Per row one number of 64 bits is made, by a kernel of its own, so that no loop of another kernel makes it again: its
four products of 64 bits take 60 instructions. Per element the row's number is mixed with the column in 32 bits, in
eleven instructions.
"""

import torch
import triton
import triton.language as tl

from . import dropout

BLOCK = 256  # rows that one program hashes
WARPS = 4


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["rows", "length"])
def hash_rows(seed_ptr, hash_ptr, rows, length, BLOCK: tl.constexpr):
    """The number of each row, ordered as (batch entry, head, position). length: positions of a head."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    of_seed = _mixed(tl.load(seed_ptr).to(tl.uint64, bitcast=True))
    of_head = _mixed(of_seed + (row // length).to(tl.uint64))
    of_row = _mixed(of_head + (row % length).to(tl.uint64))
    tl.store(hash_ptr + row, of_row.to(tl.int64, bitcast=True), mask=row < rows)


@triton.jit
def halves(of_row, first_key):
    """The two numbers that each element of a row is mixed with. first_key: where columns are counted from."""
    low, high = of_row.to(tl.uint32), (of_row >> 32).to(tl.uint32)
    return low + tl.cast(first_key, tl.uint32), high


@triton.jit
def kept(low, high, column, threshold):
    """Whether each element is kept; threshold: a number of 32 bits without sign, whatever the type says."""
    x = column.to(tl.uint32) + low
    x = (x ^ (x >> 16)) * 0x21F0AAAD ^ high
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return (x ^ (x >> 15)) >= tl.cast(threshold, tl.uint32)


def hashes(seed, *shape):
    """Each row's number, of `shape`, (heads of all batch entries ..., rows), on seed's device."""
    numbers = torch.empty(shape, dtype=torch.int64, device=seed.device)
    hash_rows[(triton.cdiv(numbers.numel(), BLOCK),)](
        seed, numbers, numbers.numel(), shape[-1], BLOCK=BLOCK, num_warps=WARPS
    )
    return numbers


def threshold_and_scale(p):
    """What kernels take for the chance to be dropped, and what they multiply the other elements by."""
    # As a number of 32 bits with sign: kernels would be compiled once more for numbers that need more.
    return (dropout.threshold(p) + 2**31) % 2**32 - 2**31, 1.0 / (1.0 - p)
