"""LayerNorm: as exact as PyTorch's layer on every backend, forward and backward, in whatever shape and layout."""

import functools
import math
from typing import NamedTuple

import hypothesis.strategies as st
import nearpeak
import plain
import pytest
import torch
from draws import DRAWS, assert_as_exact, standards
from inputs import DTYPES, EXAMPLES, case_name, every_second, for_all, misaligned, randn
from nearpeak.norm import reference
from test_norm import EXTREMES, LAYOUTS, WIDTHS
from tiny_models import Operators


class Case(NamedTuple):
    rows: tuple = (3,)
    width: int = 64
    weight: bool = True
    bias: bool = True
    parameters: torch.dtype | str = "x's dtype"
    residual: str | None = None  # "pre": the sum is returned, "post": it is not
    eps: float = 1e-5
    mean: float = 0.0
    magnitude: float = 1.0
    seed: int = 0


RESIDUALS = [None, "pre", "post"]
CASES = [
    # A row of one element, or of two, has no gradient but eps's.
    *(Case(width=width, eps=1e-5 if width > 2 else 1.0) for width in WIDTHS),
    *(Case(width=width, residual=residual) for width in (3, 7, 16, 33, 4097) for residual in ("pre", "post")),
    *(Case(rows=rows) for rows in ((), (0,), (1,), (2,), (17,), (2, 0, 3), (2, 3, 5))),
    *(Case(rows=rows, residual=residual) for rows in ((), (0,), (17,)) for residual in ("pre", "post")),
    *(Case(weight=weight, bias=bias) for weight, bias in ((False, False), (True, False), (False, True))),
    *(Case(weight=False, bias=False, residual=residual) for residual in ("pre", "post")),
    *(Case(parameters=torch.float32, residual=residual) for residual in RESIDUALS),
    Case(parameters=torch.float32, bias=False),
    Case(eps=0.0),
    Case(eps=1.0),
    *(Case(mean=1000.0, width=width, residual=residual) for width in (33, 640) for residual in (None, "post")),
    Case(rows=(2,), width=131072),
    Case(rows=(1,), width=262144),
    Case(rows=(300,), width=33),
]


def inputs_of(case, dtype):
    """x, residual or None, weight or None, bias or None, and the gradients of the outputs."""
    shape = (*case.rows, case.width)

    def rows(seed):
        return (case.mean + randn(*shape, seed=seed, magnitude=case.magnitude)).to(dtype)

    def parameter(given, seed):
        return randn(case.width, dtype=kind, seed=seed) if given else None

    kind = dtype if case.parameters == "x's dtype" else case.parameters
    residual = rows(case.seed + 1) if case.residual else None
    weight, bias = parameter(case.weight, case.seed + 2), parameter(case.bias, case.seed + 3)
    outputs = 2 if case.residual == "pre" else 1
    grads = [randn(*shape, dtype=dtype, seed=case.seed + 4 + i) for i in range(outputs)]
    return (rows(case.seed), residual, weight, bias), grads


def call(module, case):
    """The layer of `module` (reference or plain) as a function of x, residual, weight and bias."""
    if case.residual is None:
        return lambda x, residual, weight, bias: module.layer_norm(x, weight, bias, case.eps)
    function = module.add_layer_norm if case.residual == "pre" else module.layer_norm_of_sum
    return lambda x, residual, weight, bias: function(x, residual, weight, bias, case.eps)


def served(case):
    return lambda x, residual, weight, bias: nearpeak.layer_norm(
        x, weight, bias, case.eps, residual=residual, return_residual=case.residual == "pre"
    )


def results(case, draws):
    return [plain.value_and_gradients(served(case), inputs, grads) for inputs, grads in draws]


def plains_of(case, draws):
    return [plain.value_and_gradients(call(plain, case), inputs, grads) for inputs, grads in draws]


def exacts_of(case, draws):
    doubles = [(plain.doubled(inputs), plain.doubled(grads)) for inputs, grads in draws]
    return [plain.value_and_gradients(call(reference, case), inputs, grads) for inputs, grads in doubles]


def standards_of(case, draws):
    return standards([plains_of(case, draws)], exacts_of(case, draws))


def draws_of(case, dtype, count=DRAWS):
    """Few of the widest, which take long."""
    draws = range(count if case.width < 100_000 else 2)
    return [inputs_of(case._replace(seed=case.seed + 10 * draw), dtype) for draw in draws]


