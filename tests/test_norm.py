"""RMSNorm: as exact as PyTorch's layer on every backend, forward and backward, in whatever shape and layout."""

import functools
import math
from typing import NamedTuple

import hypothesis.strategies as st
import nearpeak
import plain
import pytest
import torch
from draws import DRAWS, assert_as_exact, standards
from inputs import DTYPES, EXAMPLES, case_name, every_second, for_all, misaligned, padded, randn
from nearpeak.norm import reference


class Case(NamedTuple):
    rows: tuple = (3,)
    width: int = 64
    weight: torch.dtype | str | None = "x's dtype"
    offset: float = 0.0
    cast_first: bool = False
    residual: bool = False
    eps: float = 1e-6
    magnitude: float = 1.0
    seed: int = 0


WIDTHS = [1, 2, 7, 8, 15, 16, 17, 31, 33, 640, 4096, 4097]
CASES = [
    *(Case(width=width) for width in WIDTHS),
    *(Case(width=width, residual=True, offset=1.0) for width in (1, 7, 16, 33, 4097)),
    *(Case(rows=rows) for rows in ((), (0,), (1,), (2,), (17,), (2, 0, 3), (2, 3, 5))),
    *(Case(rows=rows, residual=True) for rows in ((), (0,), (17,))),
    *(Case(weight=weight, residual=residual) for weight in (None, torch.float32) for residual in (False, True)),
    Case(offset=1.0),
    Case(offset=1.0, weight=torch.float32),
    Case(offset=1.0, weight=None),
    *(Case(cast_first=True, width=width, residual=residual) for width in (7, 640) for residual in (False, True)),
    *(Case(cast_first=True, weight=weight, offset=1.0) for weight in (None, torch.float32)),
    Case(eps=0.0),
    Case(eps=1.0),
    Case(rows=(2,), width=131072),
    Case(rows=(300,), width=33),
]


def inputs_of(case, dtype):
    """x, residual or None, weight or None, and the gradients of the outputs."""
    shape = (*case.rows, case.width)
    x = randn(*shape, dtype=dtype, seed=case.seed, magnitude=case.magnitude)
    residual = randn(*shape, dtype=dtype, seed=case.seed + 1, magnitude=case.magnitude) if case.residual else None
    weight = None
    if case.weight is not None:
        weight = randn(case.width, dtype=dtype if case.weight == "x's dtype" else case.weight, seed=case.seed + 2)
    grads = [randn(*shape, dtype=dtype, seed=case.seed + 3 + i) for i in range(1 + case.residual)]
    return (x, residual, weight), grads


def call(module, case):
    """The layer of `module` (reference or plain) as a function of x, residual and weight."""
    if case.residual:
        return lambda x, residual, weight: module.add_rms_norm(
            x, residual, weight, case.eps, case.offset, case.cast_first
        )
    return lambda x, residual, weight: module.rms_norm(x, weight, case.eps, case.offset, case.cast_first)


def served(case):
    options = {"offset": case.offset, "cast_first": case.cast_first}
    return lambda x, residual, weight: nearpeak.rms_norm(x, weight, case.eps, residual=residual, **options)


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
    """Few of the widest: torch's own backward takes half a second there."""
    draws = range(count if case.width < 100_000 else 2)
    return [inputs_of(case._replace(seed=case.seed + 10 * draw), dtype) for draw in draws]


