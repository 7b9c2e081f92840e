"""Feed-forward activations: as exact as PyTorch's own on every backend, alone, gating, packed, forward and backward."""

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
from inputs import DTYPES, EXAMPLES, case_name, every_second, for_all, laid_out_like, misaligned, randn
from nearpeak.feedforward import reference

EAGER = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu_squared": lambda x: F.relu(x).square(),
}
GATED = {
    "relu": nearpeak.reglu,
    "gelu": nearpeak.geglu,
    "gelu_tanh": functools.partial(nearpeak.geglu, approximate="tanh"),
    "quick_gelu": functools.partial(nearpeak.geglu, approximate="sigmoid"),
    "silu": nearpeak.swiglu,
}


class Case(NamedTuple):
    shape: tuple = (5, 37)
    name: str = "silu"
    form: str = "alone"  # or "gated", "packed", "packed, up first"
    magnitude: float = 3.0
    seed: int = 0


FORMS = ["gated", "packed", "packed, up first"]
SHAPES = [(1,), (7,), (8,), (16,), (17,), (31,), (64,), (3, 1), (3, 16), (2, 3, 33), (0, 4), (4, 0), (2, 40_000)]
CASES = [
    *(Case(name=name) for name in EAGER),
    *(Case(name=name, form=form) for name in GATED for form in FORMS),
    *(Case(shape, "gelu", form) for shape in SHAPES for form in ("alone", "gated", "packed")),
    *(Case(name=name, magnitude=magnitude) for name in EAGER for magnitude in (1e-30, 1e-3, 40.0, 1e4)),
]


def inputs_of(case, dtype):
    width = 1 if case.form in ("alone", "gated") else 2
    shape = (*case.shape[:-1], width * case.shape[-1])
    x = randn(*shape, dtype=dtype, seed=case.seed, magnitude=case.magnitude)
    inputs = (x, randn(*shape, dtype=dtype, seed=case.seed + 1)) if case.form == "gated" else (x,)
    return inputs, [randn(*case.shape, dtype=dtype, seed=case.seed + 2)]


def served(case):
    if case.form == "alone":
        return lambda x: nearpeak.activation(x, case.name)
    if case.form == "gated":
        return GATED[case.name]
    return functools.partial(GATED[case.name], up_first=case.form.endswith("first"))


def layer(case, function):
    """The layer in plain PyTorch, with one function or another as its activation."""
    if case.form == "alone":
        return function
    if case.form == "gated":
        return lambda gate, up: function(gate) * up

    def packed(x):
        gate, up = reference.halves(x, case.form.endswith("first"))
        return function(gate) * up

    return packed


def exact(case):
    return layer(case, lambda x: reference.activation(x, reference.NAMES.index(case.name)))


def draws_of(case, dtype, count=DRAWS):
    return [inputs_of(case._replace(seed=case.seed + 10 * draw), dtype) for draw in range(count)]


def standards_of(case, draws):
    plains = [plain.value_and_gradients(layer(case, EAGER[case.name]), *draw) for draw in draws]
    doubles = [(plain.doubled(inputs), plain.doubled(grads)) for inputs, grads in draws]
    return standards([plains], [plain.value_and_gradients(exact(case), *draw) for draw in doubles])


def results(case, draws):
    return [plain.value_and_gradients(served(case), *draw) for draw in draws]


@functools.lru_cache(maxsize=2)
def standard(case, dtype):
    return standards_of(case, draws_of(case, dtype))


