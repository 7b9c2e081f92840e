"""Linear layers with quantised weights: how weights are rounded, and products as exact as dequantising first."""

import functools
import math
from typing import NamedTuple

import hypothesis.strategies as st
import nearpeak
import plain
import pytest
import torch
import torch.nn.functional as F
from draws import DRAWS, assert_as_exact, standards
from inputs import DTYPES, EXAMPLES, case_name, every_second, for_all, misaligned, padded, randn
from nearpeak.linear.weights import dequantized, pack, unpack


class Case(NamedTuple):
    rows: tuple = (5,)
    inputs: int = 192
    outputs: int = 21
    bits: int = 8
    group_size: int = 64
    symmetric: bool = True
    bias: bool = True
    magnitude: float = 1.0
    seed: int = 0


CASES = [
    Case(),
    Case(bits=4),
    *(Case(rows=rows, bits=bits, bias=False) for bits in (8, 4) for rows in ((), (2, 3, 7))),
    *(
        Case(rows=(rows,), inputs=256, bits=bits, group_size=group_size, symmetric=symmetric)
        for rows in (1, 40)
        for bits in (8, 4)
        for group_size in (32, 64, 128)
        for symmetric in (True, False)
    ),
    # How many rows are taken together, from one up to blocks.
    *(Case(rows=(rows,), bits=bits) for bits in (8, 4) for rows in (2, 3, 4, 7, 8, 9, 15, 16, 17, 33, 97)),
    *(Case(rows=(rows,), outputs=outputs) for rows in (1, 3, 20) for outputs in (1, 12, 13, 16, 97, 389)),
    *(Case(rows=(rows,), inputs=inputs, group_size=32) for rows in (1, 20) for inputs in (32, 64, 96, 352)),
    # More than one block: rows of the weight, of x, and steps.
    *(Case(rows=(rows,), inputs=inputs, outputs=29, bits=4) for rows in (17, 40) for inputs in (320, 1088)),
    Case(rows=(270,), inputs=64, outputs=790),
    # Long sums, whose rounding shows in float32.
    *(Case(rows=(rows,), inputs=4096, outputs=9) for rows in (1, 4, 20)),
    *(Case(rows=(rows,), inputs=4096, outputs=9, bits=4, symmetric=False) for rows in (1, 4)),
    *(Case(rows=(rows,), magnitude=magnitude) for rows in (3, 20) for magnitude in (1e-3, 100.0)),
]


def inputs_of(case, dtype):
    x = randn(*case.rows, case.inputs, dtype=dtype, seed=case.seed, magnitude=case.magnitude)
    floats = randn(case.outputs, case.inputs, seed=case.seed + 1) + (0.0 if case.symmetric else 0.5)
    weight = nearpeak.quantize_weight(floats, case.bits, case.group_size, case.symmetric)
    bias = randn(case.outputs, dtype=dtype, seed=case.seed + 2, magnitude=case.magnitude) if case.bias else None
    return x, weight, bias


def draws_of(case, dtype, count=DRAWS):
    return [inputs_of(case._replace(seed=case.seed + 10 * draw), dtype) for draw in range(count)]


def dequantized_first(x, weight, bias):
    """What users have without a kernel."""
    return F.linear(x, weight.dequantize(x.dtype), bias)


def exact(x, weight, bias):
    return F.linear(x.double(), dequantized(*weight, torch.float64), None if bias is None else bias.double())


def standards_of(draws):
    return standards([[(dequantized_first(*draw),) for draw in draws]], [(exact(*draw),) for draw in draws])


@functools.lru_cache(maxsize=2)
def standard(case, dtype):
    return standards_of(draws_of(case, dtype))


