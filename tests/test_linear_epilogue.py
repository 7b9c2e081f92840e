"""What follows a linear layer's product, y = f(x W^T + b) + residual: as exact as the separate calls, on every path."""

import functools
import math
from typing import NamedTuple

import nearpeak
import plain
import pytest
import torch
import torch.nn.functional as F
from draws import DRAWS, MOST_DRAWS, assert_as_exact, standards
from inputs import DTYPES, case_name, every_second, misaligned, padded, randn
from nearpeak.activations import NAMES, value
from nearpeak.linear import operator
from nearpeak.linear.weights import dequantized
from test_feedforward import EAGER


class Case(NamedTuple):
    rows: tuple = (5,)
    inputs: int = 64
    outputs: int = 21
    activation: str | None = "gelu"
    residual: bool = True
    bias: bool = True
    bits: int | None = None  # of a quantised weight
    magnitude: float = 1.0
    seed: int = 0


# Few rows and blocks, whose stores are not the same; with matrix units 3 to 64 rows are a third path.
CASES = [
    *(Case(rows=(rows,), activation=name) for rows in (4, 40) for name in NAMES),
    *(
        Case(rows=(rows,), activation=activation, residual=residual, bias=bias, bits=bits)
        for rows, bits in ((4, None), (40, None), (4, 8))
        for activation, residual, bias in (("silu", False, True), (None, True, False), ("relu", True, False))
    ),
    *(Case(rows=(rows,), bits=bits, activation="silu") for rows in (1, 17, 70) for bits in (None, 4)),
    *(Case(rows=(rows,), outputs=outputs) for rows, outputs in ((20, 1), (3, 16), (66, 33), (20, 97))),
    Case(rows=(), bias=False),
    Case(rows=(2, 3, 7)),
    # More than one block: rows of the weight, of x, and steps.
    Case(rows=(270,), outputs=790, inputs=32, activation="relu"),
    Case(rows=(20,), inputs=1088, outputs=9, bits=8),
    *(Case(rows=(rows,), magnitude=magnitude) for rows in (3, 20) for magnitude in (1e-3, 10.0)),
]


def inputs_of(case, dtype):
    """x, weight (floats, or the quantised one's), bias, residual; and y's gradient."""
    shape = *case.rows, case.outputs
    x = randn(*case.rows, case.inputs, dtype=dtype, seed=case.seed, magnitude=case.magnitude)
    weight = randn(case.outputs, case.inputs, dtype=dtype, seed=case.seed + 1)
    if case.bits:
        weight = nearpeak.quantize_weight(weight, case.bits, 32)
    bias = randn(case.outputs, dtype=dtype, seed=case.seed + 2, magnitude=case.magnitude) if case.bias else None
    residual = randn(*shape, dtype=dtype, seed=case.seed + 3) if case.residual else None
    return (x, weight, bias, residual), (randn(*shape, dtype=dtype, seed=case.seed + 4),)


def draws_of(case, dtype):
    """More where few slopes decide: of few elements, or of large ones, most of whose slopes are 0 or 1."""
    few = math.prod(case.rows) * case.outputs <= 21 or case.magnitude > 1
    count = MOST_DRAWS if few else DRAWS
    return [inputs_of(case._replace(seed=case.seed + 10 * draw), dtype) for draw in range(count)]


def served(case, x, weight, bias, residual):
    function = nearpeak.quantized_linear if case.bits else nearpeak.linear
    return function(x, weight, bias, activation=case.activation, residual=residual)


def separately(case, x, weight, bias, residual):
    """What users have without the epilogue."""
    y = F.linear(x, weight.dequantize(x.dtype) if case.bits else weight, bias)
    y = y if case.activation is None else EAGER[case.activation](y)
    return y if residual is None else y + residual


def exactly(case, x, weight, bias, residual):
    y = F.linear(x, dequantized(*weight, torch.float64) if case.bits else weight, bias)
    y = y if case.activation is None else value(y, case.activation)
    return y if residual is None else y + residual


def results_of(function, case, draws, double=False):
    """y and the gradients of every input but a quantised weight."""
    found = []
    for (x, weight, bias, residual), grads in draws:
        inputs, upstream = (plain.doubled(t) if double else t for t in ((x, bias, residual), grads))
        if case.bits:
            found.append(
                plain.value_and_gradients(lambda x, b, r, w=weight: function(case, x, w, b, r), inputs, upstream)
            )
            continue
        weight = weight.double() if double else weight
        x, bias, residual = inputs
        found.append(
            plain.value_and_gradients(functools.partial(function, case), (x, weight, bias, residual), upstream)
        )
    return found


