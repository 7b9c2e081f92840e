"""Attention over sequences of different lengths: packed one behind the other, or each with the keys that it has."""

from typing import NamedTuple

import nearpeak
import plain
import pytest
import torch
from draws import assert_as_exact, standards
from inputs import DTYPES, randn, sequence_first
from test_attention import Case, eager_layer, values

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 16


class Packed(NamedTuple):
    query_lengths: tuple
    key_lengths: tuple
    options: dict


SELF = (17, 1, 0, 33, 5)
PACKED = {
    "self": Packed(SELF, SELF, {"causal": True}),
    "full": Packed(SELF, SELF, {}),
    "window": Packed((40, 7, 90), (40, 7, 90), {"causal": True, "window": (9, None)}),
    "cross": Packed((3, 20, 0, 5), (40, 0, 6, 5), {"causal": True}),
    "decode": Packed((1, 1, 2), (300, 7, 90), {"causal": True}),
    "softcap": Packed((20, 9), (25, 9), {"softcap": 3.0}),
    "long": Packed((200, 73, 10), (400, 193, 900), {"causal": True}),
    "one": Packed((9,), (9,), {}),
    "one_row": Packed((0, 1), (0, 1), {}),
    "one_row_and_no_key": Packed((1, 0), (0, 1), {}),
}


