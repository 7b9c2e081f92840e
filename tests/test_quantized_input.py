"""Products of quantised weights with x in 8 bits: integers to the last, and their scales as exact as floats."""

import functools
import math
from typing import NamedTuple

import hypothesis.strategies as st
import nearpeak
import pytest
import torch
import torch.nn.functional as F
from draws import DRAWS, assert_as_exact, standards
from gguf_blocks import K_TYPES, random_blocks
from inputs import DTYPES, EXAMPLES, case_name, every_second, for_all, misaligned, padded, randn
from nearpeak.linear import gguf_blocks
from nearpeak.linear.gguf_blocks import TYPES
from nearpeak.linear.input_rounding import GROUP_OF_BLOCKS, codes_and_scales, rounded
from nearpeak.linear.weights import dequantized, pack
from quantized_layers import followed, gradients


class Case(NamedTuple):
    kind: str = "8"  # of the weight: its bits, with zeros where it ends so, or a type of GGUF's
    rows: tuple = (5,)
    inputs: int = 256
    outputs: int = 21
    group_size: int = 64
    bias: bool = True
    activation: str | None = None
    residual: bool = False
    magnitude: float = 1.0
    seed: int = 0


OURS = ("8", "8 zeros", "4", "4 zeros")
KINDS = (*OURS, *TYPES)
ROWS = (1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 33, 40)

CASES = [
    *(Case(kind, rows=(rows,)) for kind in KINDS for rows in (1, 3, 7, 20)),
    *(Case(kind, rows=(rows,), bias=False) for kind in ("8", "4 zeros", "Q6_K") for rows in ROWS),
    *(Case(kind, rows=rows) for kind in ("4", "Q5_0") for rows in ((), (2, 3, 7))),
    *(Case(kind, rows=(rows,), group_size=size) for kind in OURS for rows in (2, 20) for size in (32, 128)),
    *(Case(kind, rows=(rows,), outputs=n) for kind in ("8", "Q4_K") for rows, n in ((1, 1), (3, 16), (20, 97))),
    *(Case(kind, rows=(rows,), inputs=32, group_size=32) for kind in KINDS if kind not in K_TYPES for rows in (1, 20)),
    *(Case("8", rows=(rows,), inputs=inputs, group_size=32) for rows in (1, 20) for inputs in (64, 96, 352, 1120)),
    *(Case(kind, rows=(rows,), activation="silu", residual=True) for kind in ("8 zeros", "Q8_0") for rows in (1, 20)),
    # Long sums, whose rounding shows in float32; more than one chunk of steps, of rows, of columns.
    *(Case(kind, rows=(rows,), inputs=4096, outputs=9) for kind in KINDS for rows in (1, 20)),
    Case("4", rows=(270,), inputs=64, outputs=790),
    Case("Q6_K", rows=(40,), inputs=2304, outputs=400),
    *(Case(rows=(rows,), magnitude=magnitude) for rows in (3, 20) for magnitude in (1e-3, 1e3)),
]  # fmt: skip


def weight_of(kind, outputs, inputs, group_size, seed):
    if kind in TYPES:
        return nearpeak.GgufWeight(random_blocks(kind, outputs, inputs, seed), kind)
    symmetric = not kind.endswith("zeros")
    floats = randn(outputs, inputs, seed=seed) + (0.0 if symmetric else 0.5)
    return nearpeak.quantize_weight(floats, int(kind[0]), group_size, symmetric)


def inputs_of(case, dtype):
    x = randn(*case.rows, case.inputs, dtype=dtype, seed=case.seed, magnitude=case.magnitude)
    weight = weight_of(case.kind, case.outputs, case.inputs, case.group_size, case.seed + 1)
    bias = randn(case.outputs, dtype=dtype, seed=case.seed + 2) if case.bias else None
    residual = randn(*case.rows, case.outputs, dtype=dtype, seed=case.seed + 3) if case.residual else None
    return x, weight, bias, residual, case.activation


def draws_of(case, dtype, count=DRAWS):
    return [inputs_of(case._replace(seed=case.seed + 10 * draw), dtype) for draw in range(count)]


def group_of(weight):
    return GROUP_OF_BLOCKS if isinstance(weight, nearpeak.GgufWeight) else weight.group_size


def rounded_first(x, weight, bias, residual, activation):
    """What users have without a kernel."""
    wide = rounded(x, 8, group_of(weight)).to(x.dtype)
    return followed(F.linear(wide, weight.dequantize(x.dtype), bias), residual, activation)


def wide_weight(weight):
    if isinstance(weight, nearpeak.GgufWeight):
        return gguf_blocks.dequantized(weight.blocks, TYPES[weight.kind].number, torch.float64)
    return dequantized(*weight, torch.float64)


