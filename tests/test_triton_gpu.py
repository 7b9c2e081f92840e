"""Attention's Triton kernels on a GPU, through the public function: as exact as plain, forward and backward."""

import nearpeak
import pytest
import test_attention as attention
import test_attention_sequences as sequences
import test_attention_terms as terms_of
import torch
from draws import assert_as_exact, standards
from inputs import DTYPES
from nearpeak import backends
from test_attention import Case
from test_cuda_gpu import DEVICE, on_cpu, on_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or backends.missing("triton") is not None, reason="no GPU"),
]

CASES = [
    *(Case(q, k, causal=causal) for q, k in ((63, 65), (128, 129), (300, 517)) for causal in (False, True)),
    *(Case(300, 517, window=window) for window in ((70, 0), (70, 20), (None, -70), (-20, 90))),
    *(Case(100, 300, head_dim=head_dim, causal=True) for head_dim in (17, 64, 80, 128, 256)),
    *(Case(100, 300, heads=heads, key_heads=2, batch=2, causal=True) for heads in (2, 6, 8)),
    *(Case(90, 230, softcap=softcap, causal=True) for softcap in (1.0, 30.0)),
    Case(90, 230, scale=-0.3, causal=True),
]


@pytest.mark.parametrize("case", CASES, ids=attention.case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(dtype, case):
    draws = attention.draws_of(case, dtype)
    with nearpeak.use_backend("triton"):
        mine = attention.values(attention.served(case), on_device(draws))
    assert_as_exact(on_cpu(mine), attention.standards_of(case, draws))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_same_bits_every_time(dtype):
    case = Case(1000, 1000, heads=8, key_heads=2, head_dim=64, causal=True)
    (inputs, grads), *_ = on_device(attention.draws_of(case, dtype, count=1))
    with nearpeak.use_backend("triton"):
        first, second = (attention.plain.value_and_gradients(attention.served(case), inputs, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("terms", terms_of.CASES, ids=terms_of.terms_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_are_as_exact_as_plain(dtype, terms):
    draws = terms_of.draws_of(terms, dtype)
    mask, slopes = terms_of.boolean_mask_of(terms), terms_of.slopes_of(terms)

    def served(query, key, value, bias, sinks):
        case = terms.case
        return nearpeak.attention(
            query, key, value, causal=case.causal, window=case.window, scale=case.scale, softcap=case.softcap,
            mask=None if mask is None else mask.to(DEVICE), bias=bias,
            alibi_slopes=None if slopes is None else slopes.to(DEVICE), sinks=sinks, return_lse=True,
        )  # fmt: skip

    with nearpeak.use_backend("triton"):
        mine = attention.values(served, on_device(draws))
    assert_as_exact(on_cpu(mine), terms_of.standards_of(terms, draws))


@pytest.mark.parametrize("name", sequences.PACKED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_are_as_exact_as_each_alone(dtype, name):
    packed = sequences.PACKED[name]
    draws = [sequences.packed_inputs(packed, dtype, seed) for seed in range(16)]
    bounds = {
        "query_starts": sequences.starts_of(packed.query_lengths).to(DEVICE),
        "key_starts": sequences.starts_of(packed.key_lengths).to(DEVICE),
    }

    def served(query, key, value):
        return nearpeak.attention(query, key, value, **packed.options, **bounds, return_lse=True)

    with nearpeak.use_backend("triton"):
        mine = attention.values(served, on_device(draws))
    layer = sequences.one_by_one(packed)
    expected = standards([attention.values(layer, draws)], attention.values(layer, attention.doubled(draws)))
    assert_as_exact(on_cpu(mine), expected)


@pytest.mark.parametrize("kept", [terms_of.ALL, terms_of.HEADS, terms_of.KEYS], ids=str)
def test_gradients_of_a_bias_are_the_same_bits_every_time(kept):
    terms = terms_of.Terms(Case(200, 700, heads=4, key_heads=2, batch=3, causal=True), bias=kept)
    ((inputs, grads),) = on_device(terms_of.draws_of(terms, torch.float32, count=1)[:1])

    def served(query, key, value, bias):
        return nearpeak.attention(query, key, value, bias=bias, causal=True, return_lse=True)

    first, second = (attention.plain.value_and_gradients(served, inputs[:4], grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_of_backward_grows_with_the_length_alone():
    peaks = []
    for length in (2000, 4000):
        query = torch.randn(1, 8, length, 64, device=DEVICE, requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        nearpeak.attention(query, query, query, causal=True).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 2.5 * peaks[0]
