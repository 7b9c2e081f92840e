"""Linear layers: as exact as PyTorch's own on every backend and instruction set, forward and backward."""

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
from nearpeak.linear import operator, reference
from torch.utils.checkpoint import checkpoint


class Case(NamedTuple):
    rows: tuple = (5,)
    inputs: int = 37
    outputs: int = 21
    bias: bool = True
    magnitude: float = 1.0
    seed: int = 0


CASES = [
    Case(),
    Case(bias=False),
    Case(rows=()),
    Case(rows=(2, 3, 7)),
    *(Case(rows=(rows,)) for rows in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 97, 257)),
    *(Case(rows=(rows,), inputs=width) for rows in (3, 20) for width in (1, 7, 8, 16, 31, 32, 33, 64, 257, 1025)),
    *(Case(rows=(rows,), outputs=width) for rows in (3, 20) for width in (1, 6, 7, 12, 13, 16, 95, 97, 389)),
    Case(rows=(40,), inputs=1, outputs=1),
    # Around the edges of matrix units' tiles, of 32 rows of x and of the weight, and 32 inputs.
    *(
        Case(rows=(rows,), inputs=inputs, outputs=outputs)
        for rows, inputs, outputs in ((5, 31, 33), (16, 32, 32), (17, 33, 31), (32, 64, 65), (33, 95, 16), (65, 32, 33))
    ),
    # More than one block: rows of the weight, of x, and steps; in each of the three products.
    Case(rows=(390,), inputs=70, outputs=5),
    Case(rows=(3,), inputs=1031, outputs=29),
    Case(rows=(40,), inputs=300, outputs=270),
    # Long sums, whose rounding shows in float32.
    *(Case(rows=(rows,), inputs=4099, outputs=9) for rows in (1, 2, 4, 7, 20)),
    Case(rows=(12,), inputs=5, outputs=1031),
    *(Case(rows=(rows,), magnitude=magnitude) for rows in (3, 20) for magnitude in (1e-20, 1e-3, 100.0)),
]


def inputs_of(case, dtype):
    x = randn(*case.rows, case.inputs, dtype=dtype, seed=case.seed, magnitude=case.magnitude)
    weight = randn(case.outputs, case.inputs, dtype=dtype, seed=case.seed + 1)
    bias = randn(case.outputs, dtype=dtype, seed=case.seed + 2, magnitude=case.magnitude) if case.bias else None
    return (x, weight, bias), [randn(*case.rows, case.outputs, dtype=dtype, seed=case.seed + 3)]


def draws_of(case, dtype, count=DRAWS):
    return [inputs_of(case._replace(seed=case.seed + 10 * draw), dtype) for draw in range(count)]


def standards_of(draws):
    plains = [plain.value_and_gradients(F.linear, *draw) for draw in draws]
    doubles = [(plain.doubled(inputs), plain.doubled(grads)) for inputs, grads in draws]
    return standards([plains], [plain.value_and_gradients(F.linear, *draw) for draw in doubles])


def results(draws):
    return [plain.value_and_gradients(nearpeak.linear, *draw) for draw in draws]


