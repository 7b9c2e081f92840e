"""Reads GGUF files (llama.cpp's): quantised matrices stay in the file's own blocks, mapped into memory, not copied.

    file    header, metadata, a description of every tensor, padding, the tensors' bytes

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Whatever a file says is held against its size before
it is believed.
"""

import math
import os
import struct
from collections.abc import Collection
from typing import BinaryIO, NamedTuple

import torch

from .gguf_blocks import NAMES, TYPES, GgufWeight, are_finite

VERSIONS = (2, 3)
# The types of metadata values: bytes of each number, and what has a length of its own.
NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
UINT32, STRING, ARRAY = 4, 8, 9
# Types of tensors that are stored as torch stores them.
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
MOST_DIMENSIONS, MOST_NESTED = 4, 8


class _Description(NamedTuple):
    """A tensor of the file; shape: as in PyTorch, outermost first; offset: from the beginning of the tensors' bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    def is_readable(self) -> bool:
        return self.kind in FLOATS or (self.kind in NAMES and len(self.shape) == 2)

    def bytes(self) -> int:
        count = math.prod(self.shape)
        if self.kind in FLOATS:
            return count * FLOATS[self.kind].itemsize
        block = TYPES[NAMES[self.kind]]
        return count // block.weights * block.bytes


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


class GgufHeader(NamedTuple):
    """What a file says before its tensors' bytes: the model's architecture, its tensors, and where the bytes begin."""

    architecture: str
    descriptions: tuple[_Description, ...]
    begin: int


def _header(reader: _Reader) -> GgufHeader:
    if reader.bytes(4) != b"GGUF":
        raise reader.wrong("it does not begin with GGUF")
    version = reader.number()
    if version not in VERSIONS:
        raise reader.wrong(f"version {version}, where 2 and 3 are known")
    tensors, values = reader.number("Q"), reader.number("Q")
    architecture, alignment = "", 32
    for _ in range(values):
        key, kind = reader.string(), reader.number()
        if key == "general.alignment" and kind == UINT32:
            alignment = reader.number()
        elif key == "general.architecture" and kind == STRING:
            architecture = reader.string()
        else:
            reader.skip_value(kind)
    descriptions = tuple(reader.description() for _ in range(tensors))
    if alignment < 1 or alignment & (alignment - 1):
        raise reader.wrong(f"alignment {alignment} is not a power of two")
    begin = (reader.file.tell() + alignment - 1) // alignment * alignment
    return GgufHeader(architecture, descriptions, begin)


def _check_fits(reader: _Reader, found: _Description, begin: int) -> None:
    if found.kind in NAMES:
        block = TYPES[NAMES[found.kind]]
        if 0 in found.shape or found.shape[-1] % block.weights:
            raise reader.wrong(
                f"tensor {found.name!r} of shape {found.shape} has rows of no whole blocks of {block.weights}"
            )
    end = begin + found.offset + found.bytes()
    if end > os.fstat(reader.file.fileno()).st_size:
        raise reader.wrong(f"it ends before tensor {found.name!r} does, at byte {end}")


def _tensor(reader: _Reader, mapped: torch.Tensor, found: _Description, begin: int) -> GgufWeight | torch.Tensor:
    """The tensor's bytes, as a view of the mapped file where torch can view them."""
    stored = mapped[begin + found.offset :][: found.bytes()]
    if found.kind in FLOATS:
        dtype = FLOATS[found.kind]
        stored = stored if stored.storage_offset() % dtype.itemsize == 0 else stored.clone()
        return stored.view(dtype).view(found.shape)
    blocks = stored.view(found.shape[0], -1)
    if not are_finite(blocks, found.kind):
        raise reader.wrong(f"tensor {found.name!r} has scales that are not finite")
    return GgufWeight(blocks, NAMES[found.kind])


def open_gguf(
    path: str | os.PathLike, names: Collection[str] | None = None
) -> tuple[GgufHeader, dict[str, GgufWeight | torch.Tensor]]:
    """What the file says of itself, and what read_gguf gives."""
    with open(path, "rb") as file:
        reader = _Reader(file, os.fspath(path))
        size = reader.left
        header = _header(reader)
        readable = {each.name: each for each in header.descriptions if each.is_readable()}
        if names is not None:
            for name in names:
                if name not in readable:
                    raise ValueError(f"names: {reader.path} holds no tensor {name!r} of a type that is read")
            readable = {name: readable[name] for name in names}
        for each in readable.values():
            _check_fits(reader, each, header.begin)
        mapped = torch.from_file(reader.path, shared=False, size=size, dtype=torch.uint8) if size else None
        return header, {name: _tensor(reader, mapped, each, header.begin) for name, each in readable.items()}


def read_gguf(path: str | os.PathLike, names: Collection[str] | None = None) -> dict[str, GgufWeight | torch.Tensor]:
    """The tensors of a GGUF file: quantised matrices as weights for `nearpeak.quantized_linear`, others as tensors.

    Both are views of the file, which is mapped into memory: what is read of it is shared by all processes that read it,
    and opening it takes no time. It must not change while they are in use; writing to them does not change it.

    Args:
        path: the file, of version 2 or 3 (little-endian).
        names: of the tensors that are wanted; None for every tensor of float32, float16 or bfloat16 and every matrix
            of Q4_0, Q5_0, Q8_0, Q4_K, Q5_K or Q6_K.

    Returns:
        the tensors by name, shaped as in PyTorch: (out_features, in_features). Their numbers are the file's to the
        bit. (Layouts are the file's too: llama.cpp reorders the rows of some architectures' queries and keys, and
        stores 1 + weight for Gemma's norms; `nearpeak.load_gguf` undoes both.)

    Raises:
        ValueError: no such file format, a file that is cut off or contradicts itself, or a name that it does not hold
        in one of these types. OSError: the file cannot be opened.

    >>> weights = nearpeak.read_gguf("model.gguf")
    >>> layer = nearpeak.nn.GgufLinear(weights["blk.0.ffn_up.weight"])
    """
    return open_gguf(path, names)[1]
