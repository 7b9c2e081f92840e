"""GGUF's quantised matrices (llama.cpp's) as they lie in the file, and what their bytes stand for.

    Q4_0    32 weights,  18 bytes: scale; 4 bits a code, i and i + 16 in a byte     weight = scale (code - 8)
    Q5_0    32 weights,  22 bytes: scale; 32 fifth bits; 4 bits a code              weight = scale (code - 16)
    Q8_0    32 weights,  34 bytes: scale; codes with a sign                         weight = scale code
    Q4_K   256 weights, 144 bytes: scale; minimum; 6 bits s and m per 32; 4 bits    weight = scale s code - minimum m
    Q5_K   256 weights, 176 bytes: the same, with fifth bits before the others      weight = scale s code - minimum m
    Q6_K   256 weights, 210 bytes: 4 bits; 2 bits a code; s per 16; scale           weight = scale s (code - 32)

scale and minimum are float16. Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


def _half(blocks, begin, dtype):
    """The float16 number at byte `begin` of every block, (..., 1)."""
    return blocks[..., begin : begin + 2].contiguous().view(torch.float16).to(dtype)


def _halves_of_bytes(codes):
    """(..., n) bytes as (..., 2, n) codes of 4 bits: the low halves, and the high ones."""
    return torch.stack((codes & 15, codes >> 4), dim=-2)


def _shifted(codes, by):
    """codes (..., 1, n) >> by, one for each of `by` numbers, (..., len(by), n)."""
    return codes.unsqueeze(-2) >> torch.tensor(by, dtype=torch.uint8, device=codes.device)[:, None]


def _q4_0(blocks, dtype):
    codes = _halves_of_bytes(blocks[..., 2:]).flatten(-2)
    return _half(blocks, 0, dtype) * (codes.to(dtype) - 8)


def _q5_0(blocks, dtype):
    fifth = (_shifted(blocks[..., 2:6], range(8)) & 1).mT.flatten(-2)
    codes = _halves_of_bytes(blocks[..., 6:]).flatten(-2) | fifth << 4
    return _half(blocks, 0, dtype) * (codes.to(dtype) - 16)


def _q8_0(blocks, dtype):
    return _half(blocks, 0, dtype) * blocks[..., 2:].contiguous().view(torch.int8).to(dtype)


def _six_bits(packed):
    """s and m of eight groups in 12 bytes: the first four lie in 6 bits each, the others in 4 and in 2 left free."""
    first, second, third = packed.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((first & 63, (third & 15) | (first >> 6) << 4), dim=-1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6) << 4), dim=-1)
    return scales, minima


def _with_minima(blocks, codes, dtype):
    """scale s code - minimum m, for codes (..., 8, 32)."""
    scales, minima = (each.to(dtype) for each in _six_bits(blocks[..., 4:16]))
    scales, minima = _half(blocks, 0, dtype) * scales, _half(blocks, 2, dtype) * minima
    return (scales[..., None] * codes.to(dtype) - minima[..., None]).flatten(-2)


def _q4_k(blocks, dtype):
    codes = _halves_of_bytes(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(-3, -2)
    return _with_minima(blocks, codes, dtype)


def _q5_k(blocks, dtype):
    codes = _halves_of_bytes(blocks[..., 48:].unflatten(-1, (4, 32))).flatten(-3, -2)
    fifth = _shifted(blocks[..., 16:48], range(8)) & 1
    return _with_minima(blocks, codes | fifth << 4, dtype)


def _q6_k(blocks, dtype):
    low = _halves_of_bytes(blocks[..., :128].unflatten(-1, (2, 64))).unflatten(-1, (2, 32)).flatten(-3, -2)
    high = _shifted(blocks[..., 128:192].unflatten(-1, (2, 32)), (0, 2, 4, 6)) & 3
    codes = (low | high << 4).flatten(-3).unflatten(-1, (16, 16))
    scales = _half(blocks, 208, dtype) * blocks[..., 192:208].contiguous().view(torch.int8).to(dtype)
    return (scales[..., None] * (codes.to(dtype) - 32)).flatten(-2)


class BlockType(NamedTuple):
    """One of GGUF's types: its number in files, what a block holds, and where its float16 numbers lie."""

    number: int
    weights: int
    bytes: int
    halves: tuple[int, ...]
    dequantized: Callable


TYPES = {
    "Q4_0": BlockType(2, 32, 18, (0,), _q4_0),
    "Q5_0": BlockType(6, 32, 22, (0,), _q5_0),
    "Q8_0": BlockType(8, 32, 34, (0,), _q8_0),
    "Q4_K": BlockType(12, 256, 144, (0, 2), _q4_k),
    "Q5_K": BlockType(13, 256, 176, (0, 2), _q5_k),
    "Q6_K": BlockType(14, 256, 210, (208,), _q6_k),
}
NAMES = {each.number: name for name, each in TYPES.items()}


def dequantized(blocks: torch.Tensor, number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The rows that rows of blocks stand for, (..., weights), in the arithmetic of dtype."""
    kind = TYPES[NAMES[number]]
    return kind.dequantized(blocks.unflatten(-1, (-1, kind.bytes)), dtype).flatten(-2)


def are_finite(blocks: torch.Tensor, number: int) -> bool:
    """Whether no block has an infinity or NaN among its float16 numbers."""
    kind = TYPES[NAMES[number]]
    each = blocks.unflatten(-1, (-1, kind.bytes))
    return all(bool(_half(each, begin, torch.float16).isfinite().all()) for begin in kind.halves)


class GgufWeight(NamedTuple):
    """The weight of a linear layer, or a table of embeddings, in the blocks of a GGUF file.

    blocks: (out_features, bytes of a row) uint8; from `nearpeak.read_gguf`, a view of the mapped file
    kind: "Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K" or "Q6_K"

    >>> weight = nearpeak.read_gguf("model.gguf")["blk.0.ffn_up.weight"]
    >>> print(weight.kind, weight.out_features, weight.in_features, weight.nbytes)
    """

    blocks: torch.Tensor
    kind: str

    @property
    def out_features(self) -> int:
        return self.blocks.shape[0]

    @property
    def in_features(self) -> int:
        return self.blocks.shape[1] // TYPES[self.kind].bytes * TYPES[self.kind].weights

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight, (out_features, in_features), that the blocks stand for."""
        return dequantized(self.blocks, TYPES[self.kind].number).to(dtype)

    def to(self, device: torch.device | str) -> "GgufWeight":
        return GgufWeight(self.blocks.to(device), self.kind)
