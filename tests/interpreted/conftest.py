"""Tests of the Triton kernels in Triton's interpreter; tests/test_triton_interpreter.py runs them in their own process.

The interpreter keeps bfloat16 as bare 16-bit patterns. It multiplies those patterns in tl.dot, and truncates where
every GPU rounds to the nearest value: both are repaired here, for the tests alone.
"""

import nearpeak
import numpy
import pytest
import torch
import triton.language as tl
from nearpeak import backends
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

collect_ignore_glob = [] if backends.TRITON_INTERPRETED else ["test_*.py"]


def _widen(bits):
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def _round(values):
    """float32 to the nearest bfloat16 pattern, halves to the even one; NaN stays NaN."""
    bits = numpy.ascontiguousarray(values).view(numpy.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return numpy.where(numpy.isnan(values), 0x7FC0, rounded).astype(numpy.uint16)


def _cast(original):
    def cast(builder, source, target, *rounding):
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(_widen(source.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(_round(source.data), tl.bfloat16)
        return original(builder, source, target, *rounding)

    return cast


def _dot(original):
    def dot(builder, a, b, accumulator, *options):
        a, b = (TensorHandle(_widen(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return original(builder, a, b, accumulator, *options)

    return dot


@pytest.fixture(autouse=True)
def _repaired_interpreter(monkeypatch):
    for name, repair in (("cast_impl", _cast), ("create_fp_to_fp", _cast), ("create_dot", _dot)):
        monkeypatch.setattr(InterpreterBuilder, name, repair(getattr(InterpreterBuilder, name)))


@pytest.fixture
def rounded_once(monkeypatch):
    """Products of float32 without an order of summation: the interpreter's library sums each part of a product in its
    own order, where a GPU adds up every element in the same. Numbers which are equal there are equal here.
    """

    def dot(builder, a, b, accumulator, *options):
        product = a.data.astype(numpy.float64) @ b.data.astype(numpy.float64)
        return TensorHandle(product.astype(numpy.float32) + accumulator.data, tl.float32)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture(autouse=True)
def _served_by_triton():
    """A call that the Triton kernels do not serve raises, instead of passing by another backend."""
    with nearpeak.use_backend("triton"):
        yield


@pytest.fixture(params=["whole rows", "rows in blocks"])
def blocks(request, monkeypatch):
    """Run a norm's test with rows held in registers, and with rows too wide for that (here: wider than 16 or 32)."""
    from nearpeak import triton_row_tiles
    from nearpeak.norm import triton_backward

    if request.param == "rows in blocks":
        for name, value in (("WHOLE_ROW_FORWARD", 64), ("WHOLE_ROW_BACKWARD", 32), ("WIDE_BLOCK", 32)):
            monkeypatch.setattr(triton_row_tiles, name, value)
        monkeypatch.setattr(triton_backward, "COLUMNS", triton_row_tiles.Tile(rows=8, block=64, threads=128))


@pytest.fixture
def far_apart(tmp_path):
    """Makes random tensors whose last dimension but one strides over more than 2^31 elements of a file of holes."""

    def make(shape, dtype):
        step = 2**31 + 64
        size = step * (shape[-2] - 1) + 2**16
        storage = torch.from_file(str(tmp_path / "holes"), shared=True, size=size, dtype=dtype)
        strides = [shape[-1] * n for n in range(1, len(shape) - 1)]
        return storage.as_strided(shape, (*strides, step, 1)).copy_(torch.randn(shape))

    return make
