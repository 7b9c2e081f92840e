"""The Triton kernels of attention's gradients, held to the rule that tests/test_attention.py holds every backend to."""

import pytest
import test_attention as attention
import test_attention_backward as backward
import torch
from draws import assert_as_exact
from exactness import assert_as_exact_as_plain
from inputs import DTYPES, every_second, padded, sequence_first
from nearpeak.attention import triton_tiles
from test_attention import Case

# Around the edges of tiles of 32, 64 and 128.
LENGTHS = [(1, 2), (31, 33), (32, 32), (65, 63), (64, 129)]
CASES = [
    *(Case(q, k, heads=1, causal=causal) for q, k in LENGTHS for causal in (False, True)),
    *(Case(33, 40, window=window) for window in attention.WINDOWS[1::2]),
    *(Case(40, 33, window=window) for window in ((3, 5), (None, -3), (-3, None), (-2, 5))),
    *(Case(150, 200, window=window) for window in ((70, 0), (70, 20), (-20, 90))),
    *(Case(40, 70, head_dim=head_dim, causal=True) for head_dim in (1, 17, 80, 128, 256)),
    *(Case(5, 19, heads=heads, key_heads=kv, batch=2, causal=True) for heads, kv in ((1, 1), (3, 1), (6, 2), (8, 8))),
    *(Case(30, 45, heads=heads, key_heads=1, window=(10, 5)) for heads in (5, 8)),
    *(Case(softcap=softcap, causal=causal) for softcap in (1.0, 50.0) for causal in (False, True)),
    Case(softcap=20.0, magnitude=30.0, scale=1.0),
    *(Case(scale=scale, softcap=softcap, causal=True) for scale in (0.0, -0.3) for softcap in (None, 2.0)),
    Case(magnitude=1e-3, causal=True),
    *(Case(q, k) for q, k in ((0, 5), (5, 0), (0, 0))),
    *(Case(batch=0), Case(heads=0, key_heads=0), Case(heads=0, key_heads=2)),
]
# Rows that see one key or as good as one: what is left of their scores' gradients is as small as the rounding of
# products, which must be the same in every kernel.
ONE_KEY = [
    Case(1, 1, heads=1),
    Case(2, 1, heads=1, causal=True),
    Case(40, 33, window=(0, 0)),
    Case(magnitude=10.0, causal=True),
    *backward.FAR_FROM_ZERO,
]


def draws_of(case, dtype):
    """Rounding to 16 bits drowns what float32 sums do by chance; float32 itself takes more draws to judge."""
    return attention.draws_of(case, dtype)[: 2 if dtype is torch.float32 else 1]


def judge(case, draws):
    assert_as_exact(attention.values(attention.served(case), draws), attention.standards_of(case, draws))


@pytest.mark.parametrize("case", CASES, ids=attention.case_name)
def test_gradients_are_as_exact_as_plain(case):
    judge(case, draws_of(case, torch.float32))


@pytest.mark.parametrize("case", [*CASES[::3], *backward.FAR_FROM_ZERO], ids=attention.case_name)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gradients_in_16_bits_are_as_exact_as_plain(dtype, case):
    judge(case, draws_of(case, dtype))


@pytest.mark.parametrize("case", ONE_KEY, ids=attention.case_name)
def test_rows_of_one_key_are_as_exact_as_plain(rounded_once, case):
    judge(case, draws_of(case, torch.float32))


@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (128, 32)], ids=str)
def test_any_tile_gives_the_same(monkeypatch, tile):
    tile = triton_tiles.Tile(*tile, warps=4, stages=1)
    monkeypatch.setattr(triton_tiles, "backward_tiles", lambda *sizes: (tile, tile))
    for window in ((20, 0), (3, 40), (None, None)):
        case = Case(40, 90, heads=6, key_heads=2, window=window)
        judge(case, draws_of(case, torch.float16))


@pytest.mark.parametrize("window", [(None, -1000), (-1000, None), (-3, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys_have_zero_gradients(dtype, window):
    attention.test_rows_without_keys_are_zero_with_lse_minus_infinity(None, dtype, window)


def test_a_row_without_keys_spoils_no_gradient():
    backward.test_a_row_without_keys_spoils_no_gradient(None)


def test_no_gradient_of_lse_is_a_gradient_of_zero():
    backward.test_no_gradient_of_lse_is_a_gradient_of_zero(None)


@pytest.mark.parametrize("layout", [sequence_first, padded, every_second], ids=lambda layout: layout.__name__)
def test_layouts_of_every_operand(layout):
    backward.check_layouts_of_every_operand(Case(40, 50, heads=4, key_heads=2, batch=2, causal=True), layout)


@pytest.mark.parametrize("layout", attention.LAYOUTS)
def test_layouts_of_inputs(layout):
    case = Case(17, 17 if layout == "packed" else 33, head_dim=24, heads=4, key_heads=2, batch=2, causal=True)
    judge(case, [(attention.LAYOUTS[layout](*inputs), grads) for inputs, grads in draws_of(case, torch.bfloat16)])


def test_one_gradient_expanded_to_all():
    case = Case(causal=True)
    ((inputs, (out, lse)),) = draws_of(case, torch.bfloat16)
    judge(case, [(inputs, (out[:, :, :1, :1].expand(out.shape), every_second(lse)))])


def test_head_dim_one_has_no_last_stride():
    case = Case(head_dim=1)
    judge(case, [(attention.each(every_second)(*inputs), grads) for inputs, grads in draws_of(case, torch.float16)])


@pytest.mark.parametrize("far", ["query", "key", "grad_out"])
def test_positions_may_lie_further_apart_than_32_bits_count(far_apart, far):
    arguments = backward.operands(Case(3, 3, causal=True, heads=1), torch.float16)
    expected = torch.ops.nearpeak.attention_backward(*arguments)
    index = {"grad_out": 0, "query": 2, "key": 3}[far]
    arguments[index] = far_apart((1, 1, 3, 16), torch.float16).copy_(arguments[index])
    assert_as_exact_as_plain(torch.ops.nearpeak.attention_backward(*arguments), expected, expected)
