"""nearpeak as PyTorch's flash attention: under every F.scaled_dot_product_attention while active, and not after."""

import contextlib

import plain
import pytest
import torch
import torch.nn.functional as F
from draws import DRAWS, assert_as_exact, standards
from inputs import DTYPES, every_second, randn, sequence_first

pytestmark = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="this torch has no such door"
)


@contextlib.contextmanager
def active():
    torch.nn.attention.activate_flash_attention_impl("nearpeak")
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def results(activated, layer, draws):
    with active() if activated else contextlib.nullcontext():
        return [plain.value_and_gradients(layer, inputs, grads) for inputs, grads in draws]


def operands(dtype, seed=0, heads=4, key_heads=4, head_dim=16):
    shapes = [(2, heads, 9, head_dim), *[(2, key_heads, 13, head_dim)] * 2]
    inputs = tuple(randn(*shape, dtype=dtype, seed=10 * seed + i) for i, shape in enumerate(shapes))
    return inputs, (randn(*shapes[0], dtype=dtype, seed=10 * seed + 3),)


CALLS = {
    "full": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.5},
    "bool_mask": {"attn_mask": randn(9, 13) < 1.0},
    "float_mask": {"attn_mask": randn(2, 1, 9, 13, seed=5)},
    "keys": {"attn_mask": (torch.arange(13) < torch.tensor([[5], [13]]))[:, None, None]},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_torch(serving, dtype, call):
    options = dict(CALLS[call])
    mask = options.pop("attn_mask", None)

    def layer(query, key, value):
        own = mask if mask is None or mask.dtype is torch.bool else mask.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=own, **options)

    draws = [operands(dtype, seed) for seed in range(4 * DRAWS)]
    doubles = [(plain.doubled(inputs), plain.doubled(grads)) for inputs, grads in draws]
    theirs, exact = results(False, layer, draws), results(False, layer, doubles)
    assert_as_exact(results(True, layer, draws), standards([theirs], exact))


def test_it_serves_while_active_and_not_after():
    (query, key, value), _ = operands(torch.float32)
    with torch.profiler.profile() as before:
        theirs = F.scaled_dot_product_attention(query, key, value)
    with active(), torch.profiler.profile() as during:
        mine = F.scaled_dot_product_attention(query, key, value)
    assert "nearpeak::attention_inference" in {event.key for event in during.key_averages()}
    assert "nearpeak::attention_inference" not in {event.key for event in before.key_averages()}
    assert torch.equal(F.scaled_dot_product_attention(query, key, value), theirs)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("layout", [lambda t: t, sequence_first, every_second], ids=["heads", "sequence", "strided"])
def test_results_are_laid_out_as_torchs(layout):
    inputs, (grad,) = operands(torch.float32)
    both = []
    for activated in (False, True):
        leaves = [layout(t).detach().requires_grad_() for t in inputs]
        with active() if activated else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(*leaves)
            gradients = torch.autograd.grad(out, leaves, grad)
        both.append((out, *gradients))
    for theirs, mine in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.stride() == theirs.stride()


def test_compiled_programs_run_it():
    inputs, _ = operands(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2, fullgraph=True
    )
    expected = compiled(*inputs)
    with active(), torch.profiler.profile() as profile:
        torch.testing.assert_close(compiled(*inputs), expected)
    assert "nearpeak::attention_inference" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "wide"])
def test_what_the_kernels_do_not_take_is_served_in_plain_pytorch(dtype):
    head_dim = 16 if dtype is torch.float64 else 600
    draws = [operands(dtype, head_dim=head_dim)]
    (mine,), (theirs,) = (results(activated, F.scaled_dot_product_attention, draws) for activated in (True, False))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_grouped_heads_and_modules():
    (query, key, value), _ = operands(torch.float32, key_heads=2)
    layer = torch.nn.TransformerEncoderLayer(32, 4, dropout=0.0, batch_first=True).train()
    x = randn(2, 9, 32)
    theirs = F.scaled_dot_product_attention(query, key, value, enable_gqa=True), layer(x)
    with active():
        mine = F.scaled_dot_product_attention(query, key, value, enable_gqa=True), layer(x)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