def fits(case, dtype):
    return dtype is not torch.float16 or case.magnitude < 100


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(serving, dtype, case):
    if not fits(case, dtype):
        pytest.skip("float16 cannot hold the squares")
    mine = results(case, draws_of(case, dtype))
    assert all(t.dtype is dtype for result in mine for t in result)
    assert_as_exact(mine, standard(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_without_gradients_is_the_same(serving, case):
    inputs, grads = inputs_of(case, torch.float32)
    expected = plain.value_and_gradients(served(case), inputs, grads)[0]
    assert torch.equal(plain.value_and_gradients(served(case), inputs)[0], expected)


@pytest.mark.parametrize("name", EAGER)
def test_gradient_is_the_functions_slope(name):
    x = randn(50, dtype=torch.float64, magnitude=2.0).requires_grad_()
    kind = reference.NAMES.index(name)
    (expected,) = torch.autograd.grad(reference.activation(x, kind).sum(), x)
    torch.testing.assert_close(reference.activation_backward(torch.ones_like(x), x.detach(), kind), expected)


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 2 else t.T.contiguous().T,
    "outer_swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every_second": every_second,
    "misaligned": misaligned,
}


@pytest.mark.parametrize("form", ["alone", *FORMS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(serving, layout, form):
    case = Case(shape=(3, 4, 20), name="gelu", form=form)
    inputs, grads = inputs_of(case, torch.float32)
    strided = tuple(LAYOUTS[layout](t) for t in inputs)
    result = plain.value_and_gradients(served(case), strided, [LAYOUTS[layout](g) for g in grads])
    assert_as_exact([result], standards_of(case, [(inputs, grads)]))
    if layout == "outer_swapped" and form in ("alone", "gated"):
        assert laid_out_like(result[0], strided[0])


def test_special_values(serving):
    x = torch.tensor([0.0, -0.0, math.inf, math.nan, 3e38, -3e38, 1e-40])
    for name in ("relu", "silu", "gelu", "gelu_tanh", "quick_gelu"):
        # torch's own float32 GELU makes NaN of infinity and infinity of 3e38 on processors with AVX-512.
        torch.testing.assert_close(nearpeak.activation(x, name), EAGER[name](x.double()).float(), equal_nan=True)


def test_gelu_where_its_table_ends(serving):
    """Halfway between two polynomials, at the last one's end, and behind it."""
    x = torch.cat([torch.arange(-10, 10.25, 0.25), torch.tensor([-7.7500005, -7.7499995])])
    torch.testing.assert_close(
        nearpeak.activation(x, "gelu"),
        EAGER["gelu"](x.double()).float(),
        rtol=0.0,
        atol=2 * x.abs().max().item() * 2**-24,
    )


def test_denormal_numbers_stay(serving):
    for dtype in (torch.bfloat16, torch.float16):
        tiny = torch.finfo(dtype).tiny * torch.arange(1, 128).to(dtype) / 128
        assert torch.equal(nearpeak.activation(tiny, "relu"), tiny)
        x = torch.cat([torch.randn(100).to(dtype), tiny])
        assert torch.equal(nearpeak.activation(x, "relu"), x.clamp(min=0))


def test_threads_change_nothing():
    x = randn(300, 4000)
    together = nearpeak.swiglu(x, x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(nearpeak.swiglu(x, x), together)
    finally:
        torch.set_num_threads(threads)


def test_nothing_is_saved_but_the_inputs():
    gate, up = randn(8, 8).requires_grad_(), randn(8, 8).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        nearpeak.swiglu(gate, up)
    assert sorted(saved) == sorted([gate.data_ptr(), up.data_ptr()])


X = torch.ones(2, 8)
BAD = {
    "x_list": (TypeError, "x must", lambda: nearpeak.activation([1.0], "relu")),
    "x_int": (TypeError, "x must", lambda: nearpeak.activation(X.int(), "relu")),
    "x_scalar": (ValueError, "x must", lambda: nearpeak.activation(torch.tensor(1.0), "relu")),
    "name": (ValueError, "name must be one of relu", lambda: nearpeak.activation(X, "mish")),
    "gate_int": (TypeError, "gate must", lambda: nearpeak.swiglu(X.int(), X.int())),
    "gate_none": (TypeError, "gate must", lambda: nearpeak.swiglu(None)),
    "gate_odd": (ValueError, "gate must hold", lambda: nearpeak.swiglu(X[:, :7])),
    "up_list": (TypeError, "up must", lambda: nearpeak.swiglu(X, [1.0])),
    "up_shape": (ValueError, "up must", lambda: nearpeak.swiglu(X, X[:1])),
    "up_dtype": (TypeError, "up must", lambda: nearpeak.swiglu(X, X.half())),
    "up_meta": (ValueError, "up must", lambda: nearpeak.swiglu(X, X.to("meta"))),
    "up_first": (ValueError, "up_first tells", lambda: nearpeak.swiglu(X, X, up_first=True)),
    "approximate": (ValueError, "approximate must be one of none", lambda: nearpeak.geglu(X, X, "erf")),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(serving, bad):
    error, message, run = BAD[bad]
    with pytest.raises(error, match=message):
        run()


@st.composite
def cases(draw):
    form = draw(st.sampled_from(["alone", *FORMS]))
    return Case(
        shape=(*draw(st.lists(st.integers(0, 4), max_size=3)), draw(st.integers(1, 300))),
        name=draw(st.sampled_from(list(EAGER if form == "alone" else GATED))),
        form=form,
        magnitude=draw(st.sampled_from([0.1, 1.0, 10.0])),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_cases_are_as_exact_as_plain(serving, dtype, examples):
    @for_all(examples, case=cases())
    def check(case):
        draws = draws_of(case, dtype, examples.draws)
        assert_as_exact(results(case, draws), standards_of(case, draws))
