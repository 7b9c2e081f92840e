"""Linear layers with a low-rank update: as exact as the separate calls, forward and backward, on every path."""

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
from nearpeak.linear import operator


class Case(NamedTuple):
    rows: tuple = (5,)
    inputs: int = 64
    outputs: int = 21
    rank: int = 8
    scale: float = 2.0
    activation: str | None = None
    residual: bool = False
    bias: bool = True
    seed: int = 0


CASES = [
    # How many rows of x are taken together, from one up to blocks; with matrix units 3 to 64 are a third path.
    *(Case(rows=(rows,)) for rows in (1, 2, 3, 8, 17, 40, 66, 97)),
    *(Case(rows=(rows,), rank=rank) for rows in (1, 5, 40) for rank in (1, 3, 16, 33, 65)),
    *(Case(rows=(rows,), activation="silu", residual=True, bias=False) for rows in (1, 5, 40)),
    *(Case(rows=(rows,), outputs=outputs, inputs=77) for rows in (3, 20) for outputs in (1, 16, 97)),
    Case(rows=()),
    Case(rows=(2, 3, 7), scale=0.3),
    *(Case(rows=(rows,), inputs=1088, outputs=9) for rows in (1, 20)),
    Case(rows=(270,), outputs=790, inputs=32, rank=4),
]


def inputs_of(case, dtype):
    """x, weight, A, B, bias, residual; and y's gradient."""
    shape = *case.rows, case.outputs
    x = randn(*case.rows, case.inputs, dtype=dtype, seed=case.seed)
    weight = randn(case.outputs, case.inputs, dtype=dtype, seed=case.seed + 1)
    a = randn(case.rank, case.inputs, dtype=dtype, seed=case.seed + 2)
    b = randn(case.outputs, case.rank, dtype=dtype, seed=case.seed + 3)
    bias = randn(case.outputs, dtype=dtype, seed=case.seed + 4) if case.bias else None
    residual = randn(*shape, dtype=dtype, seed=case.seed + 5) if case.residual else None
    return (x, weight, a, b, bias, residual), (randn(*shape, dtype=dtype, seed=case.seed + 6),)


def draws_of(case, dtype, count=DRAWS):
    return [inputs_of(case._replace(seed=case.seed + 10 * draw), dtype) for draw in range(count)]


def separately(case, x, weight, a, b, bias, residual):
    """What users have without a kernel."""
    y = F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * case.scale
    y = F.silu(y) if case.activation else y
    return y if residual is None else y + residual


def served(case, x, weight, a, b, bias, residual):
    return nearpeak.lora_linear(x, weight, a, b, case.scale, bias, activation=case.activation, residual=residual)


def exact(case, inputs):
    return separately(case, *plain.doubled(inputs))


def standards_of(case, draws):
    return standards(
        [[(separately(case, *inputs),) for inputs, _ in draws]], [(exact(case, inputs),) for inputs, _ in draws]
    )