@functools.lru_cache(maxsize=2)
def standard(case, dtype):
    return standards_of(draws_of(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(serving, dtype, case):
    mine = results(draws_of(case, dtype))
    assert all(t.dtype is dtype and t.is_contiguous() for result in mine for t in result)
    assert_as_exact(mine, standard(case, dtype))


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gradients_is_the_same(serving, dtype, rows):
    inputs, grads = inputs_of(Case(rows=(rows,)), dtype)
    expected = plain.value_and_gradients(nearpeak.linear, inputs, grads)[0]
    assert torch.equal(plain.value_and_gradients(nearpeak.linear, inputs)[0], expected)


def test_float64_keeps_its_digits():
    (x, weight, bias), _ = inputs_of(Case(), torch.float64)
    torch.testing.assert_close(nearpeak.linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-13, atol=1e-13)


LAYOUTS = {
    "swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 2 else t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every_second": every_second,
    "misaligned": misaligned,
    "padded": padded,
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("rows", [(2, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(serving, dtype, layout, rows):
    inputs, grads = inputs_of(Case(rows=rows, inputs=20), dtype)
    strided, strided_grads = (tuple(LAYOUTS[layout](t) for t in tensors) for tensors in (inputs, grads))
    result = plain.value_and_gradients(nearpeak.linear, strided, strided_grads)
    dense = tuple(t.contiguous() for t in strided), tuple(t.contiguous() for t in strided_grads)
    assert_as_exact([result], standards_of([dense]))
    assert result[0].is_contiguous()


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0), (20, 0, 5), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(serving, dtype, shape):
    rows, width, outputs = shape
    inputs, grads = inputs_of(Case(rows=(rows,), inputs=width, outputs=outputs), dtype)
    expected = plain.value_and_gradients(F.linear, inputs, grads)
    for mine, theirs in zip(plain.value_and_gradients(nearpeak.linear, inputs, grads), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(serving, dtype, rows):
    x, weight, bias = torch.ones(rows, 9, dtype=dtype), torch.ones(11, 9, dtype=dtype), torch.zeros(11, dtype=dtype)
    x[0, 3], x[1, 3], weight[4, 5], bias[6] = math.inf, math.nan, -math.inf, math.inf
    x[2] = torch.finfo(dtype).max / 16
    expected = F.linear(x.double(), weight.double(), bias.double()).to(dtype)
    torch.testing.assert_close(nearpeak.linear(x, weight, bias), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40, 300])
def test_threads_change_nothing(serving, dtype, rows):
    if serving == "reference":
        pytest.skip("torch's own products make no such promise")
    inputs, grads = inputs_of(Case(rows=(rows,), inputs=500, outputs=700), dtype)
    first = plain.value_and_gradients(nearpeak.linear, inputs, grads)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again = plain.value_and_gradients(nearpeak.linear, inputs, grads)
        # Not the bias's gradient, which is torch's own sum.
        assert all(torch.equal(mine, expected) for mine, expected in zip(again[:3], first[:3], strict=True))


@pytest.mark.parametrize("rows", [3, 20])
def test_a_rows_result_does_not_depend_on_the_others(serving, rows):
    (x, weight, bias), _ = inputs_of(Case(rows=(rows,), inputs=300), torch.float32)
    together = nearpeak.linear(x, weight, bias)
    alone = torch.cat([nearpeak.linear(row[None].repeat(rows, 1), weight, bias)[:1] for row in x])
    assert torch.equal(together, alone)


def test_nothing_is_saved_but_the_inputs(serving):
    (x, weight, bias), _ = inputs_of(Case(), torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        nearpeak.linear(*leaves)
    if serving != "reference":
        assert sorted(saved) == sorted([x.data_ptr(), weight.data_ptr()])


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_no_gradient_is_computed_that_nobody_wants(frozen):
    inputs, grads = inputs_of(Case(), torch.bfloat16)
    leaves = [t.requires_grad_(i != frozen) for i, t in enumerate(inputs)]
    with nearpeak.use_backend("cpu"):
        nearpeak.linear(*leaves).backward(*grads)
    assert [t.grad is None for t in leaves] == [i == frozen for i in range(3)]


def test_checkpointing_changes_nothing():
    (x, weight, bias), (grad,) = inputs_of(Case(rows=(20,)), torch.bfloat16)

    def gradients(function):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(function(*leaves), leaves, grad)

    expected = gradients(nearpeak.linear)
    found = gradients(lambda *leaves: checkpoint(nearpeak.linear, *leaves, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_torch_does(serving, dtype):
    inputs, _ = inputs_of(Case(), torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        mine, theirs = nearpeak.linear(*inputs), F.linear(*inputs)
    assert mine.dtype is theirs.dtype
    assert torch.equal(mine, nearpeak.linear(*(t.to(dtype) for t in inputs)))


def test_autocast_leaves_float64_alone_as_torch_does():
    inputs, _ = inputs_of(Case(), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nearpeak.linear(*inputs).dtype is F.linear(*inputs).dtype


def explained(rows, dtype=torch.float32, outputs=operator.FEW_OUTPUTS):
    return nearpeak.explain(nearpeak.linear, torch.ones(rows, 4, dtype=dtype), torch.ones(outputs, 4, dtype=dtype))


def test_torch_serves_what_it_is_faster_at_and_explain_says_so():
    assert "nearpeak::linear_inference on cpu, float32" in explained(operator.few_rows(torch.float32))
    thin = explained(operator.few_rows(torch.float32) + 1, outputs=operator.FEW_OUTPUTS - 1)
    assert thin.endswith("torch's linear serves it")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = "nearpeak::linear_inference" in explained(operator.few_rows(dtype) + 1, dtype)
        assert ours == (dtype not in operator.FAST_IN_TORCH)
    with nearpeak.use_backend("cpu"):
        assert "nearpeak::linear_inference" in explained(operator.few_rows(torch.float32) + 1)


def test_other_devices_are_torchs():
    x, weight = torch.ones(2, 4, device="meta"), torch.ones(3, 4, device="meta")
    assert nearpeak.linear(x, weight).shape == (2, 3)
    said = nearpeak.explain(nearpeak.linear, x, weight)
    assert said == "on meta torch's own library is the one to use: torch's linear serves it"


def test_no_other_backend_can_be_forced(monkeypatch):
    monkeypatch.setattr("nearpeak.backends._forced", "triton")
    with pytest.raises(RuntimeError, match="'triton' has no kernel for this operation, only cpu"):
        nearpeak.linear(X, WEIGHT)


def test_gradient_formulas_of_the_reference_are_the_derivative():
    (x, weight, bias), (grad,) = inputs_of(Case(rows=(2, 3)), torch.float64)
    expected = plain.value_and_gradients(reference.linear, (x, weight, bias), (grad,))
    torch.testing.assert_close(reference.linear_input_gradient(grad, weight), expected[1])
    torch.testing.assert_close(reference.linear_weight_gradient(grad, x), expected[2])
    torch.testing.assert_close(reference.linear_bias_gradient(grad), expected[3])


X, WEIGHT, BIAS = torch.ones(2, 8), torch.ones(3, 8), torch.ones(3)
BAD = {
    "x_list": (TypeError, "x must", lambda: nearpeak.linear([1.0], WEIGHT)),
    "x_int": (TypeError, "x must", lambda: nearpeak.linear(X.int(), WEIGHT.int())),
    "x_scalar": (ValueError, "x must", lambda: nearpeak.linear(torch.tensor(1.0), WEIGHT)),
    "weight_none": (TypeError, "weight must", lambda: nearpeak.linear(X, None)),
    "weight_dtype": (TypeError, "weight must", lambda: nearpeak.linear(X, WEIGHT.half())),
    "weight_meta": (ValueError, "weight must", lambda: nearpeak.linear(X, WEIGHT.to("meta"))),
    "weight_vector": (ValueError, "weight must", lambda: nearpeak.linear(X, WEIGHT[0])),
    "weight_width": (ValueError, "weight must", lambda: nearpeak.linear(X, WEIGHT[:, :7])),
    "bias_list": (TypeError, "bias must", lambda: nearpeak.linear(X, WEIGHT, [1.0])),
    "bias_dtype": (TypeError, "bias must", lambda: nearpeak.linear(X, WEIGHT, BIAS.half())),
    "bias_shape": (ValueError, "bias must", lambda: nearpeak.linear(X, WEIGHT, BIAS[:2])),
    "bias_matrix": (ValueError, "bias must", lambda: nearpeak.linear(X, WEIGHT, BIAS[None])),
    "many_rows": (ValueError, "bias must", lambda: nearpeak.linear(X.repeat(20, 1), WEIGHT, BIAS[:1])),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(serving, bad):
    error, message, run = BAD[bad]
    with pytest.raises(error, match=message):
        run()


@st.composite
def cases(draw):
    # Small: the plain layer is a naive loop in 16 bits on many processors.
    return Case(
        rows=tuple(draw(st.lists(st.integers(1, 6), max_size=2))),
        inputs=draw(st.integers(1, 130)),
        outputs=draw(st.integers(1, 130)),
        bias=draw(st.booleans()),
        magnitude=draw(st.sampled_from([0.1, 1.0, 10.0])),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_cases_are_as_exact_as_plain(serving, dtype, examples):
    @for_all(examples, case=cases())
    def check(case):
        draws = draws_of(case, dtype, examples.draws)
        assert_as_exact(results(draws), standards_of(draws))
