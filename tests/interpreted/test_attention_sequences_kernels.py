"""The Triton kernels of attention over sequences of different lengths, held to the rule for every backend."""

import plain
import pytest
import test_attention_sequences as sequences
import torch
from draws import assert_as_exact, standards
from inputs import DTYPES, randn, some_by_default
from nearpeak.attention import triton_tiles
from test_attention import values
from test_attention_sequences import PACKED, Packed

SHORT = {name: PACKED[name] for name in PACKED if name != "long"} | {
    # Tiles of 32 to 128 rows and keys that hold the ends of several sequences.
    "tiles": Packed((70, 3, 1, 50), (130, 3, 64, 20), {"causal": True}),
    # Their keys are split over programs and merged.
    "split": Packed((1, 1), (600, 500), {"causal": True}),
}


def judge(packed, dtype, gradients=True):
    draws = [sequences.packed_inputs(packed, dtype, seed) for seed in range(3)]
    draws = [(inputs, grads if gradients else None) for inputs, grads in draws]
    doubles = [(plain.doubled(inputs), grads and plain.doubled(grads)) for inputs, grads in draws]
    layer = sequences.one_by_one(packed)
    assert_as_exact(values(sequences.served(packed), draws), standards([values(layer, draws)], values(layer, doubles)))


@pytest.mark.parametrize("name", some_by_default(SHORT, 2, str))
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_are_as_exact_as_each_alone(dtype, name):
    judge(SHORT[name], dtype)


@pytest.mark.parametrize("tile", [(16, 16), (128, 32)], ids=str)
def test_any_tile_gives_the_same(monkeypatch, tile):
    tile = triton_tiles.Tile(*tile, warps=4, stages=1)
    monkeypatch.setattr(triton_tiles, "tile_sizes", lambda *sizes: tile)
    monkeypatch.setattr(triton_tiles, "backward_tiles", lambda *sizes: (tile, tile))
    judge(SHORT["tiles"], torch.float16)


def test_no_sequences_give_no_rows():
    sequences.test_no_sequences_give_no_rows(None)


@pytest.mark.parametrize("length", [1, 20], ids=["decode", "prefill"])
@pytest.mark.parametrize("terms", [False, True], ids=["plain", "terms"])
@pytest.mark.parametrize("bound", ["starts", "ends", "both"])
def test_a_batch_entry_sees_the_keys_that_it_has(bound, terms, length):
    sequences.test_a_batch_entry_sees_the_keys_that_it_has(None, bound, terms, length)


def exact(call, inputs, grads):
    """The definition in float64, which takes no kernel."""
    with sequences.nearpeak.use_backend("reference"):
        return plain.value_and_gradients(call, plain.doubled(inputs), plain.doubled(grads))


@pytest.mark.parametrize("name", ["cross", "tiles"])
@pytest.mark.parametrize("kept", ["all", "one row", "one head"])
def test_terms_of_packed_sequences(name, kept):
    """The reference cuts terms up for each sequence, the kernels read them in place."""
    packed, shape = SHORT[name], (sum(SHORT[name].query_lengths), sum(SHORT[name].key_lengths))
    tensors, grads = sequences.packed_inputs(packed, torch.float32)
    bias = randn(1, 1 if kept == "one head" else 4, 1 if kept == "one row" else shape[0], shape[1], seed=7)
    mask, slopes, sinks = randn(1, 1, *shape, seed=8) < 1.0, randn(4, seed=9).abs(), randn(4, seed=10)
    starts = sequences.starts_of(packed.query_lengths), sequences.starts_of(packed.key_lengths)

    def layer(query, key, value, bias, sinks):
        return sequences.nearpeak.attention(
            query, key, value, **packed.options, mask=mask, bias=bias, alibi_slopes=slopes, sinks=sinks,
            query_starts=starts[0], key_starts=starts[1], return_lse=True,
        )  # fmt: skip

    inputs = (*tensors, bias, sinks)
    for a, b in zip(plain.value_and_gradients(layer, inputs, grads), exact(layer, inputs, grads), strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)


