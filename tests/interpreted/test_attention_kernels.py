"""The Triton kernels of attention, held to the rule that tests/test_attention.py holds every backend to."""

import nearpeak
import plain
import pytest
import test_attention as attention
import torch
from draws import assert_as_exact
from exactness import assert_as_exact_as_plain
from inputs import DTYPES, every_second, laid_out_like
from nearpeak.attention import triton_attention, triton_tiles
from test_attention import Case

SPLIT = Case(1, 1100, head_dim=64, heads=4)
CASES = [
    *(Case(head_dim=head_dim, causal=True) for head_dim in (1, 17, 64, 80, 256)),
    *(Case(1, 97, head_dim=head_dim, heads=4) for head_dim in (1, 17, 80)),
    # Forty queries: of one or two, on Intel's processors of eight too, the plain layer's products sum head_dim in more
    # parts than those of whole matrices do, here or on a GPU, and so are up to 1.9 times as exact in float32.
    Case(40, 97, head_dim=256, heads=4),
    *(Case(5, 19, heads=heads, key_heads=kv, batch=2, causal=True) for heads, kv in ((1, 1), (3, 1), (6, 2), (8, 8))),
    *(
        Case(q, k, heads=3, causal=causal)
        for q, k in ((1, 1), (63, 65), (65, 64), (130, 129))
        for causal in (False, True)
    ),
    *(Case(q, k, window=window) for q, k in ((33, 40), (40, 33)) for window in attention.WINDOWS),
    *(Case(150, 200, window=window) for window in ((70, 0), (70, 20), (5, -3), (None, -70), (-20, 90))),
    *(
        SPLIT._replace(batch=batch, window=window)
        for batch in (1, 2)
        for window in ((None, None), (511, 0), (900, -300))
    ),
    *(SPLIT._replace(query_length=q, key_heads=kv, causal=True) for q, kv in ((3, 4), (40, 1))),
    SPLIT._replace(softcap=20.0, head_dim=17),
    *(Case(softcap=softcap, causal=causal) for softcap in (1.0, 50.0) for causal in (False, True)),
    Case(softcap=20.0, magnitude=30.0, scale=1.0),
    Case(magnitude=10.0, scale=1.0),
    *(Case(scale=scale, softcap=softcap, causal=True) for scale in (0.0, -0.3) for softcap in (None, 2.0)),
    *(Case(q, k) for q, k in ((0, 5), (5, 0), (0, 0))),
    *(Case(batch=0), Case(heads=0, key_heads=2)),
]


def draws_of(case, dtype, seeds=(0,)):
    """Inputs without gradients, which are not the kernels'."""
    return [(attention.inputs_of(case._replace(seed=seed), dtype)[0], None) for seed in seeds]


def judge(case, draws):
    results = attention.values(attention.served(case), draws)
    assert_as_exact(results, attention.standards_of(case, draws))
    return results


@pytest.mark.parametrize("case", CASES, ids=attention.case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_as_exact_as_plain(dtype, case):
    # Rounding to 16 bits drowns what float32 sums do by chance; float32 itself takes more draws to judge.
    judge(case, draws_of(case, dtype, range(0, 30, 10) if dtype is torch.float32 else (0,)))


def test_gradients_flow_from_the_kernels_results():
    case = Case(causal=True)
    judge(case, attention.draws_of(case, torch.float32))


@pytest.mark.parametrize("window", [(None, None), (511, 0), (900, -300)], ids=str)
def test_split_keys_are_split_and_merged(monkeypatch, window):
    """The same numbers, to the rule, as without the split; and the split does happen in the cases above."""
    case = SPLIT._replace(window=window)
    inputs, _ = attention.inputs_of(case, torch.float32)
    merges = []
    launch_merge = triton_attention._launch_merge
    monkeypatch.setattr(triton_attention, "_launch_merge", lambda *parts: merges.append(launch_merge(*parts)))
    split = attention.served(case)(*inputs)
    monkeypatch.setattr(triton_tiles, "splits", lambda *sizes: 1)
    whole = attention.served(case)(*inputs)
    assert len(merges) == 1
    assert_as_exact_as_plain(split, whole, attention.exact_layer(case)(*plain.doubled(inputs)))


@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (128, 32)], ids=str)
def test_any_tile_gives_the_same(monkeypatch, tile):
    monkeypatch.setattr(triton_tiles, "tile_sizes", lambda *sizes: triton_tiles.Tile(*tile, warps=4, stages=1))
    for window in ((20, 0), (3, 40)):
        case = Case(40, 90, heads=6, key_heads=2, window=window)
        judge(case, draws_of(case, torch.float16))


@pytest.mark.parametrize("window", [(None, -1000), (-1000, None), (-3, 2)], ids=str)
def test_rows_without_keys_are_zero_with_lse_minus_infinity(window):
    attention.test_rows_without_keys_are_zero_with_lse_minus_infinity(None, torch.bfloat16, window)


@pytest.mark.parametrize("layout", attention.LAYOUTS)
@pytest.mark.parametrize("length", [1, 17], ids=["decode", "prefill"])
def test_layouts_of_inputs(length, layout):
    case = Case(length, 33, head_dim=24, heads=4, key_heads=2, batch=2, causal=True)
    if layout == "packed":
        case = case._replace(key_length=length)
    ((inputs, _),) = draws_of(case, torch.bfloat16)
    inputs = attention.LAYOUTS[layout](*inputs)
    ((out, _),) = judge(case, [(inputs, None)])
    assert laid_out_like(out, inputs[0])


def test_head_dim_one_has_no_last_stride():
    case = Case(head_dim=1)
    ((inputs, _),) = draws_of(case, torch.float32)
    judge(case, [(attention.each(every_second)(*inputs), None)])


def test_softcap_is_exact_for_small_and_for_large_scores():
    """One key a query, so that lse is the capped score itself."""
    scores = torch.cat([torch.linspace(-12, 12, 1001), torch.logspace(-20, 0, 200)])
    query, key = scores[None, None, :, None], torch.ones(1, 1, 1, 1)
    _, lse = nearpeak.attention(query, key, key, softcap=1.0, scale=1.0, return_lse=True)
    assert_as_exact_as_plain(lse[0, 0], torch.tanh(scores), torch.tanh(scores.double()))
    small = scores.abs() < 1e-3
    torch.testing.assert_close(lse[0, 0][small], torch.tanh(scores)[small], rtol=1e-6, atol=0.0)


def test_positions_may_lie_further_apart_than_32_bits_count(far_apart):
    key = far_apart((1, 1, 3, 16), torch.float16)
    for query in (key, key.contiguous()):
        result = nearpeak.attention(query, key, key, causal=True)
        assert torch.equal(
            result, nearpeak.attention(key.contiguous(), key.contiguous(), key.contiguous(), causal=True)
        )
