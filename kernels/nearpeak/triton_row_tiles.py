"""How much of a tensor one program of the norm kernels takes at once, and with how many threads."""

from typing import NamedTuple

import triton

# Widest row, in bytes forward and in elements backward (which keeps float32 sums), that one program holds in registers
# without spilling: read off the machine code of every target. 1024 threads have 64 registers each.
WHOLE_ROW_FORWARD = 65536
WHOLE_ROW_BACKWARD = 8192

# Elements per thread: 2 (16-bit) to 4 (float32) accesses of 16 bytes in flight forward, 1 to 2 of each input backward.
PER_THREAD_FORWARD = 16
PER_THREAD_BACKWARD = 8

MOST_THREADS = 1024
SMALLEST_TILE = 1024  # elements a program takes: narrower rows share a program
WIDE_BLOCK = 8192  # columns that a program takes at once of a row too wide for registers
RESIDENT_THREADS = 1024  # per processor, for kernels whose programs walk over the rows


class Tile(NamedTuple):
    """What one program takes at once."""

    rows: int
    block: int  # columns, a power of two
    threads: int


COLUMNS = Tile(rows=4, block=1024, threads=256)  # of the wide backward's second kernel
REDUCTION = Tile(rows=32, block=32, threads=128)  # narrow blocks: a 4096 wide weight still fills 128 processors


def forward_tile(width: int, itemsize: int) -> Tile:
    """Rows and columns that one program takes at once; block < width means a row in several passes."""
    return _tile(width, WHOLE_ROW_FORWARD // itemsize, PER_THREAD_FORWARD)


def backward_tile(width: int) -> Tile:
    """As `forward_tile`, of the backward kernels."""
    return _tile(width, WHOLE_ROW_BACKWARD, PER_THREAD_BACKWARD)


def row_sums_tile(centred: bool) -> Tile:
    """Of the wide backward's first kernel. LayerNorm's keeps twice the sums: 1024 threads of it spill on sm_120."""
    block = WIDE_BLOCK // 2 if centred else WIDE_BLOCK
    return Tile(1, block, block // PER_THREAD_BACKWARD)


def _tile(width, widest, per_thread):
    if width > widest:
        return Tile(1, WIDE_BLOCK, WIDE_BLOCK // per_thread)
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, SMALLEST_TILE // block)
    return Tile(rows, block, min(MOST_THREADS, rows * block // per_thread))
