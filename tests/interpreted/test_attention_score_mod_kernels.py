"""Score programs in attention's Triton kernels, held to the rule of tests/test_attention_score_mod.py."""

import nearpeak
import pytest
import test_attention_score_mod as score_mod
import torch
from draws import assert_as_exact
from inputs import DTYPES, some_by_default
from nearpeak import backends
from nearpeak.attention import triton_score_mod
from test_attention import Case, draws_of, inputs_of, values

WIDE = Case(9, 21, heads=4, key_heads=2)
FEW = Case(3, 37, heads=4, key_heads=2)
# Every instruction once; the masks; what goes beside it.
MODS = [mod for mod in score_mod.MODS if mod not in ("relative", "softcap", "powers")]
CASES = [
    *((WIDE, mod, None) for mod in MODS),
    *((WIDE, None, mask) for mask in ("either", "heads", "some rows see nothing")),
    (FEW, "table", "either"),
    (Case(17, 21, heads=4, key_heads=2, window=(6, None), softcap=5.0, causal=True), "sigmoid", "heads"),
    (FEW._replace(softcap=2.0), "alibi", None),
    (Case(5, 0), "relative", "causal"),
]


def judge(case, mod, mask, dtype, count):
    draws = draws_of(case, dtype, count=count)[:count]
    assert_as_exact(values(score_mod.served(case, mod, mask), draws), score_mod.standards_of(case, mod, mask, draws))


@pytest.mark.parametrize("case", some_by_default(CASES, 2, lambda case: "-".join(map(score_mod.name_of, case))))
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_forward_and_gradients_are_as_exact_as_plain(dtype, case):
    judge(*case, dtype, 8 if dtype is torch.float32 else 2)


def test_an_element_that_is_not_there_is_nan():
    score_mod.test_an_element_that_is_not_there_is_nan(None)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "ranges"])
def test_places_are_counted_in_the_tensors(packed):
    score_mod.test_places_are_counted_in_the_tensors(None, packed)


def test_the_gradient_of_a_bias_behind_it():
    """Of a bias that broadcasts, which a kernel of its own makes."""
    (query, key, value), _ = inputs_of(WIDE, torch.float32)
    mod, bias = nearpeak.trace_score_mod(score_mod.MODS["table"]), torch.randn(1, 4, 9, 21).requires_grad_()

    def gradient():
        out = nearpeak.attention(query, key, value, bias=bias, score_mod=mod)
        return torch.autograd.grad(out.square().sum(), bias)[0]

    mine = gradient()
    with nearpeak.use_backend("reference"):
        torch.testing.assert_close(mine, gradient())


def test_programs_without_a_kernel_are_plain_pytorchs():
    inputs, _ = inputs_of(WIDE, torch.float32)
    tables = [torch.zeros(21) for _ in range(triton_score_mod.MOST_TABLES + 1)]
    mods = {
        "power": lambda s, b, h, q, k: (s.abs() + 1.0) ** 1.5,
        "more than 4 tensors": lambda s, b, h, q, k: s + sum(table[k] for table in tables),
    }
    for reason, mod in mods.items():
        with backends.noting_reasons() as reasons:
            out = nearpeak.attention(*inputs, score_mod=mod)
        assert any(reason in each for each in reasons)
        with nearpeak.use_backend("reference"):
            assert torch.equal(out, nearpeak.attention(*inputs, score_mod=mod))
