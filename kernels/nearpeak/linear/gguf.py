"""Reads quantised matrices of GGUF files (llama.cpp's) as they are: no weight is rounded again.

    file    header, metadata, a description of every tensor, padding, the tensors' bytes
    Q8_0    blocks of 32: scale float16, 32 codes int8;                             weight = scale code
    Q4_0    blocks of 32: scale float16, 16 bytes with code i and i + 16 in each;   weight = scale (code - 8)

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Whatever a file says is held against its size before
it is believed.
"""

import os
import struct
from collections.abc import Collection
from typing import BinaryIO, NamedTuple

import torch

from .weights import CODE_BLOCK, QuantizedWeight

VERSIONS = (2, 3)
# The types of metadata values: bytes of each number, and what has a length of its own.
NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
UINT32, STRING, ARRAY = 4, 8, 9
BITS = {2: 4, 8: 8}  # of the types of tensors that are read: Q4_0, Q8_0
MOST_DIMENSIONS, MOST_NESTED = 4, 8


class _Description(NamedTuple):
    """A tensor of the file; shape: as in PyTorch, outermost first; offset: from the beginning of the tensors' bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    def block_bytes(self) -> int:
        return 2 + CODE_BLOCK * BITS[self.kind] // 8

    def bytes(self) -> int:
        return self.shape[0] * self.shape[1] // CODE_BLOCK * self.block_bytes()


class _Reader:
    """Takes numbers and strings from a file that may end anywhere."""

    def __init__(self, file: BinaryIO, path: str):
        self.file, self.path, self.left = file, path, os.fstat(file.fileno()).st_size

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is no GGUF file that can be read: {what}")

    def bytes(self, count: int) -> bytes:
        if count > self.left:
            raise self.wrong(f"it ends before {count} bytes that it promises at byte {self.file.tell()}")
        self.left -= count
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if count > self.left:
            raise self.wrong(f"it ends before {count} bytes that it promises at byte {self.file.tell()}")
        self.left -= count
        self.file.seek(count, os.SEEK_CUR)

    def number(self, kind: str = "I") -> int:
        return struct.unpack("<" + kind, self.bytes(struct.calcsize("<" + kind)))[0]

    def string(self) -> str:
        try:
            return self.bytes(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise self.wrong(f"a name before byte {self.file.tell()} is not UTF-8") from None

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind in NUMBERS:
            self.skip(NUMBERS[kind])
        elif kind == STRING:
            self.skip(self.number("Q"))
        elif kind == ARRAY and depth < MOST_NESTED:
            inner, count = self.number(), self.number("Q")
            if inner in NUMBERS:
                return self.skip(count * NUMBERS[inner])
            for _ in range(count):
                self.skip_value(inner, depth + 1)
        else:
            raise self.wrong(f"metadata of the unknown type {kind}")

    def description(self) -> _Description:
        name, dimensions = self.string(), self.number()
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.wrong(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return _Description(name, shape, self.number(), self.number("Q"))


def _descriptions(reader: _Reader) -> tuple[list[_Description], int]:
    """What the file says of its tensors, and where their bytes begin."""
    if reader.bytes(4) != b"GGUF":
        raise reader.wrong("it does not begin with GGUF")
    version = reader.number()
    if version not in VERSIONS:
        raise reader.wrong(f"version {version}, where 2 and 3 are known")
    tensors, values, alignment = reader.number("Q"), reader.number("Q"), 32
    for _ in range(values):
        key, kind = reader.string(), reader.number()
        if key == "general.alignment" and kind == UINT32:
            alignment = reader.number()
        else:
            reader.skip_value(kind)
    descriptions = [reader.description() for _ in range(tensors)]
    if alignment < 1 or alignment & (alignment - 1):
        raise reader.wrong(f"alignment {alignment} is not a power of two")
    return descriptions, (reader.file.tell() + alignment - 1) // alignment * alignment


def _weight(reader: _Reader, found: _Description, begin: int) -> QuantizedWeight:
    rows, width = found.shape
    if rows == 0 or width == 0 or width % CODE_BLOCK:
        raise reader.wrong(f"tensor {found.name!r} of shape {found.shape} has rows of no whole blocks of {CODE_BLOCK}")
    end = begin + found.offset + found.bytes()
    if end > os.fstat(reader.file.fileno()).st_size:
        raise reader.wrong(f"it ends before tensor {found.name!r} does, at byte {end}")
    stored = bytearray(found.bytes())
    reader.file.seek(begin + found.offset)
    reader.file.readinto(stored)
    blocks = torch.frombuffer(stored, dtype=torch.uint8).view(rows, width // CODE_BLOCK, found.block_bytes())
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1).float()
    if not scales.isfinite().all():
        raise reader.wrong(f"tensor {found.name!r} has scales that are not finite")
    codes, bits = blocks[..., 2:].flatten(1), BITS[found.kind]
    # Signed codes begin at -128, ours at 0.
    return QuantizedWeight(codes ^ 128 if bits == 8 else codes.contiguous(), scales, None, bits)


def read_gguf(path: str | os.PathLike, names: Collection[str] | None = None) -> dict[str, QuantizedWeight]:
    """The matrices of a GGUF file that are stored as Q8_0 or Q4_0, as weights for `nearpeak.quantized_linear`.

    Args:
        path: the file, of version 2 or 3 (little-endian).
        names: of the tensors that are wanted; None for every matrix of these two types.

    Returns:
        the weights by name, (out_features, in_features), with a scale per 32 input features. Their numbers are the
        file's to the bit. (Layouts are the file's too: llama.cpp reorders the rows of some architectures' queries and
        keys.)

    Raises:
        ValueError: no such file format, a file that is cut off or contradicts itself, or a name that it does not hold
        as a matrix of Q8_0 or Q4_0. OSError: the file cannot be opened.

    >>> weights = nearpeak.read_gguf("model.gguf")
    >>> layers = {name: nearpeak.nn.QuantizedLinear.from_weight(weight) for name, weight in weights.items()}
    """
    with open(path, "rb") as file:
        reader = _Reader(file, os.fspath(path))
        descriptions, begin = _descriptions(reader)
        readable = {each.name: each for each in descriptions if each.kind in BITS and len(each.shape) == 2}
        if names is not None:
            for name in names:
                if name not in readable:
                    raise ValueError(f"names: {reader.path} holds no matrix {name!r} of type Q8_0 or Q4_0")
            readable = {name: readable[name] for name in names}
        return {name: _weight(reader, each, begin) for name, each in readable.items()}
