"""The Triton kernel of rotary embedding, held to the rule that tests/test_rotary.py holds every backend to."""

import nearpeak
import pytest
import test_rotary as rotary
import torch
from draws import assert_as_exact
from inputs import DTYPES, laid_out_like
from nearpeak.rotary import triton_rotary
from test_rotary import Case

CASES = [
    *(Case(head_dim=head_dim, interleaved=half) for head_dim in (2, 6, 34, 80) for half in (False, True)),
    *(Case(table=table, interleaved=half) for table in rotary.TABLES for half in (False, True)),
    *(Case(table=table, table_dtype=torch.float32, head_dim=34) for table in rotary.TABLES[:3]),
    *(Case(sequence=sequence, head_dim=6) for sequence in (0, 1, 33)),
    *(Case(heads=heads, key_heads=keys, head_dim=6) for heads, keys in ((1, 1), (17, 8), (4, 0), (0, 2), (0, 0))),
    *(Case(batch=0, table=table) for table in ("shared", "per_batch")),
    Case(batch=1, heads=1, sequence=3, head_dim=256),
    *(
        Case(head_dim=head_dim, rotary_dim=rotary_dim, interleaved=half)
        for head_dim, rotary_dim in ((7, 4), (80, 20), (80, 32))
        for half in (False, True)
    ),
]


def judge(case, dtype, draws):
    results = rotary.results(case, dtype, draws)
    assert_as_exact(results, rotary.standards_of(case, dtype, draws))
    return results


@pytest.mark.parametrize("case", CASES, ids=rotary.case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(dtype, case):
    judge(case, dtype, [rotary.inputs_of(case, dtype)])


@pytest.mark.parametrize("case", CASES[::3], ids=rotary.case_name)
def test_in_place_and_without_gradients_are_the_same(case):
    rotary.test_in_place_and_without_gradients_are_the_same(None, case)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_a_head_dim_of_several_column_tiles(monkeypatch, interleaved):
    monkeypatch.setattr(triton_rotary, "PAIRS", 32)
    case = Case(head_dim=66, sequence=2, batch=1, interleaved=interleaved)
    for rotary_dim in (None, 34):
        case = case._replace(rotary_dim=rotary_dim)
        judge(case, torch.float32, [rotary.inputs_of(case, torch.float32)])


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("layout", [*rotary.LAYOUTS, "packed", "expanded_heads"])
def test_layouts_of_inputs_are_kept(layout, interleaved):
    case = Case(head_dim=34, interleaved=interleaved)
    inputs, grads = rotary.inputs_of(case, torch.bfloat16)
    inputs = rotary.laid_out(layout, *inputs)
    (results,) = judge(case, torch.bfloat16, [(inputs, grads)])
    assert all(laid_out_like(tensor, like) for tensor, like in zip(results[:2], inputs, strict=True))


@pytest.mark.parametrize("layout", [*rotary.LAYOUTS, "packed"])
def test_in_place_writes_only_its_own_elements(layout):
    for rotary_dim in (None, 20):
        rotary.test_in_place_writes_only_its_own_elements(None, torch.float16, layout, rotary_dim)


def test_what_does_not_turn_passes_through_bit_by_bit():
    rotary.test_what_does_not_turn_passes_through_bit_by_bit(None)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_layouts_of_tables(interleaved):
    rotary.test_layouts_of_tables(None, interleaved)


def test_positions_may_lie_further_apart_than_32_bits_count(far_apart):
    query = far_apart((1, 2, 2, 8), torch.float16)
    cos, sin = rotary.tables(Case(sequence=2, head_dim=8), torch.float16)
    expected = nearpeak.apply_rotary(query.contiguous(), query.contiguous(), cos, sin)
    result = nearpeak.apply_rotary(query, query[:, :1], cos, sin)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1][:, :1])
