"""The Triton kernel of linear layers with quantised weights, held to the rule of tests/test_quantized_linear.py."""

import nearpeak
import pytest
import test_linear_epilogue as epilogues
import test_quantized_input as rounding
import test_quantized_linear as quantized
import torch
from draws import assert_as_exact
from inputs import DTYPES
from nearpeak.activations import NAMES
from nearpeak.linear import triton_quantized
from test_quantized_linear import Case

CASES = [
    *(
        Case(rows=(3,), inputs=256, outputs=37, bits=bits, group_size=group_size, symmetric=symmetric)
        for bits in (8, 4)
        for group_size in (32, 128)
        for symmetric in (True, False)
    ),
    Case(rows=(), bias=False),
    Case(rows=(2, 3, 7), inputs=96, group_size=32, bits=4, outputs=5),
    # More than one tile of rows and of columns, and their edges.
    *(Case(rows=(rows,), inputs=64, outputs=outputs) for rows, outputs in ((16, 32), (17, 33), (64, 64), (130, 65))),
]


def judge(case, dtype, draws=2):
    made = quantized.draws_of(case, dtype, draws)
    assert_as_exact(quantized.results(made), quantized.standards_of(made))


@pytest.mark.parametrize("case", CASES, ids=quantized.case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_dequantising_first(dtype, case):
    judge(case, dtype)


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_in_parts(monkeypatch, bits):
    tile = triton_quantized.Tile(16, 16, 32, 4, 1)
    monkeypatch.setitem(triton_quantized.TILES, 4, {None: tile})
    judge(Case(inputs=128, group_size=128, bits=bits, symmetric=False), torch.float32)


@pytest.mark.parametrize("rows", [(2, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("layout", quantized.LAYOUTS)
def test_layouts(layout, rows):
    quantized.test_layouts(None, torch.float32, layout, rows)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_empty(shape):
    quantized.test_empty(None, 4, shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    quantized.test_special_values(None, dtype, 3)


@pytest.mark.parametrize("bad", ["x_width", "codes_dtype", "bias_shape"])
def test_bad_calls_are_named(bad):
    quantized.test_bad_calls_are_named(None, bad)


def test_gradients_reach_x():
    x, weight, bias = quantized.inputs_of(Case(), torch.float32)
    leaf = x.clone().requires_grad_()
    nearpeak.quantized_linear(leaf, weight, bias).sum().backward()
    torch.testing.assert_close(leaf.grad, weight.dequantize().sum(0).expand_as(x))


@pytest.mark.parametrize("kind", ["8", "4 zeros"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_in_8_bits(dtype, kind):
    case = rounding.Case(kind, rows=(3,), inputs=64, outputs=9, group_size=32, residual=True, activation="silu")
    mine = [(rounding.served(*draw),) for draw in rounding.draws_of(case, dtype)]
    assert all(y.dtype is dtype for (y,) in mine)
    assert_as_exact(mine, rounding.standard(case, dtype))


# More than one tile, and what each part of an epilogue is without the others.
EPILOGUES = [
    *(epilogues.Case(rows=(3,), activation=name, bits=8) for name in NAMES),
    epilogues.Case(rows=(17,), outputs=33, activation="silu", bits=4),
    epilogues.Case(rows=(2, 3), activation=None, bits=8, bias=False),
    epilogues.Case(rows=(), residual=False, bits=8),
]


@pytest.mark.parametrize("case", EPILOGUES, ids=epilogues.case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues_and_their_gradients(dtype, case):
    draws = epilogues.draws_of(case, dtype)[:16]
    assert_as_exact(epilogues.results_of(epilogues.served, case, draws), epilogues.standards_of(case, draws))