@functools.lru_cache(maxsize=2)
def standard(case, dtype):
    return standards_of(case, draws_of(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_separate_calls(serving, dtype, case):
    mine = [(served(case, *inputs),) for inputs, _ in draws_of(case, dtype)]
    assert all(y.dtype is dtype and y.is_contiguous() for (y,) in mine)
    assert_as_exact(mine, standard(case, dtype))


def gradients(function, case, draws, double=False):
    found = []
    for inputs, grads in draws:
        inputs, upstream = (plain.doubled(t) if double else t for t in (inputs, grads))
        found.append(plain.value_and_gradients(lambda *i: function(case, *i), inputs, upstream)[1:])
    return found


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_as_exact(serving, dtype, activation, rows):
    case = Case(rows=(rows,), activation=activation, residual=True)
    draws = draws_of(case, dtype, MOST_DRAWS)
    standard = standards([gradients(separately, case, draws)], gradients(separately, case, draws, double=True))
    assert_as_exact(gradients(served, case, draws), standard)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("layout", [every_second, misaligned, padded], ids=lambda f: f.__name__)
def test_layouts(serving, layout, rows):
    case = Case(rows=(rows,), residual=True)
    draws = draws_of(case, torch.float32)
    assert_as_exact([(served(case, *map(layout, inputs)),) for inputs, _ in draws], standards_of(case, draws))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(serving, dtype, rows):
    if serving == "reference":
        pytest.skip("torch's own products make no such promise")
    case = Case(rows=(rows,), inputs=512, outputs=700)
    inputs, _ = inputs_of(case, dtype)
    first = served(case, *inputs)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(served(case, *inputs), first)


@pytest.mark.parametrize("sizes", [{"rows": (0,)}, {"outputs": 0}, {"rank": 0}], ids=str)
def test_empty(serving, sizes):
    case = Case(**sizes)
    inputs, _ = inputs_of(case, torch.float32)
    assert served(case, *inputs).shape == (*case.rows, case.outputs)
    torch.testing.assert_close(served(case, *inputs), separately(case, *inputs), rtol=1e-5, atol=1e-5)


def test_calls_of_many_rows_go_to_torch_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(operator, "FAST_IN_TORCH", frozenset([torch.float32]))
    case = Case(rows=(40,), activation="silu", residual=True)
    draws = draws_of(case, torch.float32)
    said = nearpeak.explain(served, case, *draws[0][0])
    assert "and the low-rank update after it" in said
    assert_as_exact([(served(case, *inputs),) for inputs, _ in draws], standards_of(case, draws))
    standard = standards([gradients(separately, case, draws)], gradients(separately, case, draws, double=True))
    assert_as_exact(gradients(served, case, draws), standard)


def test_special_values(serving):
    case = Case(rows=(3,), bias=False)
    (x, weight, a, b, _, _), _ = inputs_of(case, torch.float32)
    x[0, 3], x[1, 3] = math.inf, math.nan
    found = served(case, x, weight, a, b, None, None)
    assert not found[:2].isfinite().any()
    torch.testing.assert_close(found[2], separately(case, x, weight, a, b, None, None)[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_merges_and_unmerges(dtype):
    linear = nearpeak.nn.Linear(64, 21, dtype=dtype, activation="silu")
    layer = nearpeak.nn.LoRALinear.from_linear(linear, rank=4, alpha=8)
    x, before = randn(5, 64, dtype=dtype), linear.weight.detach().clone()
    assert torch.equal(layer(x), linear(x)), "B starts as zeros"
    layer.lora_b.data.normal_()
    layer(x).float().sum().backward()
    assert layer.lora_a.grad is not None
    assert layer.weight.grad is None
    apart = layer(x).detach()
    layer.merge()
    layer.merge()
    assert layer.weight is linear.weight
    step = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x).detach(), apart, rtol=step, atol=64 * step)
    layer.unmerge()
    layer.unmerge()
    largest = float((2 * layer.lora_b.float() @ layer.lora_a.float()).detach().abs().max()) + 1
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=largest * torch.finfo(dtype).eps)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_a", "lora_b"]
    assert "rank=4, alpha=8" in repr(layer)


X, WEIGHT, A, B = torch.ones(2, 8), torch.ones(3, 8), torch.ones(4, 8), torch.ones(3, 4)
BAD_CALLS = {
    "x_int": (TypeError, "x must", lambda: nearpeak.lora_linear(X.int(), WEIGHT, A, B, 1.0)),
    "weight_shape": (ValueError, "weight must", lambda: nearpeak.lora_linear(X, WEIGHT[:, :4], A, B, 1.0)),
    "a_shape": (ValueError, "lora_a must", lambda: nearpeak.lora_linear(X, WEIGHT, A[:, :4], B, 1.0)),
    "a_vector": (ValueError, "lora_a must", lambda: nearpeak.lora_linear(X, WEIGHT, A[0], B, 1.0)),
    "a_none": (TypeError, "lora_a must", lambda: nearpeak.lora_linear(X, WEIGHT, None, B, 1.0)),
    "b_shape": (ValueError, "lora_b must", lambda: nearpeak.lora_linear(X, WEIGHT, A, B.mT, 1.0)),
    "b_dtype": (TypeError, "lora_b must", lambda: nearpeak.lora_linear(X, WEIGHT, A, B.half(), 1.0)),
    "scale": (TypeError, "scale must", lambda: nearpeak.lora_linear(X, WEIGHT, A, B, "1")),
    "bias": (ValueError, "bias must", lambda: nearpeak.lora_linear(X, WEIGHT, A, B, 1.0, X[0])),
    "residual": (ValueError, "residual must", lambda: nearpeak.lora_linear(X, WEIGHT, A, B, 1.0, residual=X)),
    "activation": (ValueError, "activation must", lambda: nearpeak.lora_linear(X, WEIGHT, A, B, 1.0, activation="no")),
    "rank": (ValueError, "rank must", lambda: nearpeak.nn.LoRALinear(8, 3, rank=0)),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_calls_are_named(serving, bad):
    error, message, run = BAD_CALLS[bad]
    with pytest.raises(error, match=message):
        run()