def standards_of(case, draws):
    return standards([results_of(separately, case, draws)], results_of(exactly, case, draws, double=True))


@functools.lru_cache(maxsize=2)
def standard(case, dtype):
    return standards_of(case, draws_of(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_separate_calls(serving, dtype, case):
    mine = results_of(served, case, draws_of(case, dtype))
    assert all(t.dtype is dtype and t.is_contiguous() for y, *_ in mine for t in (y,))
    assert_as_exact(mine, standard(case, dtype))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_torch_multiplies(monkeypatch, one_thread, dtype):
    monkeypatch.setattr(operator, "FAST_IN_TORCH", frozenset((torch.float32, torch.bfloat16, torch.float16)))
    for case in (Case(rows=(70,)), Case(rows=(70,), activation=None), Case(rows=(70,), residual=False)):
        draws = draws_of(case, dtype)
        assert_as_exact(results_of(served, case, draws), standards_of(case, draws))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gradients_is_the_same(serving, dtype, bits, rows):
    case = Case(rows=(rows,), bits=bits)
    inputs, grads = inputs_of(case, dtype)
    assert torch.equal(served(case, *inputs), results_of(served, case, [(inputs, grads)])[0][0])


@pytest.mark.parametrize("bits", [None, 8])
def test_float64_keeps_its_digits(bits):
    case = Case(bits=bits)
    inputs, _ = inputs_of(case, torch.float64)
    torch.testing.assert_close(served(case, *inputs), exactly(case, *inputs), rtol=1e-12, atol=1e-12)


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "every_second": every_second,
    "misaligned": misaligned,
    "padded": padded,
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("rows", [(2, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_residual(serving, layout, rows):
    case = Case(rows=rows)
    (x, weight, bias, residual), _ = inputs_of(case, torch.bfloat16)
    strided = LAYOUTS[layout](residual)
    expected = served(case, x, weight, bias, strided.contiguous())
    assert torch.equal(served(case, x, weight, bias, strided), expected)


@pytest.mark.parametrize("shape", [(0, 64, 5), (3, 64, 0), (20, 64, 0), (3, 0, 5), (20, 0, 5)], ids=str)
def test_empty(serving, shape):
    rows, width, outputs = shape
    case = Case(rows=(rows,), inputs=width, outputs=outputs)
    inputs, grads = inputs_of(case, torch.float32)
    mine, expected = (results_of(function, case, [(inputs, grads)])[0] for function in (served, separately))
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("name", NAMES)
def test_special_values(serving, name, rows):
    x, weight, bias = torch.ones(rows, 9), torch.ones(11, 9), torch.zeros(11)
    x[0, 3], x[1, 3], bias[6], residual = math.inf, math.nan, 1e30, torch.zeros(rows, 11)
    x[2], residual[:, 4] = -1e30, math.inf
    mine = nearpeak.linear(x, weight, bias, activation=name, residual=residual)
    expected = nearpeak.activation(F.linear(x, weight, bias), name) + residual
    torch.testing.assert_close(mine, expected, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 5, 40, 300])
@pytest.mark.parametrize("bits", [None, 4])
def test_threads_change_nothing(serving, bits, rows):
    if serving == "reference":
        pytest.skip("torch's own products make no such promise")
    case = Case(rows=(rows,), inputs=512, outputs=700, bits=bits)
    inputs, _ = inputs_of(case, torch.float32)
    first = served(case, *inputs)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(served(case, *inputs), first)


def test_what_is_kept_for_backward():
    for activation, count in (("gelu", 3), (None, 2)):
        inputs, _ = inputs_of(Case(), torch.bfloat16)
        leaves = [t.requires_grad_() for t in inputs]
        saved = []
        with nearpeak.use_backend("cpu"), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
            y = nearpeak.linear(*leaves[:3], activation=activation, residual=leaves[3])
        kept = [t for t in saved if t.numel()]
        assert len(kept) == count
        assert {leaves[0].data_ptr(), leaves[1].data_ptr()} <= {t.data_ptr() for t in kept}
        assert all(t.data_ptr() != y.data_ptr() for t in kept)


@pytest.mark.parametrize("frozen", range(4))
def test_no_gradient_is_computed_that_nobody_wants(frozen):
    inputs, grads = inputs_of(Case(), torch.bfloat16)
    leaves = [t.requires_grad_(i != frozen) for i, t in enumerate(inputs)]
    with nearpeak.use_backend("cpu"):
        served(Case(), *leaves).backward(*grads)
    assert [t.grad is None for t in leaves] == [i == frozen for i in range(4)]


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_under_autocast_the_residual_keeps_its_dtype(serving, dtype, bits):
    """As a sum of its own: a residual stream in float32 stays one."""
    case = Case(bits=bits)
    (x, weight, bias, residual), _ = inputs_of(case, torch.float32)
    narrow = weight if bits else weight.bfloat16()
    inside = served(case._replace(residual=False), x.bfloat16(), narrow, bias.bfloat16(), None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = served(case, x, weight, bias, residual.to(dtype))
    assert mine.dtype is dtype
    if dtype is torch.float32:
        assert torch.equal(mine, inside + residual)


def test_explain_names_what_serves():
    (x, weight, bias, residual), _ = inputs_of(Case(), torch.bfloat16)
    said = nearpeak.explain(nearpeak.linear, x, weight, bias, activation="gelu", residual=residual)
    assert said.startswith("nearpeak::linear_epilogue_inference on cpu, bfloat16")


def test_other_devices_are_torchs():
    x, weight = torch.ones(2, 4, device="meta"), torch.ones(3, 4, device="meta")
    assert nearpeak.linear(x, weight, activation="relu").shape == (2, 3)
    assert "what follows it after that" in nearpeak.explain(nearpeak.linear, x, weight, activation="relu")


@pytest.mark.parametrize("kind", [nearpeak.nn.Linear, nearpeak.nn.QuantizedLinear])
def test_layers_apply_their_activation(kind):
    linear = nearpeak.nn.Linear(64, 7, activation="silu")
    layer = linear if kind is nearpeak.nn.Linear else kind.from_linear(linear)
    x = randn(3, 64)
    y = layer(x)
    linear.activation = layer.activation = None
    torch.testing.assert_close(y, F.silu(layer(x)))
    assert repr(nearpeak.nn.Linear(4, 3, activation="relu")).endswith("activation='relu')")
    with pytest.raises(ValueError, match="activation must be None or one of"):
        kind(64, 7, activation="swish")


def test_quantized_models_keep_activations():
    model = torch.nn.Sequential(nearpeak.nn.Linear(64, 64, activation="relu"), torch.nn.Linear(64, 64))
    nearpeak.quantize(model)
    assert [layer.activation for layer in model] == ["relu", None]


X, WEIGHT, BIAS, RESIDUAL = torch.ones(2, 32), torch.ones(3, 32), torch.ones(3), torch.ones(2, 3)
CODES = nearpeak.quantize_weight(WEIGHT, 8, 32)
BAD = {
    "name": ("activation must be None or one of", {"activation": "swish"}, ValueError),
    "number": ("activation must be None or one of", {"activation": 1}, ValueError),
    "list": ("residual must be a torch.Tensor", {"residual": [1.0]}, TypeError),
    "dtype": ("residual must have x's dtype", {"residual": RESIDUAL.half()}, TypeError),
    "device": ("residual must have x's device", {"residual": RESIDUAL.to("meta")}, ValueError),
    "broadcast": ("residual must have y's shape", {"residual": RESIDUAL[:1]}, ValueError),
    "flat": ("residual must have y's shape", {"residual": RESIDUAL.flatten()}, ValueError),
}


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("weight", [WEIGHT, CODES], ids=["linear", "quantized"])
def test_bad_input_is_named(serving, weight, bad, rows):
    message, options, error = BAD[bad]
    function = nearpeak.linear if weight is WEIGHT else nearpeak.quantized_linear
    if isinstance(residual := options.get("residual"), torch.Tensor) and residual.dim() == 2 and len(residual) == 2:
        options = {"residual": residual.repeat(rows, 1)}
    with pytest.raises(error, match=message):
        function(X.repeat(rows, 1), weight, BIAS, **options)
    with pytest.raises(ValueError, match="bias must"):
        function(X, weight, BIAS[:2], activation="relu")


@pytest.mark.parametrize("weight", [WEIGHT, CODES], ids=["linear", "quantized"])
def test_operators_refuse_unknown_numbers(serving, weight):
    if weight is WEIGHT:
        operator, arguments = torch.ops.nearpeak.linear_epilogue, (X, WEIGHT, None)
    else:
        operator, arguments = torch.ops.nearpeak.quantized_linear_epilogue, (X, *CODES[:3], None, CODES.bits)
    with pytest.raises((RuntimeError, ValueError)):
        operator(*arguments, None, 6, False)