@functools.lru_cache(maxsize=2)
def standard(case, dtype):
    return standards_of(case, draws_of(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(serving, dtype, case):
    mine = results(case, draws_of(case, dtype))
    assert all(t.dtype is dtype for result in mine for t in result[: 1 + case.residual])
    assert_as_exact(mine, standard(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_forward_without_gradients_is_the_same(serving, case):
    inputs, grads = inputs_of(case, torch.float32)
    training = plain.value_and_gradients(served(case), inputs, grads)
    inference = plain.value_and_gradients(served(case), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inference, training, strict=False))


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_float64_is_served_in_float64(residual, offset):
    case = Case(residual=residual, offset=offset)
    inputs, grads = inputs_of(case, torch.float64)
    result = plain.value_and_gradients(served(case), inputs, grads)
    expected = plain.value_and_gradients(call(plain, case), inputs, grads)
    for mine, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


EXTREMES = {
    "zeros": lambda x: x.zero_(),
    "constant": lambda x: x.fill_(0.3),
    "one_zero_row": lambda x: torch.cat((x[:1] * 0, x[1:])),
    "denormal": lambda x: x * torch.finfo(x.dtype).tiny / 8,
    "largest": lambda x: x.clamp(-1, 1) * torch.finfo(x.dtype).max,
    "square_overflows": lambda x: x * min(1e18, torch.finfo(x.dtype).max / 8),
    "square_underflows": lambda x: x * max(1e-20, torch.finfo(x.dtype).tiny),
    "one_large_element": lambda x: torch.cat((x[:, :1] * 1e4, x[:, 1:]), dim=1),
}


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_plain_stays_finite_so_does_nearpeak(serving, dtype, extreme, eps):
    case = Case(rows=(4,), width=67, eps=eps)
    draws = [((EXTREMES[extreme](x), other, weight), grads) for (x, other, weight), grads in draws_of(case, dtype)]
    mine, plains, exacts = results(case, draws), plains_of(case, draws), exacts_of(case, draws)
    for outputs in zip(mine, plains, exacts, strict=True):
        for tensors in zip(*outputs, strict=True):
            overflown = ~(tensors[1].isfinite() & tensors[2].isfinite())
            for tensor in tensors:
                tensor[overflown] = 0.0
    assert_as_exact(mine, standards([plains], exacts))


def llamas(x, weight, eps):
    """As Hugging Face's LlamaRMSNorm computes it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_cast_first_gives_llamas_very_numbers(serving, dtype):
    """Rows of two elements: their squares have one sum, in whatever order they are added."""
    x, weight = randn(5000, 2, dtype=dtype), randn(2, dtype=dtype, seed=1)
    expected = llamas(x, weight, 1e-6)
    assert torch.equal(nearpeak.rms_norm(x, weight, 1e-6, cast_first=True), expected)
    assert not torch.equal(nearpeak.rms_norm(x, weight, 1e-6), expected)
    out = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    nearpeak.rms_norm(x, weight, 1e-6, residual=torch.zeros_like(x), cast_first=True, out=out)
    assert torch.equal(out[0], expected)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rounding_once_is_never_less_exact_than_casting_first(serving, dtype):
    """Why `nearpeak.patch` rounds once, in models whose own modules cast first."""
    case = Case(rows=(64,), width=640)
    draws = draws_of(case, dtype)
    exacts, plains = exacts_of(case, draws), plains_of(case._replace(cast_first=True), draws)
    for mine, exact, theirs in zip(results(case, draws), exacts, plains, strict=True):
        for a, b, truth in zip(mine, theirs, exact, strict=True):
            assert (a.double() - truth).abs().mean() <= (b.double() - truth).abs().mean()


@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=["inf", "nan"])
def test_a_bad_row_spoils_no_other(serving, bad):
    x = randn(5, 67)
    good = nearpeak.rms_norm(x)
    x[2, 40] = bad
    y = nearpeak.rms_norm(x)
    assert torch.equal(y[[0, 1, 3, 4]], good[[0, 1, 3, 4]])
    assert y[2, 40].isnan()


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last_dimension_strided": lambda x: x.mT.contiguous().mT,
    "padded": padded,
    "every_second": every_second,
    "misaligned": misaligned,
    "expanded_rows": lambda x: x[:1].expand(x.shape),
    "expanded_width": lambda x: x[..., :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_inputs(serving, dtype, residual, layout):
    case = Case(rows=(4, 5), width=67, residual=residual)
    draws = [
        ((LAYOUTS[layout](x), LAYOUTS[layout](other) if residual else None, weight), grads)
        for (x, other, weight), grads in draws_of(case, dtype)
    ]
    assert_as_exact(results(case, draws), standards_of(case, draws))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_layouts_of_gradients(serving, residual, layout):
    case = Case(rows=(4, 5), width=67, residual=residual)
    draws = [(inputs, [LAYOUTS[layout](grad) for grad in grads]) for inputs, grads in draws_of(case, torch.float32)]
    assert_as_exact(results(case, draws), standards_of(case, draws))


@pytest.mark.parametrize("layout", ["misaligned", "every_second", "expanded"])
def test_layouts_of_weight(serving, layout):
    case = Case(width=67)
    strange = {"misaligned": misaligned, "every_second": every_second, "expanded": lambda w: w[:1].expand(67)}[layout]
    draws = [((x, None, strange(weight)), grads) for (x, _, weight), grads in draws_of(case, torch.float32)]
    assert_as_exact(results(case, draws), standards_of(case, draws))


def test_only_the_gradients_asked_for(serving):
    x, residual, weight = randn(3, 67), randn(3, 67, seed=1), randn(67, seed=2)
    for wanted in (x, residual, weight):
        leaf = wanted.detach().requires_grad_()
        arguments = [leaf if t is wanted else t for t in (x, residual, weight)]
        y, _ = nearpeak.rms_norm(arguments[0], arguments[2], residual=arguments[1])
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        assert gradient.shape == leaf.shape


def test_gradient_through_the_returned_residual_alone(serving):
    x, residual = randn(3, 67).requires_grad_(), randn(3, 67, seed=1).requires_grad_()
    _, hidden = nearpeak.rms_norm(x, None, residual=residual)
    d_x, d_residual = torch.autograd.grad(hidden.sum(), (x, residual))
    assert torch.equal(d_x, torch.ones_like(x))
    assert torch.equal(d_residual, torch.ones_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 17, 64, 4097])
def test_out_is_written_whole_and_nothing_beside_it(serving, width, dtype):
    case = Case(width=width)
    (x, _, weight), _ = inputs_of(case, dtype)
    buffer = torch.full((5, width), math.nan, dtype=dtype)
    returned = nearpeak.rms_norm(x, weight, out=buffer[1:4])
    assert returned.data_ptr() == buffer[1:4].data_ptr()
    assert torch.equal(buffer[1:4], nearpeak.rms_norm(x, weight))
    assert buffer[[0, 4]].isnan().all()


def test_out_with_residual(serving):
    x, residual, weight = randn(3, 67), randn(3, 67, seed=1), randn(67, seed=2)
    out = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    assert nearpeak.rms_norm(x, weight, residual=residual, out=out) is out
    for written, expected in zip(out, nearpeak.rms_norm(x, weight, residual=residual), strict=True):
        assert torch.equal(written, expected)


@pytest.mark.parametrize("places", ["x,new", "new,x", "new,residual", "residual,new", "x,residual", "residual,x"])
@pytest.mark.parametrize("width", [67, 4097])
def test_out_may_be_the_inputs(serving, width, places):
    x, residual, weight = randn(3, width), randn(3, width, seed=1), randn(width, seed=2)
    expected = nearpeak.rms_norm(x, weight, residual=residual)
    tensors = {"x": x, "residual": residual, "new": torch.full_like(x, math.nan)}
    out = tuple(tensors[place] for place in places.split(","))
    nearpeak.rms_norm(x, weight, residual=residual, out=out)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])


def test_out_may_be_x(serving):
    x, weight = randn(3, 67), randn(67, seed=2)
    expected = nearpeak.rms_norm(x, weight)
    assert nearpeak.rms_norm(x, weight, out=x) is x
    assert torch.equal(x, expected)


def test_writing_out_makes_a_saved_tensor_stale(serving):
    x = randn(3, 67)
    leaf = torch.ones(3, 67, requires_grad=True)
    product = leaf * x
    with torch.no_grad():
        nearpeak.rms_norm(x, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


X, WEIGHT = torch.ones(2, 8), torch.ones(8)
LEAF = torch.ones(8, requires_grad=True)
BAD = {
    "x_list": (TypeError, "x must", lambda: nearpeak.rms_norm([1.0])),
    "x_int": (TypeError, "x must", lambda: nearpeak.rms_norm(X.int())),
    "x_complex": (TypeError, "x must", lambda: nearpeak.rms_norm(X.cfloat())),
    "x_bool": (TypeError, "x must", lambda: nearpeak.rms_norm(X.bool())),
    "x_scalar": (ValueError, "x must", lambda: nearpeak.rms_norm(torch.tensor(1.0))),
    "x_no_width": (ValueError, "x must", lambda: nearpeak.rms_norm(X[:, :0])),
    "weight_list": (TypeError, "weight must", lambda: nearpeak.rms_norm(X, [1.0] * 8)),
    "weight_int": (TypeError, "weight must", lambda: nearpeak.rms_norm(X, WEIGHT.int())),
    "weight_float64": (TypeError, "weight must", lambda: nearpeak.rms_norm(X, WEIGHT.double())),
    "weight_float16": (TypeError, "weight must", lambda: nearpeak.rms_norm(X, WEIGHT.half())),
    "weight_short": (ValueError, "weight must", lambda: nearpeak.rms_norm(X, WEIGHT[:7])),
    "weight_matrix": (ValueError, "weight must", lambda: nearpeak.rms_norm(X, X)),
    "weight_meta": (ValueError, "weight must", lambda: nearpeak.rms_norm(X, WEIGHT.to("meta"))),
    "residual_list": (TypeError, "residual must", lambda: nearpeak.rms_norm(X, residual=[1.0])),
    "residual_shape": (ValueError, "residual must", lambda: nearpeak.rms_norm(X, residual=X[:1])),
    "residual_dtype": (TypeError, "residual must", lambda: nearpeak.rms_norm(X, residual=X.half())),
    "residual_meta": (ValueError, "residual must", lambda: nearpeak.rms_norm(X, residual=X.to("meta"))),
    "out_pair_alone": (TypeError, "out must be", lambda: nearpeak.rms_norm(X, out=(X, X))),
    "out_one_of_two": (ValueError, "out must be", lambda: nearpeak.rms_norm(X, residual=X, out=X)),
    "out_shape": (ValueError, "out must have", lambda: nearpeak.rms_norm(X, out=X[:1])),
    "out_dtype": (TypeError, "out must have", lambda: nearpeak.rms_norm(X, out=X.half())),
    "out_meta": (ValueError, "out must have", lambda: nearpeak.rms_norm(X, out=X.to("meta"))),
    "out_strided": (ValueError, "out must be contiguous", lambda: nearpeak.rms_norm(X, out=torch.ones(8, 2).T)),
    "out_second": (ValueError, r"out\[1\]", lambda: nearpeak.rms_norm(X, residual=X, out=(X.clone(), X[:1]))),
    "out_same": (ValueError, "out", lambda: nearpeak.rms_norm(X, residual=X, out=(Y := X.clone(), Y))),
    "out_gradient": (ValueError, "out cannot", lambda: nearpeak.rms_norm(X, LEAF, out=X.clone())),
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
        # A single element has no gradient but rounding's.
        width=draw(st.integers(2, 300)),
        weight=draw(st.sampled_from(["x's dtype", torch.float32, None])),
        offset=draw(st.sampled_from([0.0, 1.0])),
        cast_first=draw(st.booleans()),
        residual=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
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
    @for_all(examples, rows=st.integers(1, 4), width=st.integers(1, 200), power=st.integers(-20, 20))
    def check(rows, width, power):
        x = randn(rows, width)
        assert torch.equal(nearpeak.rms_norm(x, eps=0.0), nearpeak.rms_norm(x * 2.0**power, eps=0.0))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_rows_do_not_depend_on_each_other(serving, examples):
    @for_all(examples, rows=st.integers(1, 9), width=st.integers(1, 200), seed=st.integers(0, 99))
    def check(rows, width, seed):
        x, weight = randn(rows, width, seed=seed), randn(width, seed=seed + 1)
        together = nearpeak.rms_norm(x, weight)
        assert torch.equal(together, torch.stack([nearpeak.rms_norm(row, weight) for row in x]))
