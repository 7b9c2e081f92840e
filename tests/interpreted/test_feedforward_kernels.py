"""The Triton kernels of the feed-forward activations, held to the rule of tests/test_feedforward.py."""

import pytest
import test_feedforward as feedforward
import torch
from draws import assert_as_exact
from inputs import DTYPES
from nearpeak.feedforward import triton_feedforward
from test_feedforward import Case

CASES = [
    *(Case(name=name) for name in feedforward.EAGER),
    *(Case(name=name, form=form) for name in feedforward.GATED for form in feedforward.FORMS),
    *(Case(shape, "gelu", form) for shape in feedforward.SHAPES[:-1] for form in ("alone", "gated", "packed")),
]


def judge(case, dtype):
    draws = feedforward.draws_of(case, dtype, 2)
    assert_as_exact(feedforward.results(case, draws), feedforward.standards_of(case, draws))


@pytest.mark.parametrize("case", CASES, ids=feedforward.case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(dtype, case):
    judge(case, dtype)


@pytest.mark.parametrize("form", ["gated", "packed"])
def test_rows_of_several_blocks_and_launches(monkeypatch, form):
    monkeypatch.setattr(triton_feedforward, "BLOCK_BYTES", 64)
    monkeypatch.setattr(triton_feedforward, "MOST_ROWS", 2)
    judge(Case((5, 37), "silu", form), torch.float32)


@pytest.mark.parametrize("form", ["alone", *feedforward.FORMS])
@pytest.mark.parametrize("layout", feedforward.LAYOUTS)
def test_layouts(layout, form):
    feedforward.test_layouts(None, layout, form)
