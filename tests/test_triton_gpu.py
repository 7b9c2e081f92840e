"""Attention's Triton kernels on a GPU, through the public function: as exact as plain, forward and backward."""

import nearpeak
import pytest
import test_attention as attention
import torch
from draws import assert_as_exact
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


def test_memory_of_backward_grows_with_the_length_alone():
    peaks = []
    for length in (2000, 4000):
        query = torch.randn(1, 8, length, 64, device=DEVICE, requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        nearpeak.attention(query, query, query, causal=True).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 2.5 * peaks[0]
