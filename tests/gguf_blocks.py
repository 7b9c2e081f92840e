"""Random blocks of every type of GGUF's, and what they stand for, code by code as the format defines it."""

import struct

import torch
from nearpeak.linear.gguf_blocks import TYPES

K_TYPES = ("Q4_K", "Q5_K", "Q6_K")


def random_blocks(kind, rows, width, seed=0, magnitude=1.0):
    """(rows, bytes) whose float16 numbers make weights of about the given magnitude."""
    block = TYPES[kind]
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, width // block.weights, block.bytes), generator=generator, dtype=torch.uint8)
    largest_code = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128, "Q4_K": 15 * 63, "Q5_K": 31 * 63, "Q6_K": 32 * 128}[kind]
    for begin in block.halves:
        # A minimum takes away what makes the codes' mean zero, more or less.
        each = magnitude / largest_code * (1 if begin != 2 else largest_code / 126)
        halves = each * (0.5 + torch.rand(rows, width // block.weights, 1, generator=generator))
        blocks[..., begin : begin + 2] = halves.half().view(torch.uint8)
    return blocks.flatten(1)


def _half(block, at):
    return struct.unpack("<e", bytes(block[at : at + 2]))[0]


def _signed(byte):
    return byte - 256 if byte > 127 else byte


def _six_bits(block, i):
    """s and m of group i of Q4_K and Q5_K."""
    six = block[4:16]
    if i < 4:
        return six[i] & 63, six[i + 4] & 63
    return (six[i + 4] & 15) + 16 * (six[i - 4] >> 6), (six[i + 4] >> 4) + 16 * (six[i] >> 6)


def _q4_0(block, i):
    code = block[2 + i % 16]
    return _half(block, 0) * ((code & 15 if i < 16 else code >> 4) - 8)


def _q5_0(block, i):
    code, fifth = block[6 + i % 16], int.from_bytes(block[2:6], "little") >> i & 1
    return _half(block, 0) * ((code & 15 if i < 16 else code >> 4) + 16 * fifth - 16)


def _q8_0(block, i):
    return _half(block, 0) * _signed(block[2 + i])


def _q45_k(block, i, codes, fifth):
    group = i // 32
    scale, minimum = _six_bits(block, group)
    code = block[codes + group // 2 * 32 + i % 32] >> (4 * (group % 2)) & 15
    if fifth is not None:
        code += 16 * (block[fifth + i % 32] >> group & 1)
    return _half(block, 0) * scale * code - _half(block, 2) * minimum


def _q4_k(block, i):
    return _q45_k(block, i, 16, None)


def _q5_k(block, i):
    return _q45_k(block, i, 48, 16)


def _q6_k(block, i):
    part, quarter, place = i // 128, i % 128 // 32, i % 32
    low = block[64 * part + 32 * (quarter % 2) + place] >> (4 * (quarter // 2)) & 15
    high = block[128 + 32 * part + place] >> (2 * quarter) & 3
    return _half(block, 208) * _signed(block[192 + i // 16]) * (low + 16 * high - 32)


WEIGHT_OF = {"Q4_0": _q4_0, "Q5_0": _q5_0, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}


def one_by_one(kind, blocks):
    """The weights of rows of blocks, in float64."""
    block, rows = TYPES[kind], []
    for row in blocks.tolist():
        each = [row[at : at + block.bytes] for at in range(0, len(row), block.bytes)]
        rows.append([WEIGHT_OF[kind](part, i) for part in each for i in range(block.weights)])
    return torch.tensor(rows, dtype=torch.float64)
