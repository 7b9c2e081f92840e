"""Which tiles attention's Triton kernel takes on which GPU, and over how many programs keys are split.

Chosen from the compiled machine code of each target, not from timings: the largest tiles that spill no register with
any option and fit into shared memory. tests/test_triton_compile.py holds the table to that.
"""

from typing import NamedTuple

import triton


class Tile(NamedTuple):
    """What one program takes at once, and with how many warps."""

    rows: int  # (query position, head) pairs
    keys: int
    warps: int
    stages: int  # key and value blocks in flight


# Where products read their operands from shared memory (wgmma on sm_90, tcgen05 on sm_100), a thread keeps registers
# for larger tiles; where they pass through registers (mma), blocks of keys must be smaller. Keys: bytes of an element,
# then the widest head_dim.
FROM_SHARED_MEMORY = {
    2: {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    4: {64: Tile(64, 32, 8, 2), 128: Tile(32, 16, 8, 2), 256: Tile(64, 16, 8, 2)},
}
THROUGH_REGISTERS = {
    2: {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
    4: {64: Tile(64, 16, 8, 2), 128: Tile(32, 16, 8, 2), 256: Tile(32, 16, 8, 2)},
}
AMD = {
    2: {64: Tile(128, 64, 4, 2), 128: Tile(128, 32, 4, 2), 256: Tile(64, 32, 8, 2)},
    4: {64: Tile(64, 32, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(64, 16, 8, 2)},
}
# A left window adds a third loop, and its registers: these rows of THROUGH_REGISTERS would spill.
THROUGH_REGISTERS_WINDOWED = {2: {128: Tile(128, 32, 8, 3)}, 4: {64: Tile(64, 32, 8, 2), 256: Tile(16, 16, 8, 2)}}

# Few rows, as in decoding, whatever the GPU: the smallest tile that matrix instructions take.
FEW_ROWS = 16
FEW = {
    2: {64: Tile(FEW_ROWS, 64, 4, 3), 128: Tile(FEW_ROWS, 32, 4, 4), 256: Tile(FEW_ROWS, 32, 4, 3)},
    4: {64: Tile(FEW_ROWS, 32, 4, 3), 128: Tile(FEW_ROWS, 16, 4, 2), 256: Tile(FEW_ROWS, 16, 4, 2)},
}


# Wider ones take the sum of products over parts of head_dim; and each program owns a part of value's.
WIDEST, PART_OF_HEAD_DIM, PART_OF_VALUE_DIM = 256, 64, 256
WIDE_SM_90 = {2: Tile(64, 32, 8, 2), 4: Tile(16, 16, 8, 1)}
WIDE_SM_100 = {2: Tile(64, 16, 8, 2), 4: Tile(16, 16, 8, 1)}
WIDE_THROUGH_REGISTERS = {2: Tile(32, 32, 8, 2), 4: Tile(16, 16, 8, 1)}
WIDE_AMD = {2: Tile(64, 16, 8, 2), 4: Tile(32, 16, 8, 1)}
FEW_WIDE = {2: Tile(FEW_ROWS, 32, 4, 2), 4: Tile(FEW_ROWS, 16, 8, 1)}


def padded(head_dim: int) -> int:
    """Elements that a row takes in a tile: a power of two that matrix instructions take."""
    return max(16, triton.next_power_of_2(head_dim))


def part_of_head_dim(head_dim: int) -> int:
    """Elements of a row that one product takes."""
    return padded(head_dim) if head_dim <= WIDEST else PART_OF_HEAD_DIM


def part_of_value_dim(value_dim: int) -> int:
    """Elements of a row of out that a program owns."""
    return padded(value_dim) if value_dim <= WIDEST else PART_OF_VALUE_DIM


def _smaller(tile: Tile, crowding: int, itemsize: int, architecture: int | str) -> Tile:
    """Beside a mask or bias, whose addresses and elements take registers: see triton_terms.crowding."""
    if crowding == 0:
        return tile
    if crowding == 1 and itemsize == 2:
        return tile._replace(keys=max(16, tile.keys // 2))
    from_shared_memory = isinstance(architecture, int) and 90 <= architecture < 120
    keys = tile.keys // (2 if crowding == 1 or from_shared_memory else 4)
    return tile._replace(rows=max(16, tile.rows // 2), keys=max(16, keys), stages=min(2, tile.stages))


def tile_sizes(
    rows: int, head_dim: int, itemsize: int, architecture: int | str, windowed: bool, crowding: int = 0
) -> Tile:
    """What one program takes at once of `rows` (query position, head) pairs."""
    tile = _tile_sizes(rows, head_dim, itemsize, architecture, windowed)
    return _smaller(tile, crowding, itemsize, architecture)


def _tile_sizes(rows, head_dim, itemsize, architecture, windowed):
    width = max(64, padded(head_dim))
    if rows <= FEW_ROWS:
        return FEW_WIDE[itemsize] if width > WIDEST else FEW[itemsize][width]
    if width > WIDEST:
        return _of_wide_rows(architecture)[itemsize]
    if isinstance(architecture, str):
        return AMD[itemsize][width]
    if 90 <= architecture < 120:
        return FROM_SHARED_MEMORY[itemsize][width]
    if windowed and width in THROUGH_REGISTERS_WINDOWED.get(itemsize, {}):
        return THROUGH_REGISTERS_WINDOWED[itemsize][width]
    return THROUGH_REGISTERS[itemsize][width]


def _of_wide_rows(architecture):
    if isinstance(architecture, str):
        return WIDE_AMD
    if 90 <= architecture < 120:
        return WIDE_SM_90 if architecture < 100 else WIDE_SM_100
    return WIDE_THROUGH_REGISTERS


# For the kernel that makes dQ, and for the one that makes dK and dV: chosen as above. An AMD program's loads pass
# through registers whatever its stages, so that one leaves the most to the tile.
BACKWARD_SM_90 = {
    2: {
        64: (Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        128: (Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        256: (Tile(128, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    4: {
        64: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
        128: (Tile(32, 16, 8, 1), Tile(16, 32, 8, 2)),
        256: (Tile(16, 16, 8, 2), Tile(16, 32, 8, 1)),
    },
}
BACKWARD_SM_100 = {
    2: {
        64: (Tile(128, 32, 8, 3), Tile(64, 128, 8, 3)),
        128: (Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        256: (Tile(128, 32, 8, 2), Tile(32, 64, 8, 2)),
    },
    4: BACKWARD_SM_90[4],
}
BACKWARD_THROUGH_REGISTERS = {
    2: {
        64: (Tile(128, 64, 8, 3), Tile(32, 128, 8, 3)),
        128: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: (Tile(64, 32, 8, 1), Tile(32, 32, 8, 2)),
    },
    4: {
        64: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
        128: (Tile(32, 16, 4, 1), Tile(16, 64, 8, 2)),
        256: (Tile(16, 16, 8, 2), Tile(16, 32, 8, 1)),
    },
}
BACKWARD_AMD = {
    2: {
        64: (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1)),
        128: (Tile(64, 64, 4, 1), Tile(32, 64, 4, 1)),
        256: (Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
    },
    4: {
        64: (Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
        128: (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        256: (Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
    },
}
PREPARE_ROWS, PREPARE_WARPS = 16, 1  # of the kernel before them, which only waits for memory

# Of the kernel of the bias's gradient, which keeps no sum as wide as head_dim.
BIAS_GRADIENT = {
    2: {64: Tile(32, 64, 8, 1), 128: Tile(32, 64, 8, 1), 256: Tile(32, 32, 8, 1)},
    4: {64: Tile(32, 32, 8, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
}
BIAS_GRADIENT_AMD = {
    2: {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
    4: {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
}


def backward_tiles(head_dim: int, itemsize: int, architecture: int | str, crowding: int = 0) -> tuple[Tile, Tile]:
    """What one program takes at once: of the kernel that makes dQ, and of the one that makes dK and dV."""
    query_tile, key_tile = _backward_tiles(head_dim, itemsize, architecture)
    return _smaller(query_tile, crowding, itemsize, architecture), _smaller(key_tile, crowding, itemsize, architecture)


def _backward_tiles(head_dim, itemsize, architecture):
    width = max(64, padded(head_dim))
    if isinstance(architecture, str):
        table = BACKWARD_AMD
    elif 90 <= architecture < 120:
        table = BACKWARD_SM_90 if architecture < 100 else BACKWARD_SM_100
    else:
        table = BACKWARD_THROUGH_REGISTERS
    return table[itemsize][width]


def bias_gradient_tile(head_dim: int, itemsize: int, architecture: int | str) -> Tile:
    """What one program of the kernel that makes dbias takes at once; rows are positions of one head."""
    table = BIAS_GRADIENT_AMD if isinstance(architecture, str) else BIAS_GRADIENT
    return table[itemsize][max(64, padded(head_dim))]


MOST_SPLITS = 64
KEYS_A_SPLIT = 256  # fewer are not worth a merge
PROGRAMS_A_PROCESSOR = 2  # that a split aims at


def splits(programs: int, keys: int, processors: int) -> int:
    """Programs that share the keys of one row tile: more than one where the tiles alone leave processors idle."""
    if programs >= processors:
        return 1
    return max(1, min(PROGRAMS_A_PROCESSOR * processors // programs, keys // KEYS_A_SPLIT, MOST_SPLITS))
