"""The Triton kernels of QK-norm, held to the rule that tests/test_qk_norm.py holds every backend to."""

import nearpeak
import plain
import pytest
import test_qk_norm as qk_norm
import torch
from draws import assert_as_exact
from inputs import DTYPES
from nearpeak import triton_row_tiles
from nearpeak.norm import triton_qk_norm
from test_qk_norm import Case

CASES = [case for case in qk_norm.CASES if case.sequence < 30 and case.head_dim < 300]


def draws_of(case, dtype):
    """Rounding to 16 bits drowns what float32 sums do by chance; float32 itself takes more draws to judge."""
    return qk_norm.draws_of(case, dtype, 3 if dtype is torch.float32 else 1)


def judge(case, draws):
    assert_as_exact(qk_norm.results(case, draws), qk_norm.standards_of(case, draws))


@pytest.mark.parametrize("case", CASES, ids=qk_norm.case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(dtype, case):
    judge(case, draws_of(case, dtype))


def test_programs_that_walk_over_several_tiles(monkeypatch):
    for name in ("forward_tile", "backward_tile"):
        monkeypatch.setattr(
            triton_qk_norm, name, lambda *sizes: triton_row_tiles.Tile(2, 32, triton_qk_norm.RESIDENT_THREADS)
        )
    case = Case(head_dim=20)
    judge(case, draws_of(case, torch.float32))


def test_rows_too_wide_for_registers(blocks):
    case = Case(sequence=2, head_dim=100)
    judge(case, draws_of(case, torch.float32))


@pytest.mark.parametrize("layout", qk_norm.LAYOUTS)
def test_layouts(layout):
    qk_norm.check_layout(torch.bfloat16, layout, draws_of(Case(head_dim=34), torch.bfloat16))
    qk_norm.check_layouts_of_gradients(layout, draws_of(Case(head_dim=34), torch.float32))


def test_heads_are_read_where_they_lie(monkeypatch):
    """No layout whose last dimension is dense is copied, forward or backward."""
    copies, dense = [], triton_qk_norm._dense
    monkeypatch.setattr(triton_qk_norm, "_dense", lambda t: copies.append(dense(t) is not t) or dense(t))
    inputs, grads = qk_norm.inputs_of(Case(head_dim=34), torch.float32)
    for layout in ("packed", "in_a_cache", "padded", "expanded"):
        parts, parts_grads = (qk_norm.LAYOUTS[layout](*pair) for pair in (inputs[:2], grads))
        plain.value_and_gradients(qk_norm.served(Case()), (*parts, *inputs[2:]), parts_grads)
    assert len(copies) == 4 * (4 + 6)
    assert not any(copies)


def test_positions_may_lie_further_apart_than_32_bits_count(far_apart):
    query = far_apart((1, 2, 2, 8), torch.float16)
    result = nearpeak.qk_norm(query, query[:, :1])
    expected = nearpeak.qk_norm(query.contiguous(), query[:, :1].contiguous())
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