def results(draws):
    return [(nearpeak.quantized_linear(*draw),) for draw in draws]


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_dequantising_first(serving, dtype, case):
    mine = results(draws_of(case, dtype))
    assert all(y.dtype is dtype and y.is_contiguous() for (y,) in mine)
    assert_as_exact(mine, standard(case, dtype))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_dequantised_weight(serving, dtype, bits):
    draws = draws_of(Case(rows=(20,), bits=bits), dtype)
    grads = [(randn(20, 21, dtype=dtype, seed=draw),) for draw in range(len(draws))]

    def gradients(function, double=False):
        found = []
        for (x, weight, bias), grad in zip(draws, grads, strict=True):
            inputs, upstream = (plain.doubled(t) if double else t for t in ((x, bias), grad))
            found.append(plain.value_and_gradients(lambda x, b, w=weight: function(x, w, b), inputs, upstream)[1:])
        return found

    plains, exacts = gradients(dequantized_first), gradients(exact, double=True)
    assert_as_exact(gradients(nearpeak.quantized_linear), standards([plains], exacts))


@pytest.mark.parametrize("bits", [8, 4])
def test_float64_keeps_its_digits(bits):
    x, weight, bias = inputs_of(Case(bits=bits), torch.float64)
    torch.testing.assert_close(nearpeak.quantized_linear(x, weight, bias), exact(x, weight, bias), rtol=1e-13, atol=0)


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every_second": every_second,
    "misaligned": misaligned,
    "padded": padded,
}