@functools.lru_cache(maxsize=2)
def standard(case, dtype):
    return standards_of(case, draws_of(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(serving, dtype, case):
    mine = results(case, draws_of(case, dtype))
    outputs = 2 if case.residual == "pre" else 1
    assert all(t.dtype is dtype for result in mine for t in result[:outputs])
    assert_as_exact(mine, standard(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_forward_without_gradients_is_the_same(serving, case):
    inputs, grads = inputs_of(case, torch.float32)
    training = plain.value_and_gradients(served(case), inputs, grads)
    inference = plain.value_and_gradients(served(case), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inference, training, strict=False))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_float64_is_served_in_float64(residual):
    case = Case(residual=residual)
    inputs, grads = inputs_of(case, torch.float64)
    result = plain.value_and_gradients(served(case), inputs, grads)
    expected = plain.value_and_gradients(call(plain, case), inputs, grads)
    for mine, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("width", [8, 33, 640, 4097])
def test_a_large_mean_costs_no_digits(serving, width):
    """The plain layer's mean error is 100 times larger: it rounds the mean to float32, and then subtracts."""
    case = Case(rows=(8,), width=width, mean=1000.0, weight=False, bias=False)
    for (x, *_), grads in draws_of(case, torch.float32):
        exact = exacts_of(case, [((x, None, None, None), grads)])[0]
        mine = results(case, [((x, None, None, None), grads)])[0]
        for a, b in zip(mine, exact, strict=True):
            assert (a - b).abs().mean() <= torch.finfo(torch.float32).eps * b.square().mean().sqrt()


@pytest.mark.parametrize("part", [1, 8, 64, 90, 1100])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_begins_far_from_its_mean(serving, dtype, residual, part):
    """The kernels take the mean of a first part for the row's own, until they have seen how far that is."""

    def far(x):
        return torch.cat((x[:, :part] + 30.0, x[:, part:]), dim=1)

    case = Case(rows=(4,), width=1234, residual=residual)
    draws = [((far(x), *others), grads) for (x, *others), grads in draws_of(case, dtype)]
    assert_as_exact(results(case, draws), standards_of(case, draws))


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_plain_stays_finite_so_does_nearpeak(serving, dtype, extreme, eps):
    if serving == "reference" and extreme == "square_underflows" and eps == 0.0:
        pytest.skip("autograd, which differentiates the definition, divides by a variance that is almost zero")
    case = Case(rows=(4,), width=67, eps=eps)
    draws = [((EXTREMES[extreme](x), *others), grads) for (x, *others), grads in draws_of(case, dtype)]
    mine, plains, exacts = results(case, draws), plains_of(case, draws), exacts_of(case, draws)
    for outputs in zip(mine, plains, exacts, strict=True):
        for tensors in zip(*outputs, strict=True):
            overflown = ~(tensors[1].isfinite() & tensors[2].isfinite())
            for tensor in tensors:
                tensor[overflown] = 0.0
    assert_as_exact(mine, standards([plains], exacts))


@pytest.mark.parametrize("value", [0.0, 0.3, -1000.1, 3e4])
def test_a_constant_row_gives_the_bias(serving, value):
    weight, bias = randn(67, seed=1), randn(67, seed=2)
    y = nearpeak.layer_norm(torch.full((3, 67), value), weight, bias)
    expected = torch.nn.functional.layer_norm(torch.full((3, 67), value).double(), (67,), bias=bias.double())
    plain_error = (torch.nn.functional.layer_norm(torch.full((3, 67), value), (67,), weight, bias) - expected).abs()
    assert (y - expected).abs().max() <= plain_error.max() + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=["inf", "nan"])
def test_a_bad_row_spoils_no_other(serving, bad):
    x = randn(5, 67)
    good = nearpeak.layer_norm(x)
    x[2, 40] = bad
    y = nearpeak.layer_norm(x)
    assert torch.equal(y[[0, 1, 3, 4]], good[[0, 1, 3, 4]])
    assert y[2].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_inputs(serving, dtype, residual, layout):
    # A row of equal numbers has no gradient but eps's.
    case = Case(rows=(4, 5), width=67, residual=residual, eps=1.0 if layout == "expanded_width" else 1e-5)
    strange = LAYOUTS[layout]
    draws = [
        ((strange(x), strange(other) if residual else None, *parameters), grads)
        for (x, other, *parameters), grads in draws_of(case, dtype)
    ]
    assert_as_exact(results(case, draws), standards_of(case, draws))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_layouts_of_gradients(serving, residual, layout):
    case = Case(rows=(4, 5), width=67, residual=residual)
    draws = [(inputs, [LAYOUTS[layout](grad) for grad in grads]) for inputs, grads in draws_of(case, torch.float32)]
    assert_as_exact(results(case, draws), standards_of(case, draws))


@pytest.mark.parametrize("layout", ["misaligned", "every_second", "expanded"])
def test_layouts_of_weight_and_bias(serving, layout):
    case = Case(width=67)
    strange = {"misaligned": misaligned, "every_second": every_second, "expanded": lambda w: w[:1].expand(67)}[layout]
    draws = [
        ((x, None, strange(weight), strange(bias)), grads)
        for (x, _, weight, bias), grads in draws_of(case, torch.float32)
    ]
    assert_as_exact(results(case, draws), standards_of(case, draws))


@pytest.mark.parametrize("return_residual", [True, False])
def test_only_the_gradients_asked_for(serving, return_residual):
    tensors = randn(3, 67), randn(3, 67, seed=1), randn(67, seed=2), randn(67, seed=3)
    for wanted in tensors:
        leaf = wanted.detach().requires_grad_()
        x, residual, weight, bias = (leaf if t is wanted else t for t in tensors)
        outputs = nearpeak.layer_norm(x, weight, bias, residual=residual, return_residual=return_residual)
        y = outputs[0] if return_residual else outputs
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        assert gradient.shape == leaf.shape


def test_gradient_through_the_returned_residual_alone(serving):
    x, residual, weight = randn(3, 67).requires_grad_(), randn(3, 67, seed=1).requires_grad_(), randn(67, seed=2)
    _, hidden = nearpeak.layer_norm(x, weight.requires_grad_(), residual=residual)
    d_x, d_residual, d_weight = torch.autograd.grad(
        hidden.sum(), (x, residual, weight), allow_unused=True, materialize_grads=True
    )
    assert torch.equal(d_x, torch.ones_like(x))
    assert torch.equal(d_residual, torch.ones_like(x))
    assert torch.equal(d_weight, torch.zeros_like(weight))


def test_post_norm_inference_writes_the_result_alone(serving):
    if serving == "reference":
        pytest.skip("the definition computes the sum first")
    inputs, _ = inputs_of(Case(residual="post"), torch.float32)
    with Operators() as operators:
        served(Case(residual="post"))(*inputs)
    assert operators.names == ["nearpeak::layer_norm_of_sum"]


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 17, 64, 4097])
def test_out_is_written_whole_and_nothing_beside_it(serving, width, dtype, residual):
    case = Case(width=width, residual=residual)
    (x, other, weight, bias), _ = inputs_of(case, dtype)
    buffers = [torch.full((5, width), math.nan, dtype=dtype) for _ in range(2 if residual == "pre" else 1)]
    out = tuple(buffer[1:4] for buffer in buffers)
    out = out if residual == "pre" else out[0]
    options = {"residual": other, "return_residual": residual == "pre"}
    assert nearpeak.layer_norm(x, weight, bias, out=out, **options) is out
    expected = nearpeak.layer_norm(x, weight, bias, **options)
    for buffer, each in zip(buffers, expected if residual == "pre" else (expected,), strict=True):
        assert torch.equal(buffer[1:4], each)
        assert buffer[[0, 4]].isnan().all()