def exact(x, weight, bias, residual, activation):
    codes, scales = codes_and_scales(x.detach().float(), group_of(weight))
    wide = (codes.double() * scales.double()).flatten(-2) + (x - x.detach()).double()
    bias, residual = (None if each is None else each.double() for each in (bias, residual))
    return followed(F.linear(wide, wide_weight(weight), bias), residual, activation)


def served(x, weight, bias=None, residual=None, activation=None):
    return nearpeak.quantized_linear(x, weight, bias, activation=activation, residual=residual, input_bits=8)


def standards_of(draws):
    return standards([[(rounded_first(*draw),) for draw in draws]], [(exact(*draw),) for draw in draws])


@functools.lru_cache(maxsize=2)
def standard(case, dtype):
    return standards_of(draws_of(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_rounding_first(serving, dtype, case):
    mine = [(served(*draw),) for draw in draws_of(case, dtype)]
    assert all(y.dtype is dtype and y.is_contiguous() for (y,) in mine)
    assert_as_exact(mine, standard(case, dtype))


def whole_numbers(kind, outputs, inputs, seed):
    """A weight whose scales are one, and its numbers."""
    random = torch.Generator().manual_seed(seed)
    bits, zeros = int(kind[0]), kind.endswith("zeros")
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8, generator=random)
    middle = torch.randint(0, 2**bits, (outputs, inputs // 32), dtype=torch.uint8, generator=random) if zeros else None
    scales = torch.ones(outputs, inputs // 32)
    weight = nearpeak.QuantizedWeight(pack(codes) if bits == 4 else codes, scales, middle, bits)
    less = 2 ** (bits - 1) if middle is None else middle.repeat_interleave(32, 1).long()
    return weight, codes.long() - less


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", OURS)
def test_integers_are_exact(serving, kind, rows):
    """Groups of x with a 127 have the scale 1: then everything is whole, and below 2^24."""
    random = torch.Generator().manual_seed(rows)
    x = torch.randint(-127, 128, (rows, 160), generator=random)
    x[:, ::32] = torch.where(torch.rand(rows, 5, generator=random) < 0.5, 127, -127)
    weight, numbers = whole_numbers(kind, 37, 160, rows)
    assert torch.equal(served(x.float(), weight), (x @ numbers.mT).float())


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("extreme", [-127, 127])
@pytest.mark.parametrize("kind", OURS)
def test_the_largest_products_do_not_saturate(serving, kind, extreme, rows):
    bits = int(kind[0])
    for code in (0, 2**bits - 1):
        codes = torch.full((9, 64), code, dtype=torch.uint8)
        zeros = torch.zeros(9, 2, dtype=torch.uint8) if kind.endswith("zeros") else None
        weight = nearpeak.QuantizedWeight(pack(codes) if bits == 4 else codes, torch.ones(9, 2), zeros, bits)
        number = code - (2 ** (bits - 1) if zeros is None else 0)
        expected = torch.full((rows, 9), 64.0 * extreme * number)
        assert torch.equal(served(torch.full((rows, 64), float(extreme)), weight), expected)


@pytest.mark.parametrize("rows", [3, 20])
def test_rounds_to_even_as_the_reference_does(serving, rows):
    x = torch.arange(-127, 128, 0.5).repeat(rows, 1)[:, :480].unflatten(1, (-1, 32))
    x[..., 0] = 127.0
    weight, numbers = whole_numbers("8", 11, 480, 0)
    assert torch.equal(served(x.flatten(1), weight), (x.flatten(1).round().long() @ numbers.mT).float())


@pytest.mark.parametrize("kind", ["8", "4 zeros", "Q4_K"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_x_as_it_is(serving, dtype, activation, kind):
    case = Case(kind, rows=(20,), residual=True, activation=activation)
    draws = draws_of(case, dtype)
    grads = [(randn(20, 21, dtype=dtype, seed=draw),) for draw in range(len(draws))]
    plains, exacts = gradients(rounded_first, draws, grads), gradients(exact, draws, grads, double=True)
    assert_as_exact(gradients(served, draws, grads), standards([plains], exacts))


LAYOUTS = {"every_second": every_second, "misaligned": misaligned, "padded": padded}


@pytest.mark.parametrize("rows", [(2, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(serving, dtype, layout, rows):
    x, weight, bias, *others = inputs_of(Case("4 zeros", rows=rows), dtype)
    strided = LAYOUTS[layout]
    parts = weight._replace(**{name: strided(getattr(weight, name)) for name in ("codes", "scales", "zeros")})
    result = served(strided(x), parts, strided(bias), *others)
    assert_as_exact([(result,)], standards_of([(x, weight, bias, *others)]))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (20, 0)], ids=str)
@pytest.mark.parametrize("kind", ["8", "Q8_0"])
def test_empty(serving, kind, shape):
    inputs = inputs_of(Case(kind, rows=shape[:1], outputs=shape[1]), torch.float32)
    assert served(*inputs).shape == shape


@pytest.mark.parametrize("rows", [6, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_special_values(serving, kind, rows):
    x, weight, bias, *_ = inputs_of(Case(kind, rows=(rows,)), torch.float32)
    x[0, 3], x[1, 3], bias[6] = math.inf, math.nan, math.inf
    x[2], x[3], x[4] = 0.0, 1e-37, -0.0
    x[5] *= 1e30
    found = served(x, weight, bias)
    assert found[:2, :6].isnan().all()
    assert torch.equal(found[2:5], bias.expand(3, -1))
    torch.testing.assert_close(found[5:], exact(x, weight, bias, None, None)[5:].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("kind", ["8", "Q6_K"])
def test_threads_change_nothing(serving, kind, dtype, rows):
    if serving == "reference":
        pytest.skip("torch's own products make no such promise")
    inputs = inputs_of(Case(kind, rows=(rows,), inputs=512, outputs=700), dtype)
    first = served(*inputs)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(served(*inputs), first)


def test_float64_is_rounded_in_float64():
    x, weight, bias, *_ = inputs_of(Case("4"), torch.float64)
    codes, scales = codes_and_scales(x, weight.group_size)
    expected = F.linear((codes * scales).flatten(-2), wide_weight(weight), bias)
    torch.testing.assert_close(served(x, weight, bias), expected, rtol=1e-12, atol=1e-12)


def test_codes_are_within_half_a_step():
    x = torch.cat((randn(4, 128), randn(4, 128) * 1e30, randn(4, 128) * 1e-30, torch.zeros(1, 128)))
    codes, scales = codes_and_scales(x, 32)
    assert codes.abs().max() == 127
    assert torch.equal(codes, codes.round())
    wide = codes.double() * scales.double()
    assert ((wide - x.double().unflatten(-1, (-1, 32))).abs() <= scales.double() * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("kind", ["8", "Q8_0"])
def test_under_compile_and_autocast(kind):
    x, weight, bias, *_ = inputs_of(Case(kind), torch.float32)
    compiled = torch.compile(lambda x: served(x, weight, bias), fullgraph=True)
    assert torch.equal(compiled(x), served(x, weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(served(x, weight, bias), served(x.bfloat16(), weight, bias.bfloat16()))


@pytest.mark.parametrize("weight", [weight_of(kind, 3, 256, 64, 0) for kind in ("8", "Q8_0")], ids=["8", "Q8_0"])
@pytest.mark.parametrize("epilogue", [None, "silu"])
def test_refuses_other_bits(serving, weight, epilogue):
    for bits in (4, 16, 0, "8"):
        with pytest.raises((ValueError, TypeError), match="input_bits must be None or 8"):
            nearpeak.quantized_linear(torch.ones(2, 256), weight, activation=epilogue, input_bits=bits)


def test_layers_keep_the_option():
    layer = nearpeak.nn.QuantizedLinear.from_linear(torch.nn.Linear(64, 8), input_bits=8)
    x = randn(3, 64)
    assert torch.equal(layer(x), served(x, layer.weight, layer.bias))
    assert "input_bits=8" in repr(layer)
    blocks = weight_of("Q4_0", 8, 64, 32, 0)
    layer = nearpeak.nn.GgufLinear(blocks, input_bits=8)
    assert torch.equal(layer(x), served(x, blocks))
    assert "input_bits=8" in repr(layer)
    for make in (
        lambda: nearpeak.nn.QuantizedLinear(64, 8, input_bits=7),
        lambda: nearpeak.nn.GgufLinear(blocks, input_bits=7),
        lambda: nearpeak.quantize(torch.nn.Sequential(torch.nn.Linear(64, 8)), input_bits=7),
    ):
        with pytest.raises(ValueError, match="input_bits must"):
            make()


def test_quantize_gives_it_to_every_layer():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    nearpeak.quantize(model, input_bits=8)
    assert [model[0].input_bits, model[2].input_bits] == [8, 8]


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(KINDS))
    return Case(
        kind,
        rows=(draw(st.integers(1, 40)),),
        inputs=(256 if kind in K_TYPES else 128) * draw(st.integers(1, 5)),
        outputs=draw(st.integers(1, 70)),
        group_size=draw(st.sampled_from([32, 64, 128])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_case_is_as_exact_as_rounding_first(serving, dtype, examples):
    @for_all(examples, case=cases())
    def check(case):
        draws = draws_of(case, dtype, examples.draws)
        assert_as_exact([(served(*draw),) for draw in draws], standards_of(draws))
