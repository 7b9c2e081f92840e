"""Dropout in the Triton kernels of attention, held to what tests/test_attention_dropout.py holds every backend to."""

import pytest
import test_attention_dropout as dropout
import test_attention_sequences as sequences
import torch
from draws import assert_as_exact
from inputs import DTYPES, some_by_default
from nearpeak.attention import triton_tiles
from test_attention import Case, values
from test_attention_terms import Terms, terms_name

P, FEW, WIDE = dropout.P, dropout.FEW, dropout.WIDE
# Rows of several tiles under a window; every term at once; and keys split over programs and merged.
MIDDLE = Case(60, 150, heads=2, key_heads=1, causal=True, window=(70, None))
CASES = [
    Terms(WIDE._replace(scale=-0.3), bias=(1, 1, 1, 1), sinks=True, value_dim=24),
    Terms(WIDE),
    Terms(MIDDLE),
    Terms(MIDDLE._replace(softcap=3.0)),
    *(
        Terms(case)
        for case in (Case(5, 0), Case(40, 33, causal=True), Case(1, 1100, head_dim=64, heads=4, key_heads=2))
    ),
]
SIZES = [(1, 2, 1, 1), (2, 1, 16, 40), (1, 1, 73, 100), (3, 4, 1, 33), (2, 8, 2, 65), (1, 2, 73, 193)]


def judge(terms, dtype, p=P):
    draws = dropout.draws_of(terms, dtype)[: 2 if dtype is torch.float32 else 1]
    standard = dropout.standards(
        [values(dropout.eager_layer(terms, p), draws)],
        values(dropout.exact_layer(terms, p), dropout.doubled(draws)),
    )
    assert_as_exact(values(dropout.served(terms, p), draws), standard)


@pytest.mark.parametrize("sizes", some_by_default(SIZES, 2, str))
def test_forward_keeps_the_weights_that_the_definition_keeps(sizes):
    dropout.test_forward_keeps_the_weights_that_the_definition_keeps(None, sizes, 1, 1)


@pytest.mark.parametrize("sizes", some_by_default(SIZES, 2, str))
def test_backward_keeps_the_same_weights(sizes):
    dropout.test_backward_keeps_the_same_weights(None, sizes, 1)


@pytest.mark.parametrize("p", [1e-9, 1e-3, 0.5, 0.9, 1 - 1e-6])
def test_any_chance_drops_what_the_definition_drops(monkeypatch, p):
    """On both sides of a threshold of 2^31, where numbers of 32 bits change their sign."""
    monkeypatch.setattr(dropout, "P", p)
    monkeypatch.setattr(dropout, "kept_of", lambda *sizes: dropout.dropout.kept(torch.tensor(dropout.SEED), p, sizes))
    dropout.test_forward_keeps_the_weights_that_the_definition_keeps(None, (1, 2, 33, 40), 1, 1)


@pytest.mark.parametrize("terms", some_by_default(CASES, len(CASES), terms_name))
def test_forward_and_gradients_are_as_exact_as_plain(rounded_once, terms):
    judge(terms, torch.float32)


@pytest.mark.parametrize("terms", some_by_default(CASES, 3, terms_name))
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_forward_and_gradients_in_16_bits_are_as_exact_as_plain(dtype, terms):
    judge(terms, dtype)


def test_a_row_of_one_key_is_as_exact_as_plain(rounded_once):
    """Of its score's gradient the rounding of out would be all that is left; multiplying by two rounds nothing."""
    judge(Terms(Case(1, 1)), torch.float32, p=0.5)


@pytest.mark.parametrize("tile", [(16, 16), (128, 32)], ids=str)
def test_any_tile_drops_the_same(monkeypatch, tile):
    tile = triton_tiles.Tile(*tile, warps=4, stages=1)
    monkeypatch.setattr(triton_tiles, "tile_sizes", lambda *sizes: tile)
    monkeypatch.setattr(triton_tiles, "backward_tiles", lambda *sizes, **crowding: (tile, tile))
    judge(Terms(WIDE), torch.float16)
    dropout.test_forward_keeps_the_weights_that_the_definition_keeps(None, (1, 2, 33, 40), 1, 1)
    dropout.test_backward_keeps_the_same_weights(None, (1, 2, 33, 40), 1)


@pytest.mark.parametrize("terms", [Terms(WIDE, sinks=True), Terms(FEW)], ids=terms_name)
def test_lse_is_that_of_all_weights(monkeypatch, terms):
    """To the bit in one tile; with dropout tiles are smaller."""
    monkeypatch.setattr(triton_tiles, "tile_sizes", lambda *sizes: triton_tiles.Tile(32, 32, warps=4, stages=1))
    dropout.test_lse_is_that_of_all_weights(None, torch.bfloat16, terms)


@pytest.mark.parametrize("p", [1 - 1e-6, 1 - 2**-33])
def test_almost_certain_dropout_drops_almost_all_and_nothing_overflows(p):
    dropout.test_almost_certain_dropout_drops_almost_all_and_nothing_overflows(None, Terms(WIDE), p)


@pytest.mark.parametrize("name", some_by_default(["self", "decode", "cross"], 3, str))
def test_packed_sequences_count_rows_and_columns_in_the_tensors(name):
    dropout.test_packed_sequences_count_rows_and_columns_in_the_tensors(None, name)


@pytest.mark.slow
def test_a_batch_entry_counts_columns_in_the_cache():
    dropout.test_a_batch_entry_counts_columns_in_the_cache(None)


def test_gradients_of_packed_sequences_drop_the_same():
    """Each sequence's gradients from the kernels, held against the definition's."""
    packed = dropout.PACKED["cross"]
    inputs, grads = sequences.packed_inputs(packed, torch.float32)
    bounds = {
        "query_starts": dropout.starts_of(packed.query_lengths),
        "key_starts": dropout.starts_of(packed.key_lengths),
    }

    def layer(*tensors):
        return sequences.nearpeak.attention(
            *tensors, **packed.options, **bounds, dropout_p=P, dropout_seed=dropout.SEED, return_lse=True
        )

    mine = dropout.plain.value_and_gradients(layer, inputs, grads)
    with sequences.nearpeak.use_backend("reference"):
        exact = dropout.plain.value_and_gradients(layer, dropout.plain.doubled(inputs), dropout.plain.doubled(grads))
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)


def test_seeds_of_every_kind():
    dropout.test_without_a_seed_torchs_generator_gives_one(None)
    dropout.test_a_seed_may_be_a_number_or_a_tensor(None)