@pytest.mark.parametrize("places", ["x,new", "new,x", "new,residual", "residual,new", "x,residual", "residual,x"])
@pytest.mark.parametrize("width", [67, 4097])
def test_out_may_be_the_inputs(serving, width, places):
    (x, residual, weight, bias), _ = inputs_of(Case(width=width, residual="pre"), torch.float32)
    expected = nearpeak.layer_norm(x, weight, bias, residual=residual)
    tensors = {"x": x, "residual": residual, "new": torch.full_like(x, math.nan)}
    out = tuple(tensors[place] for place in places.split(","))
    nearpeak.layer_norm(x, weight, bias, residual=residual, out=out)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])


@pytest.mark.parametrize("place", ["x", "residual"])
def test_out_of_post_norm_may_be_an_input(serving, place):
    (x, residual, weight, bias), _ = inputs_of(Case(width=67, residual="post"), torch.float32)
    options = {"residual": residual, "return_residual": False}
    expected = nearpeak.layer_norm(x, weight, bias, **options)
    out = {"x": x, "residual": residual}[place]
    assert nearpeak.layer_norm(x, weight, bias, **options, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_outputs_larger_than_the_caches(serving, residual, dtype):
    """Written past them, where an output's memory is not new."""
    case = Case(rows=(2500,), width=4096, residual=residual)
    (x, other, weight, bias), _ = inputs_of(case, dtype)
    options = {"residual": other, "return_residual": residual == "pre"}
    expected = nearpeak.layer_norm(x, weight, bias, **options)
    expected = expected if residual == "pre" else (expected,)
    out = tuple(torch.full_like(x, math.nan) for _ in expected)
    nearpeak.layer_norm(x, weight, bias, **options, out=out if residual == "pre" else out[0])
    assert all(torch.equal(mine, each) for mine, each in zip(out, expected, strict=True))


X, WEIGHT = torch.ones(2, 8), torch.ones(8)
LEAF = torch.ones(8, requires_grad=True)
norm = nearpeak.layer_norm
BAD = {
    "x_list": (TypeError, "x must", lambda: norm([1.0])),
    "x_int": (TypeError, "x must", lambda: norm(X.int())),
    "x_scalar": (ValueError, "x must", lambda: norm(torch.tensor(1.0))),
    "x_no_width": (ValueError, "x must", lambda: norm(X[:, :0])),
    "weight_list": (TypeError, "weight must", lambda: norm(X, [1.0] * 8)),
    "weight_int": (TypeError, "weight must", lambda: norm(X, WEIGHT.int())),
    "weight_float16": (TypeError, "weight must", lambda: norm(X, WEIGHT.half())),
    "weight_short": (ValueError, "weight must", lambda: norm(X, WEIGHT[:7])),
    "weight_meta": (ValueError, "weight must", lambda: norm(X, WEIGHT.to("meta"))),
    "bias_number": (TypeError, "bias must", lambda: norm(X, None, 1.0)),
    "bias_float64": (TypeError, "bias must", lambda: norm(X, None, WEIGHT.double())),
    "bias_matrix": (ValueError, "bias must", lambda: norm(X, None, X)),
    "bias_meta": (ValueError, "bias must", lambda: norm(X, None, WEIGHT.to("meta"))),
    "bias_other_dtype": (TypeError, "bias must have weight's", lambda: norm(X.half(), WEIGHT, WEIGHT.half())),
    "residual_shape": (ValueError, "residual must", lambda: norm(X, residual=X[:1])),
    "residual_dtype": (TypeError, "residual must", lambda: norm(X, residual=X.half())),
    "residual_unused": (TypeError, "residual must", lambda: norm(X, residual=[1.0], return_residual=False)),
    "out_pair_alone": (TypeError, "out must be", lambda: norm(X, out=(X, X))),
    "out_pair_post": (TypeError, "out must be", lambda: norm(X, residual=X, return_residual=False, out=(X, X))),
    "out_one_of_two": (ValueError, "out must be", lambda: norm(X, residual=X, out=X)),
    "out_shape": (ValueError, "out must have", lambda: norm(X, out=X[:1])),
    "out_strided": (ValueError, "out must be contiguous", lambda: norm(X, out=torch.ones(8, 2).T)),
    "out_second": (ValueError, r"out\[1\]", lambda: norm(X, residual=X, out=(X.clone(), X[:1]))),
    "out_same": (ValueError, "out", lambda: norm(X, residual=X, out=(Y := X.clone(), Y))),
    "out_gradient": (ValueError, "out cannot", lambda: norm(X, None, LEAF, out=X.clone())),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(serving, bad):
    error, message, run = BAD[bad]
    with pytest.raises(error, match=message):
        run()


@st.composite
def cases(draw):
    return Case(
        rows=tuple(draw(st.lists(st.integers(0, 4), max_size=3))),
        # One element or two have no gradient but eps's.
        width=draw(st.integers(3, 300)),
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        parameters=draw(st.sampled_from(["x's dtype", torch.float32])),
        residual=draw(st.sampled_from(RESIDUALS)),
        eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        mean=draw(st.sampled_from([0.0, 3.0])),
        magnitude=draw(st.sampled_from([1e-3, 1.0, 100.0])),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_cases_are_as_exact_as_plain(serving, dtype, examples):
    @for_all(examples, case=cases())
    def check(case):
        draws = draws_of(case, dtype, examples.draws)
        assert_as_exact(results(case, draws), standards_of(case, draws))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_scaling_x_by_a_power_of_two_changes_nothing_without_eps(serving, examples):
    @for_all(examples, rows=st.integers(1, 4), width=st.integers(2, 200), power=st.integers(-20, 20))
    def check(rows, width, power):
        x = randn(rows, width)
        assert torch.equal(nearpeak.layer_norm(x, eps=0.0), nearpeak.layer_norm(x * 2.0**power, eps=0.0))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_rows_do_not_depend_on_each_other(serving, examples):
    @for_all(examples, rows=st.integers(1, 9), width=st.integers(1, 200), seed=st.integers(0, 99))
    def check(rows, width, seed):
        x, weight, bias = (randn(*shape, seed=seed) for shape in ((rows, width), (width,), (width,)))
        together = nearpeak.layer_norm(x, weight, bias)
        assert torch.equal(together, torch.stack([nearpeak.layer_norm(row, weight, bias) for row in x]))