def starts_of(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed_inputs(packed, dtype, seed=0):
    queries, keys = sum(packed.query_lengths), sum(packed.key_lengths)
    shapes = [(1, HEADS, queries, HEAD_DIM), *[(1, KEY_HEADS, keys, HEAD_DIM)] * 2]
    inputs = tuple(sequence_first(randn(*shape, dtype=dtype, seed=10 * seed + i)) for i, shape in enumerate(shapes))
    grads = (
        randn(*shapes[0], dtype=dtype, seed=10 * seed + 3),
        randn(*shapes[0][:3], dtype=plain.lse_dtype(dtype), seed=10 * seed + 4),
    )
    return inputs, grads


def served(packed):
    bounds = {"query_starts": starts_of(packed.query_lengths), "key_starts": starts_of(packed.key_lengths)}
    return lambda q, k, v: nearpeak.attention(q, k, v, **packed.options, **bounds, return_lse=True)


def one_by_one(packed):
    """The plain layer on each sequence alone."""

    def call(query, key, value):
        lengths = packed.query_lengths, packed.key_lengths
        parts = zip(query.split(lengths[0], 2), key.split(lengths[1], 2), value.split(lengths[1], 2), strict=True)
        results = [
            eager_layer(Case(q.shape[2], k.shape[2], HEAD_DIM, HEADS, KEY_HEADS, **packed.options))(q, k, v)
            for q, k, v in parts
        ]
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    return call


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_are_as_exact_as_each_alone(serving, dtype, name):
    packed = PACKED[name]
    draws = [packed_inputs(packed, dtype, seed) for seed in range(16)]
    doubles = [(plain.doubled(inputs), plain.doubled(grads)) for inputs, grads in draws]
    expected = standards([values(one_by_one(packed), draws)], values(one_by_one(packed), doubles))
    assert_as_exact(values(served(packed), draws), expected)


def test_no_sequences_give_no_rows(serving):
    query, key, starts = torch.ones(1, HEADS, 0, HEAD_DIM), torch.ones(1, KEY_HEADS, 0, HEAD_DIM), torch.tensor([0])
    out, lse = nearpeak.attention(query, key, key[..., :5], query_starts=starts, key_starts=starts, return_lse=True)
    assert (out.shape, lse.shape) == ((1, HEADS, 0, 5), (1, HEADS, 0))


@pytest.mark.parametrize("threads", [2, 5])
def test_gradients_are_the_same_bits_on_any_number_of_threads(serving, threads):
    if serving == "reference":
        pytest.skip("PyTorch's matrix products sum in an order that depends on the threads")
    packed = PACKED["long"]
    inputs, grads = packed_inputs(packed, torch.float32)
    expected = plain.value_and_gradients(served(packed), inputs, grads)
    torch.set_num_threads(threads)
    again = plain.value_and_gradients(served(packed), inputs, grads)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("length", [1, 20], ids=["decode", "prefill"])
@pytest.mark.parametrize("terms", [False, True], ids=["plain", "terms"])
@pytest.mark.parametrize("bound", ["starts", "ends", "both"])
def test_a_batch_entry_sees_the_keys_that_it_has(serving, bound, terms, length):
    """As a cache cut to its length sees it; what lies in the rest of the cache reaches nothing."""
    query = randn(3, HEADS, length, HEAD_DIM)
    key, value = randn(3, KEY_HEADS, 50, HEAD_DIM, seed=1), randn(3, KEY_HEADS, 50, HEAD_DIM, seed=2)
    bias = randn(1, HEADS, length, 50, seed=3) if terms else None
    mask = randn(3, 1, 1, 50, seed=4) < 1.0 if terms else None
    starts = torch.tensor([0, 7, 20] if bound != "ends" else [0, 0, 0])
    ends = torch.tensor([50, 31, 20] if bound != "starts" else [50, 50, 50])
    for batch in range(3):
        for tensor in (key, value):
            tensor[batch, :, : starts[batch]] = torch.nan
            tensor[batch, :, ends[batch] :] = torch.nan
    bounds = {"key_starts": starts if bound != "ends" else None, "key_ends": ends if bound != "starts" else None}
    inputs = (query, key, value) if bias is None else (query, key, value, bias)

    def layer(query, key, value, bias=None):
        return nearpeak.attention(query, key, value, causal=True, bias=bias, mask=mask, **bounds, return_lse=True)

    def cut(query, key, value, bias=None):
        results = []
        for b, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            of_bias, of_mask = (
                None if t is None else t[min(b, t.shape[0] - 1)][None, ..., start:end] for t in (bias, mask)
            )
            parts = query[b : b + 1], key[b : b + 1, :, start:end], value[b : b + 1, :, start:end]
            results.append(nearpeak.attention(*parts, causal=True, bias=of_bias, mask=of_mask, return_lse=True))
        return tuple(torch.cat(part) for part in zip(*results, strict=True))

    grads = randn(*query.shape, seed=5), randn(*query.shape[:3], seed=6)
    mine = plain.value_and_gradients(layer, inputs, grads)
    for a, b in zip(mine, plain.value_and_gradients(cut, inputs, grads), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


Q, KV, STARTS = torch.ones(1, 4, 5, 8), torch.ones(1, 2, 6, 8), torch.tensor([0, 2, 5])
TWO = torch.ones(2, 4, 5, 8)


def attend(query=Q, key=KV, **bounds):
    return lambda: nearpeak.attention(query, key, key, **bounds)


BAD = {
    "no_key_starts": (ValueError, "key_starts must", attend(query_starts=STARTS)),
    "list": (TypeError, "key_ends must", attend(key_ends=[6])),
    "floats": (TypeError, "key_ends must", attend(key_ends=torch.ones(1))),
    "two_dimensions": (ValueError, "key_ends must", attend(key_ends=torch.ones(1, 1).int())),
    "another_device": (ValueError, "key_ends must", attend(key_ends=torch.ones(1, device="meta").int())),
    "first": (ValueError, "query_starts must", attend(query_starts=STARTS + 1, key_starts=STARTS)),
    "last": (ValueError, "query_starts must", attend(query_starts=torch.tensor([0, 2, 4]), key_starts=STARTS)),
    "falling": (ValueError, "query_starts must", attend(query_starts=torch.tensor([0, 7, 5]), key_starts=STARTS)),
    "empty": (ValueError, "query_starts must", attend(query_starts=STARTS[:0], key_starts=STARTS)),
    "batch": (
        ValueError,
        "query_starts must",
        attend(TWO, torch.ones(2, 2, 6, 8), query_starts=STARTS, key_starts=STARTS),
    ),
    "count": (ValueError, "key_starts and key_ends", attend(query_starts=STARTS, key_starts=STARTS[:2])),
    "ends_count": (ValueError, "key_starts and key_ends", attend(key_ends=STARTS)),
    "beyond": (ValueError, "key_starts and key_ends", attend(key_ends=torch.tensor([7]))),
    "negative": (ValueError, "key_starts and key_ends", attend(key_starts=torch.tensor([-1]))),
    "crossed": (
        ValueError,
        "key_starts and key_ends",
        attend(key_starts=torch.tensor([4]), key_ends=torch.tensor([3])),
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_bounds_are_named(serving, bad):
    error, message, run = BAD[bad]
    with pytest.raises(error, match=message):
        run()