@pytest.mark.parametrize("rows", [(2, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(serving, dtype, layout, rows):
    x, weight, bias = inputs_of(Case(rows=rows, bits=4, symmetric=False), dtype)
    strided = LAYOUTS[layout]
    tensors = weight._replace(**{name: strided(getattr(weight, name)) for name in ("codes", "scales", "zeros")})
    result = nearpeak.quantized_linear(strided(x), tensors, strided(bias))
    assert_as_exact([(result,)], standards_of([(x, weight, bias)]))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (20, 0)], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_empty(serving, bits, shape):
    x, weight, bias = inputs_of(Case(rows=shape[:1], outputs=shape[1], bits=bits), torch.float32)
    assert nearpeak.quantized_linear(x, weight, bias).shape == shape


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(serving, dtype, rows):
    x, bias = torch.ones(rows, 32, dtype=dtype), torch.zeros(11, dtype=dtype)
    weight = nearpeak.quantize_weight(torch.ones(11, 32), group_size=32)
    x[0, 3], x[1, 3], bias[6] = math.inf, math.nan, math.inf
    x[2] = torch.finfo(dtype).max / 64
    expected = exact(x, weight, bias).to(dtype)
    torch.testing.assert_close(nearpeak.quantized_linear(x, weight, bias), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_threads_change_nothing(serving, dtype, rows):
    if serving == "reference":
        pytest.skip("torch's own products make no such promise")
    inputs = inputs_of(Case(rows=(rows,), inputs=512, outputs=700), dtype)
    first = nearpeak.quantized_linear(*inputs)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(nearpeak.quantized_linear(*inputs), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_torch_does(serving, dtype):
    x, weight, bias = inputs_of(Case(), torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        mine = nearpeak.quantized_linear(x, weight, bias)
    assert mine.dtype is dtype
    assert torch.equal(mine, nearpeak.quantized_linear(x.to(dtype), weight, bias.to(dtype)))


def test_explain_names_the_kernel():
    said = nearpeak.explain(nearpeak.quantized_linear, *inputs_of(Case(), torch.bfloat16))
    assert said.startswith("nearpeak::quantized_linear_inference on cpu, bfloat16")


WEIGHTS = {
    "normal": lambda: randn(7, 384),
    "shifted": lambda: randn(7, 384) + 3.0,
    "one sign": lambda: -randn(7, 384).abs(),
    "zeros": lambda: torch.zeros(7, 384),
    "a group of zeros": lambda: randn(7, 384).index_fill_(1, torch.arange(128), 0.0),
    "constant": lambda: torch.full((7, 384), 0.3),
    "huge": lambda: randn(7, 384).sign() * torch.finfo(torch.float32).max,
    "tiny": lambda: randn(7, 384) * 1e-30,
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_weight_is_within_half_a_step(kind, bits, symmetric):
    floats = WEIGHTS[kind]()
    for group_size in (32, 64, 128):
        weight = nearpeak.quantize_weight(floats, bits, group_size, symmetric)
        steps = weight.scales.double().repeat_interleave(group_size, 1)
        # A zero point is rounded too, which may move the largest weights out of the codes by half a step more.
        most = steps * (0.5 if symmetric else 1.0) * (1 + 1e-5)
        assert ((dequantized(*weight, torch.float64) - floats.double()).abs() <= most).all()
        assert (weight.scales >= 0).all()
        assert weight.scales.isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_codes_stand_for_is_kept(bits, symmetric):
    """A weight that codes can express exactly comes back to the bit."""
    codes = torch.randint(0, 2**bits, (6, 256), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = 2**bits - 1, 0 if not symmetric else 1
    codes = codes.clamp(min=1) if symmetric else codes
    floats = (codes - (2 ** (bits - 1))) * 0.125
    assert torch.equal(nearpeak.quantize_weight(floats, bits, 32, symmetric).dequantize(), floats)


def _weighted_error(weight, floats, importance):
    return float((importance.double() * (dequantized(*weight, torch.float64) - floats.double()).square()).sum())


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_importance_makes_the_weighted_error_smaller(kind, bits, symmetric):
    floats = WEIGHTS[kind]()
    few = torch.zeros(384).index_fill_(0, torch.arange(0, 384, 7), 1.0)
    for importance in (torch.ones(384), randn(384).square(), few, torch.zeros(384)):
        plain = nearpeak.quantize_weight(floats, bits, 64, symmetric)
        searched = nearpeak.quantize_weight(floats, bits, 64, symmetric, importance)
        error, most = (_weighted_error(weight, floats, importance) for weight in (searched, plain))
        rounding = 1e-13 * float((importance.double() * floats.double().square()).sum())
        assert error <= most * (1 + 1e-5) + rounding, "the plain scale is among those that are tried"
        if kind == "normal" and bits == 4 and importance.any():
            assert error < 0.95 * most
        assert searched.scales.isfinite().all()
        assert (searched.scales >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_any_dtype(dtype):
    floats = randn(5, 64, dtype=dtype)
    expected = nearpeak.quantize_weight(floats.float(), 4)
    assert all(torch.equal(a, b) for a, b in zip(nearpeak.quantize_weight(floats, 4)[:2], expected[:2], strict=True))
    assert nearpeak.quantize_weight(floats, 4).dequantize(dtype).dtype is dtype


def test_packing_is_undone_by_unpacking():
    codes = torch.randint(0, 16, (3, 96), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes)), codes)
    assert int(pack(codes)[1, 16 + 5]) == int(codes[1, 32 + 5]) + 16 * int(codes[1, 32 + 16 + 5])


def test_sizes():
    weight = nearpeak.quantize_weight(randn(6, 256), 4, 128, symmetric=False)
    assert (weight.out_features, weight.in_features, weight.group_size) == (6, 256, 128)
    assert weight.nbytes == 6 * (128 + 2 * 4 + 2)
    assert weight.to("meta").scales.device.type == "meta"


X = torch.ones(2, 64)
WEIGHT, BIAS = nearpeak.quantize_weight(torch.ones(3, 64), 8, 32, symmetric=False), torch.ones(3)
BAD_CALLS = {
    "x_list": (TypeError, "x must", lambda: nearpeak.quantized_linear([1.0], WEIGHT)),
    "x_int": (TypeError, "x must", lambda: nearpeak.quantized_linear(X.int(), WEIGHT)),
    "x_scalar": (ValueError, "x must", lambda: nearpeak.quantized_linear(torch.tensor(1.0), WEIGHT)),
    "x_width": (ValueError, "codes must", lambda: nearpeak.quantized_linear(X[:, :32], WEIGHT)),
    "x_meta": (ValueError, "codes must", lambda: nearpeak.quantized_linear(X.to("meta"), WEIGHT)),
    "weight_float": (TypeError, "weight must", lambda: nearpeak.quantized_linear(X, torch.ones(3, 64))),
    "weight_none": (TypeError, "weight must", lambda: nearpeak.quantized_linear(X, None)),
    "bits": (ValueError, "bits must", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(bits=3))),
    "codes_none": (ValueError, "codes must", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(codes=None))),
    "codes_dtype": (
        TypeError, "codes must", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(codes=WEIGHT.codes.int())),
    ),
    "codes_of_four_bits": (ValueError, "codes must", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(bits=4))),
    "scales_dtype": (
        TypeError, "scales must", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(scales=WEIGHT.scales.half())),
    ),
    "scales_rows": (
        ValueError, "scales must", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(scales=WEIGHT.scales[:2])),
    ),
    "scales_groups": (
        ValueError, "scales must", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(scales=torch.ones(3, 4))),
    ),
    "scales_vector": (
        ValueError, "scales must", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(scales=torch.ones(3))),
    ),
    "zeros_dtype": (
        TypeError, "zeros must", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(zeros=WEIGHT.zeros.int())),
    ),
    "zeros_shape": (
        ValueError, "zeros must", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(zeros=WEIGHT.zeros[:, :1])),
    ),
    "bias_dtype": (TypeError, "bias must", lambda: nearpeak.quantized_linear(X, WEIGHT, BIAS.half())),
    "bias_shape": (ValueError, "bias must", lambda: nearpeak.quantized_linear(X, WEIGHT, BIAS[:2])),
    "bias_matrix": (ValueError, "bias must", lambda: nearpeak.quantized_linear(X, WEIGHT, BIAS[None])),
}  # fmt: skip
FLOATS = torch.ones(3, 64)
BAD_WEIGHTS = {
    "list": (TypeError, "weight must", lambda: nearpeak.quantize_weight([1.0])),
    "int": (TypeError, "weight must", lambda: nearpeak.quantize_weight(FLOATS.int())),
    "vector": (ValueError, "weight must", lambda: nearpeak.quantize_weight(FLOATS[0])),
    "width": (ValueError, "weight must", lambda: nearpeak.quantize_weight(FLOATS, group_size=128)),
    "no_width": (ValueError, "weight must", lambda: nearpeak.quantize_weight(FLOATS[:, :0])),
    "infinite": (ValueError, "weight must", lambda: nearpeak.quantize_weight(FLOATS * math.inf)),
    "nan": (ValueError, "weight must", lambda: nearpeak.quantize_weight(FLOATS * math.nan)),
    "bits": (ValueError, "bits must", lambda: nearpeak.quantize_weight(FLOATS, bits=2)),
    "group_size": (ValueError, "group_size must", lambda: nearpeak.quantize_weight(FLOATS, group_size=16)),
    "importance_list": (TypeError, "importance must", lambda: nearpeak.quantize_weight(FLOATS, importance=[1.0])),
    "importance_shape": (ValueError, "importance must", lambda: nearpeak.quantize_weight(FLOATS, importance=FLOATS)),
    "importance_sign": (ValueError, "importance must", lambda: nearpeak.quantize_weight(FLOATS, importance=-FLOATS[0])),
    "importance_nan": (
        ValueError,
        "importance must",
        lambda: nearpeak.quantize_weight(FLOATS, importance=FLOATS[0] * math.nan),
    ),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_calls_are_named(serving, bad):
    error, message, run = BAD_CALLS[bad]
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize("bad", BAD_WEIGHTS)
def test_bad_weights_are_named(bad):
    error, message, run = BAD_WEIGHTS[bad]
    with pytest.raises(error, match=message):
        run()


@st.composite
def cases(draw):
    group_size = draw(st.sampled_from([32, 64, 128]))
    return Case(
        rows=tuple(draw(st.lists(st.integers(1, 6), max_size=2))),
        inputs=group_size * draw(st.integers(1, 4)),
        outputs=draw(st.integers(1, 130)),
        bits=draw(st.sampled_from([8, 4])),
        group_size=group_size,
        symmetric=draw(st.booleans()),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_cases_are_as_exact_as_plain(serving, dtype, examples):
    @for_all(examples, case=cases())
    def check(case):
        draws = draws_of(case, dtype, examples.draws)
        assert_as_exact(results(draws), standards_of(draws))