# (query_starts, key_starts, key_ends, keys): one sequence's keys within another's, over several blocks; a prefix that
# all share; an empty sequence; keys that none has.
SHARERS = {
    "two": ([0, 5, 8], [4, 0, 20], [18, 9], 20),
    "prefix": ([0, 30, 31, 50], [0, 0, 0, 0], [40, 70, 70], 70),
    "blocks": ([0, 40, 43, 43, 90], [0, 30, 10, 60, 200], [130, 70, 20, 190], 200),
}
SHARING = {
    "causal": {"causal": True},
    "window": {"window": (20, 3), "softcap": 4.0},
    "dropout": {"causal": True, "dropout_p": 0.3, "dropout_seed": 3, "sinks": torch.linspace(-1, 1, 4)},
}


@pytest.mark.parametrize(
    ("dtype", "name", "option"),
    [
        pytest.param(torch.float32, "two", "causal", id="float32-two"),
        pytest.param(torch.bfloat16, "prefix", "window", id="bfloat16-prefix"),
        pytest.param(torch.float16, "blocks", "dropout", id="float16-blocks"),
        pytest.param(torch.float32, "prefix", "window", id="float32-prefix", marks=pytest.mark.slow),
        pytest.param(torch.float32, "blocks", "dropout", id="float32-blocks", marks=pytest.mark.slow),
    ],
)
def test_key_ends_may_let_packed_sequences_share_keys(dtype, name, option):
    """As exact as the definition in the same dtype."""
    query_starts, *key_bounds, keys = SHARERS[name]
    packed = Packed((query_starts[-1],), (keys,), {})
    bounds = dict(
        zip(("query_starts", "key_starts", "key_ends"), map(torch.tensor, (query_starts, *key_bounds)), strict=True)
    )

    def layer(*tensors):
        return sequences.nearpeak.attention(*tensors, **bounds, **SHARING[option], return_lse=True)

    draws = [sequences.packed_inputs(packed, dtype, seed) for seed in range(3)]
    with sequences.nearpeak.use_backend("reference"):
        doubles = [(plain.doubled(inputs), plain.doubled(grads)) for inputs, grads in draws]
        standard = standards([values(layer, draws)], values(layer, doubles))
    assert_as_exact(values(layer, draws), standard)


def test_what_keys_of_no_sequence_hold_reaches_no_gradient():
    inputs, grads = sequences.packed_inputs(Packed((8,), (20,), {}), torch.float32)
    bounds = {"query_starts": torch.tensor([0, 5, 8]), "key_starts": torch.tensor([4, 2, 20])}
    nobodys = torch.tensor([0, 1, 18, 19])
    query, key, value = (tensor.clone() for tensor in inputs)
    key[:, :, nobodys], value[:, :, nobodys] = torch.nan, torch.nan

    def layer(*tensors):
        return sequences.nearpeak.attention(*tensors, **bounds, key_ends=torch.tensor([18, 9]), return_lse=True)

    results = plain.value_and_gradients(layer, (query, key, value), grads)
    assert all(each.isfinite().all() for each in results)
    assert all((each[:, :, nobodys] == 0).all() for each in results[3:])


# What only the numbers tell, which are the GPU's.
BY_VALUE = ("first", "last", "falling", "beyond", "negative", "crossed")


@pytest.mark.parametrize("name", [name for name in sequences.BAD if name not in BY_VALUE])
def test_bad_bounds_are_named(name):
    sequences.test_bad_bounds_are_named(None, name)


@pytest.mark.parametrize("starts", [[1, 2, 5], [0, 7, 5], [0, -4, 5], [0, 2, 4]], ids=str)
def test_bounds_that_do_not_fit_reach_nothing_else(starts):
    """Their values are the GPU's, which nobody waits for: so they are clamped instead of named."""
    query, key = torch.ones(1, 4, 5, 8), torch.ones(1, 2, 6, 8)
    bounds = {"query_starts": torch.tensor(starts), "key_starts": torch.tensor([-9, 3, 99])}
    out = sequences.nearpeak.attention(query, key, key, **bounds)
    assert out.shape == query.shape
