"""Dropout of attention weights: the same mask on every backend, tiling and thread, and gradients that go with it."""

import functools
import math

import nearpeak
import plain
import pytest
import torch
import torch.nn.functional as F
from draws import assert_as_exact, standards
from inputs import DTYPES, randn
from nearpeak import dropout
from nearpeak.attention import reference
from test_attention import Case, doubled, values
from test_attention_sequences import PACKED, starts_of
from test_attention_terms import Terms, draws_of, inputs_of, scale_of, terms_name, window_of

P, SEED = 0.3, -(2**62) + 12345


def kept_of(batch, heads, rows, keys, first=(0, 0, 0), p=P, seed=SEED):
    return dropout.kept(torch.tensor(seed), p, (batch, heads, rows, keys), first)


# Around the edges of what runs by rows, by vectors, by blocks and by panels.
SIZES = [
    *((1, 2, 1, 1), (1, 1, 8, 31), (3, 4, 1, 33), (2, 8, 2, 65), (1, 3, 3, 97), (2, 1, 16, 40), (1, 4, 17, 130)),
    *((2, 2, 33, 200), (1, 2, 73, 193), (1, 1, 150, 385), (1, 2, 400, 576)),
]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("key_heads", [1, None], ids=["grouped", "alone"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_keeps_the_weights_that_the_definition_keeps(serving, sizes, key_heads, threads):
    """Each column of the identity as a value shows one weight; all scores are equal."""
    torch.set_num_threads(threads)
    batch, heads, rows, keys = sizes
    key = torch.ones(batch, key_heads or heads, keys, 3)
    value = torch.eye(keys).expand(*key.shape[:2], keys, keys)
    out = nearpeak.attention(torch.zeros(batch, heads, rows, 3), key, value, dropout_p=P, dropout_seed=SEED)
    assert torch.equal(out != 0, kept_of(*sizes))
    torch.testing.assert_close(out[out != 0], torch.full_like(out, 1 / (1 - P) / keys)[out != 0])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_backward_keeps_the_same_weights(serving, sizes, threads):
    """With the identity as out's gradient, value's gradient is the weights' transpose."""
    torch.set_num_threads(threads)
    batch, heads, rows, keys = sizes
    key, value = torch.ones(batch, heads, keys, 3), torch.ones(batch, heads, keys, rows, requires_grad=True)
    out = nearpeak.attention(torch.zeros(batch, heads, rows, 3), key, value, dropout_p=P, dropout_seed=SEED)
    (weights,) = torch.autograd.grad(out, value, torch.eye(rows).expand(batch, heads, rows, rows))
    assert torch.equal(weights.mT != 0, kept_of(*sizes))


def served(terms, p):
    case = terms.case

    def call(query, key, value, bias, sinks):
        return nearpeak.attention(
            query, key, value, causal=case.causal, window=case.window, scale=case.scale, softcap=case.softcap,
            bias=bias, sinks=sinks, dropout_p=p, dropout_seed=SEED, return_lse=True,
        )  # fmt: skip

    return call


def exact_layer(terms, p):
    def call(query, key, value, bias, sinks):
        options = (*window_of(terms.case), scale_of(terms.case), terms.case.softcap, None, bias, None, sinks)
        return reference.attention(query, key, value, *options, None, None, None, torch.tensor(SEED), p)

    return call


def eager_layer(terms, p):
    case = terms.case
    kept = kept_of(case.batch, case.heads, case.query_length, case.key_length, p=p)
    mask = reference.allowed(case.query_length, case.key_length, *window_of(case), "cpu")

    def call(query, key, value, bias, sinks):
        added = [] if bias is None else [bias]
        factors = kept.to(query.dtype) / (1 - p)
        return plain.attention(query, key, value, mask, scale_of(case), case.softcap, added, sinks, factors)

    return call


@functools.lru_cache(maxsize=2)
def standard(terms, p, dtype):
    draws = draws_of(terms, dtype)
    return standards([values(eager_layer(terms, p), draws)], values(exact_layer(terms, p), doubled(draws)))


WIDE = Case(33, 40, heads=4, key_heads=2, batch=2, causal=True)
FEW = Case(3, 97, heads=4, key_heads=2, batch=2)
LONG = Case(150, 400, heads=2, key_heads=1, causal=True)
CASES = [
    *(Terms(case) for case in (WIDE, FEW, LONG, Case(1, 500), Case(5, 0), Case(40, 33, causal=True), Case(1, 1))),
    Terms(LONG._replace(softcap=3.0, window=(70, None))),
    Terms(LONG._replace(magnitude=10.0)),
    *(Terms(case, bias=(1, 1, 1, 1), sinks=True, value_dim=24) for case in (WIDE, FEW, LONG)),
]


@pytest.mark.parametrize("terms", CASES, ids=terms_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(serving, dtype, terms):
    assert_as_exact(values(served(terms, P), draws_of(terms, dtype)), standard(terms, P, dtype))


@pytest.mark.parametrize("p", [1e-3, 0.9, 0.999])
def test_rare_and_frequent_dropout_is_as_exact_as_plain(serving, p):
    terms = Terms(LONG)
    results = values(served(terms, p), draws_of(terms, torch.float32))
    assert_as_exact(results, standard(terms, p, torch.float32))


@pytest.mark.parametrize("terms", [Terms(WIDE, sinks=True), Terms(FEW), Terms(LONG)], ids=terms_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_is_that_of_all_weights(serving, dtype, terms):
    inputs, _ = inputs_of(terms, dtype)
    assert torch.equal(served(terms, P)(*inputs)[1], served(terms, 0.0)(*inputs)[1])


@pytest.mark.parametrize("terms", [Terms(WIDE), Terms(FEW)], ids=terms_name)
def test_no_chance_drops_nothing(serving, terms):
    inputs, grads = inputs_of(terms, torch.float32)
    none = functools.partial(nearpeak.attention, causal=terms.case.causal, return_lse=True)
    expected = plain.value_and_gradients(none, inputs[:3], grads)
    mine = plain.value_and_gradients(served(terms, 0.0), inputs, grads)
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@pytest.mark.parametrize("p", [1 - 1e-6, 1 - 2**-33, math.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("terms", [Terms(WIDE), Terms(FEW)], ids=terms_name)
def test_almost_certain_dropout_drops_almost_all_and_nothing_overflows(serving, terms, p):
    inputs, grads = inputs_of(terms, torch.float32)
    out, _, *gradients = plain.value_and_gradients(served(terms, p), inputs, grads)
    assert (out == 0).all(-1).float().mean() > 0.99
    assert all(each.isfinite().all() for each in (out, *gradients))


@pytest.mark.parametrize("name", ["self", "cross", "decode", "long"])
def test_packed_sequences_count_rows_and_columns_in_the_tensors(serving, name):
    """So a packed batch keeps what the same tensors, taken as one sequence, keep."""
    query_lengths, key_lengths, options = PACKED[name]
    rows, keys = sum(query_lengths), sum(key_lengths)
    bounds = {"query_starts": starts_of(query_lengths), "key_starts": starts_of(key_lengths)}
    value = torch.randn(1, 2, keys, 8)

    def weights(**dropping):
        found = []
        for first in range(0, keys, 500):
            part = torch.eye(keys)[:, first : first + 500].expand(1, 2, keys, -1)
            query, key = torch.zeros(1, 2, rows, 8), torch.ones_like(value)
            found.append(nearpeak.attention(query, key, part, **options, **bounds, **dropping))
        return torch.cat(found, -1) != 0

    assert torch.equal(weights(dropout_p=P, dropout_seed=SEED), weights() & kept_of(1, 2, rows, keys))


def test_a_batch_entry_counts_columns_in_the_cache(serving):
    starts, ends = torch.tensor([0, 7, 20]), torch.tensor([50, 31, 20])
    key, value = torch.ones(3, 2, 50, 4), torch.eye(50).expand(3, 2, 50, 50)
    for rows in (1, 40):
        options = {"key_starts": starts, "key_ends": ends, "dropout_p": P, "dropout_seed": SEED}
        out = nearpeak.attention(torch.zeros(3, 4, rows, 4), key, value, **options)
        columns = torch.arange(50)
        there = (columns >= starts[:, None]) & (columns < ends[:, None])
        assert torch.equal(out != 0, kept_of(3, 4, rows, 50) & there[:, None, None])


@pytest.mark.parametrize("rows", [2, 40])
def test_columns_beyond_32_bits(serving, rows):
    """Of a cache that takes no memory; the number of weights kept shows in the sum of equal ones."""
    begin = 2**32 - 20
    key = torch.ones(1, 1, 1, 1).expand(1, 1, 2**32 + 20, 1)
    bounds = {"key_starts": torch.tensor([begin]), "key_ends": torch.tensor([begin + 40])}
    out = nearpeak.attention(torch.zeros(1, 1, rows, 1), key, key, **bounds, dropout_p=P, dropout_seed=SEED)
    kept = kept_of(1, 1, rows, 40, first=(0, 0, begin))
    assert torch.equal((out * (40 * (1 - P))).round()[..., 0], kept.sum(-1).float())
    assert torch.equal(kept[..., 20:], kept_of(1, 1, rows, 20))


def test_the_mask_never_changes():
    """Programs and saved results rely on it: these bits were computed from the definition once, by hand in integers."""

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def is_kept(seed, head, row, column):
        row = mix((mix((mix(seed % 2**64) + head) % 2**64) + row) % 2**64)
        x = (column + row) % 2**32
        x = (x ^ x >> 16) * 0x21F0AAAD % 2**32 ^ row >> 32
        x = (x ^ x >> 15) * 0xD35A2D97 % 2**32
        return (x ^ x >> 15) >= 2**31

    for seed in (0, 1, -1, SEED, 2**63 - 1):
        expected = [[[is_kept(seed, head, row, k) for k in range(9)] for row in range(3)] for head in range(4)]
        assert kept_of(2, 2, 3, 9, p=0.5, seed=seed).flatten(0, 1).tolist() == expected
    bits = "".join(str(int(bit)) for bit in kept_of(1, 1, 2, 16, p=0.5, seed=7).flatten())
    assert bits == "01101101101111011101100110001101"


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_mask_looks_random(p):
    """Rates within five standard deviations, and no row, column, head or seed correlated with another."""
    heads, rows, keys = 8, 256, 1024
    kept = kept_of(2, heads // 2, rows, keys, p=p).flatten(0, 1)
    other = kept_of(2, heads // 2, rows, keys, p=p, seed=SEED + 1).flatten(0, 1)
    x, y = ((each.double() - (1 - p)) / math.sqrt(p * (1 - p)) for each in (kept, other))
    pairs = {
        "rate": x,
        "seeds": x * y,
        "heads": x[1:] * x[:-1],
        **{f"rows {lag} apart": x[:, lag:] * x[:, :-lag] for lag in (1, 2, 8)},
        **{f"columns {lag} apart": x[..., lag:] * x[..., :-lag] for lag in (1, 2, 3, 8, 32, 128)},
        "diagonals": x[:, 1:, 1:] * x[:, :-1, :-1],
    }
    deviations = {name: float(each.mean() * math.sqrt(each.numel())) for name, each in pairs.items()}
    assert all(abs(deviation) < 5 for deviation in deviations.values()), deviations
    of_rows, of_columns = x.sum(-1).square().mean() / keys, x.sum(1).square().mean() / rows
    assert 0.9 < of_rows < 1.1
    assert 0.9 < of_columns < 1.1


def attend(**options):
    return nearpeak.attention(randn(1, 2, 9, 8), randn(1, 2, 30, 8, seed=1), randn(1, 2, 30, 8, seed=2), **options)


def test_without_a_seed_torchs_generator_gives_one(serving):
    torch.manual_seed(3)
    first, second = attend(dropout_p=0.5), attend(dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(attend(dropout_p=0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    attend()
    attend(dropout_p=0.5, dropout_seed=3)
    assert torch.equal(torch.get_rng_state(), state), "numbers were drawn that nothing needed"


def test_a_seed_may_be_a_number_or_a_tensor(serving):
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        tensor = torch.tensor(seed)
        assert torch.equal(attend(dropout_p=0.5, dropout_seed=seed), attend(dropout_p=0.5, dropout_seed=tensor))


def test_checkpointed_layers_drop_the_same_again(serving):
    query, key = randn(1, 2, 40, 8), randn(1, 2, 30, 8, seed=1)

    def layer(query):
        return nearpeak.attention(query, key, key, dropout_p=0.5)

    gradients = []
    for run in (layer, functools.partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)):
        torch.manual_seed(4)
        leaf = query.clone().requires_grad_()
        gradients += torch.autograd.grad(run(leaf).sum(), leaf)
    assert torch.equal(*gradients)


def test_compiled_layers_drop_without_graph_breaks(serving):
    torch.compiler.reset()
    query, key = randn(1, 2, 9, 8).requires_grad_(), randn(1, 2, 30, 8, seed=1)
    compiled = torch.compile(
        lambda q, **options: nearpeak.attention(q, key, key, dropout_p=0.5, **options), fullgraph=True
    )
    mine = torch.autograd.grad(compiled(query, dropout_seed=3).square().sum(), query)
    eager = nearpeak.attention(query, key, key, dropout_p=0.5, dropout_seed=3).square().sum()
    torch.testing.assert_close(mine, torch.autograd.grad(eager, query))
    torch.manual_seed(5)
    first, second = compiled(query), compiled(query)
    torch.manual_seed(5)
    assert torch.equal(compiled(query), first)
    assert not torch.equal(first, second)


def test_dropout_is_unbiased(serving):
    query, key, value = randn(1, 1, 3, 8), randn(1, 1, 20, 8, seed=1), randn(1, 1, 20, 8, seed=2)
    outs = torch.stack([nearpeak.attention(query, key, value, dropout_p=0.4, dropout_seed=s) for s in range(2000)])
    deviation = outs.std(0) / math.sqrt(len(outs))
    assert ((outs.mean(0) - F.scaled_dot_product_attention(query, key, value)).abs() < 5 * deviation).all()


BAD = {
    "negative": (ValueError, "dropout_p must", {"dropout_p": -0.1}),
    "one": (ValueError, "dropout_p must", {"dropout_p": 1.0}),
    "two": (ValueError, "dropout_p must", {"dropout_p": 2}),
    "nan": (ValueError, "dropout_p must", {"dropout_p": math.nan}),
    "word": (ValueError, "dropout_p must", {"dropout_p": "0.1"}),
    "tensor": (ValueError, "dropout_p must", {"dropout_p": torch.tensor(0.1)}),
    "seed_fraction": (TypeError, "dropout_seed must", {"dropout_p": 0.1, "dropout_seed": 1.5}),
    "seed_of_65_bits": (TypeError, "dropout_seed must", {"dropout_p": 0.1, "dropout_seed": 2**63}),
    "seed_int32": (TypeError, "dropout_seed must", {"dropout_p": 0.1, "dropout_seed": torch.tensor(1).int()}),
    "seed_vector": (ValueError, "dropout_seed must", {"dropout_p": 0.1, "dropout_seed": torch.tensor([1])}),
    "seed_meta": (ValueError, "dropout_seed must", {"dropout_p": 0.1, "dropout_seed": torch.tensor(1).to("meta")}),
    "seed_without_chance": (TypeError, "dropout_seed must", {"dropout_seed": "1"}),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(serving, bad):
    error, message, options = BAD[bad]
    with pytest.raises(error, match=message):
        attend(**options)


@pytest.mark.parametrize("options", [(None, 0.5), (torch.tensor([1, 2]), 0.5), (torch.tensor(1), 1.0)], ids=str)
def test_the_operators_refuse_what_does_not_fit(serving, options):
    query = randn(1, 1, 3, 4)
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.nearpeak.attention_inference(query, query, query, None, None, 1.0, None, *[None] * 7, *options)
