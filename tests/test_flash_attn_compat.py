"""nearpeak.compat.flash_attn for whole batches and packed sequences: flash-attn's signatures and meaning, by loops."""

import inspect
import subprocess
import sys

import nearpeak
import plain
import pytest
import torch
from flash_attn_loops import attend, slopes_of
from inputs import DTYPES, every_second, randn
from nearpeak.compat import flash_attn

BATCH, HEADS, KEY_HEADS, HEAD_DIM = 2, 4, 2, 6

TRAINING = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
TRAINING += "alibi_slopes=None, deterministic=False, return_attn_probs=False"
BOUNDS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {TRAINING})",
    "flash_attn_kvpacked_func": f"(q, kv, {TRAINING})",
    "flash_attn_qkvpacked_func": f"(qkv, {TRAINING})",
    "flash_attn_varlen_func": f"(q, k, v, {BOUNDS}, {TRAINING}, block_table=None)",
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {BOUNDS}, {TRAINING})",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {TRAINING})",
    "flash_attn_with_kvcache": "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False)",
}

OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.7},
    "window": {"window_size": (2, 1)},
    "left window": {"window_size": [3, -1]},
    "right window": {"window_size": (-1, 0)},
    "causal window": {"causal": True, "window_size": (2, 5)},
    "softcap": {"softcap": 1.5, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 1.0])},
    "alibi of each": {"alibi_slopes": torch.tensor([[0.5, 0.25, 0.1, 1.0], [0.3, 0.0, 2.0, 0.7]]), "causal": True},
    "deterministic": {"deterministic": True},
}
LENGTHS = {"self": (5, 5), "more keys": (3, 7), "more queries": (6, 2), "decode": (1, 9), "no keys": (3, 0)}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signature_is_flash_attns(name):
    assert str(inspect.signature(getattr(flash_attn, name))) == SIGNATURES[name]


def batch_of(lengths, dtype=torch.float64, value_dim=HEAD_DIM):
    queries, keys = lengths
    shapes = (queries, HEADS, HEAD_DIM), (keys, KEY_HEADS, HEAD_DIM), (keys, KEY_HEADS, value_dim)
    inputs = tuple(randn(BATCH, *shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    grads = randn(BATCH, queries, HEADS, value_dim, dtype=dtype, seed=5), randn(BATCH, HEADS, queries, seed=6)
    return inputs, (grads[0], grads[1].to(plain.lse_dtype(dtype)))


def with_lse(function, **options):
    """The function's out and lse."""

    def call(*arguments):
        out, lse, probabilities = function(*arguments, **options, return_attn_probs=True)
        assert probabilities is None
        assert torch.equal(function(*arguments, **options), out)
        return out, lse

    return call


def looped(options):
    """out and lse of a batch, or of a list of sequences, each attended to in loops."""
    options = {name: value for name, value in options.items() if name != "deterministic"}
    alibi_slopes = options.pop("alibi_slopes", None)

    def call(q, k, v):
        results = [
            attend(*each, **options, slopes=slopes_of(alibi_slopes, index))
            for index, each in enumerate(zip(q, k, v, strict=True))
        ]
        outs, lses = zip(*results, strict=True)
        return torch.stack(outs), torch.stack(lses)

    return call


def assert_equal_to_loops(function, loops, inputs, grads):
    mine, theirs = (plain.value_and_gradients(each, inputs, grads) for each in (function, loops))
    for result, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_batch_means_what_flash_attn_documents(lengths, options):
    inputs, grads = batch_of(LENGTHS[lengths])
    options = OPTIONS[options]
    if LENGTHS[lengths][1] == 0:
        function, loops = with_lse(flash_attn.flash_attn_func, **options), looped(options)
        assert all(torch.equal(a, b) for a, b in zip(function(*inputs), loops(*inputs), strict=True))
        return
    assert_equal_to_loops(with_lse(flash_attn.flash_attn_func, **options), looped(options), inputs, grads)


def test_values_may_have_another_width():
    inputs, grads = batch_of((3, 7), value_dim=3)
    assert_equal_to_loops(with_lse(flash_attn.flash_attn_func), looped({}), inputs, grads)


def test_packed_tensors_hold_queries_keys_and_values_in_this_order():
    (q, k, v), grads = batch_of((5, 5))
    options = {"causal": True, "softcap": 2.0}
    kv = torch.stack((k, v), 2)
    function = with_lse(flash_attn.flash_attn_kvpacked_func, **options)
    assert_equal_to_loops(function, lambda q, kv: looped(options)(q, *kv.unbind(2)), (q, kv), grads)
    qkv = torch.stack((q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)), 2)
    function = with_lse(flash_attn.flash_attn_qkvpacked_func, **options)
    assert_equal_to_loops(function, lambda qkv: looped(options)(*qkv.unbind(2)), (qkv,), grads)


SEQUENCES = {
    "self": ((5, 1, 4), (5, 1, 4)),
    "cross": ((3, 0, 2, 4), (7, 2, 0, 1)),
    "one": ((4,), (6,)),
    "none": ((), ()),
}


def starts_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def tokens_of(lengths, dtype=torch.float64):
    queries, keys = map(sum, lengths)
    shapes = (queries, HEADS, HEAD_DIM), (keys, KEY_HEADS, HEAD_DIM), (keys, KEY_HEADS, HEAD_DIM)
    inputs = tuple(randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    grads = randn(*shapes[0], dtype=dtype, seed=5), randn(HEADS, queries, seed=6).to(plain.lse_dtype(dtype))
    return inputs, grads


def looped_sequences(lengths, options):
    options = {name: value for name, value in options.items() if name != "deterministic"}
    alibi_slopes = options.pop("alibi_slopes", None)

    def call(q, k, v):
        parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
        results = [attend(*part, **options, slopes=slopes_of(alibi_slopes, index)) for index, part in enumerate(parts)]
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(lses, 1)

    return call


def bounds_of(lengths):
    longest = [max(each, default=0) for each in lengths]
    return dict(zip(BOUNDS.split(", "), (*map(starts_of, lengths), *longest), strict=True))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sequences", ["self", "cross", "one"])
def test_packed_sequences_mean_what_flash_attn_documents(sequences, options):
    lengths, options = SEQUENCES[sequences], OPTIONS[options]
    if "alibi_slopes" in options and options["alibi_slopes"].dim() == 2:
        slopes = options["alibi_slopes"]
        options = {**options, "alibi_slopes": torch.cat((slopes, slopes + 0.1))[: len(lengths[0])]}
    inputs, grads = tokens_of(lengths)
    function = with_lse(flash_attn.flash_attn_varlen_func, **bounds_of(lengths), **options)
    assert_equal_to_loops(function, looped_sequences(lengths, options), inputs, grads)


@pytest.mark.parametrize("slopes", [None, torch.ones(HEADS), torch.ones(0, HEADS)], ids=["none", "heads", "each"])
def test_no_sequences_give_no_tokens(slopes):
    inputs, _ = tokens_of(SEQUENCES["none"])
    bounds = bounds_of(SEQUENCES["none"])
    out, lse = with_lse(flash_attn.flash_attn_varlen_func, **bounds, alibi_slopes=slopes)(*inputs)
    assert (out.shape, lse.shape) == ((0, HEADS, HEAD_DIM), (HEADS, 0))


def test_packed_tensors_of_sequences():
    lengths = SEQUENCES["self"]
    (q, k, v), grads = tokens_of(lengths)
    loops, bounds = looped_sequences(lengths, {"causal": True}), bounds_of(lengths)
    function = with_lse(flash_attn.flash_attn_varlen_kvpacked_func, **bounds, causal=True)
    assert_equal_to_loops(function, lambda q, kv: loops(q, *kv.unbind(1)), (q, torch.stack((k, v), 1)), grads)
    qkv = torch.stack((q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)), 1)
    bounds = {"cu_seqlens": bounds["cu_seqlens_q"], "max_seqlen": 5}
    function = with_lse(flash_attn.flash_attn_varlen_qkvpacked_func, **bounds, causal=True)
    assert_equal_to_loops(function, lambda qkv: loops(*qkv.unbind(1)), (qkv,), grads)


def test_sequences_of_pages():
    """Shuffled pages of 4 keys; entries of the table behind a sequence's last page are no pages."""
    lengths, options = ((3, 1, 0), (9, 4, 5)), {"causal": True, "window_size": (5, 0)}
    (q, k, v), grads = tokens_of(lengths)
    table = torch.tensor([[6, 0, 3], [4, -1, 99], [1, 2, -7]], dtype=torch.int32)
    pages = torch.full((2, 7, 4, KEY_HEADS, HEAD_DIM), torch.nan, dtype=torch.float64)
    for index, parts in enumerate(zip(k.split(lengths[1]), v.split(lengths[1]), strict=True)):
        for row in range(lengths[1][index]):
            for part, paged in zip(parts, pages, strict=True):
                paged[table[index, row // 4], row % 4] = part[row]
    function = with_lse(flash_attn.flash_attn_varlen_func, **bounds_of(lengths), **options, block_table=table)
    expected = looped_sequences(lengths, options)(q, k, v)
    for result, wanted in zip(function(q, *pages), expected, strict=True):
        torch.testing.assert_close(result, wanted)
    d_q, d_pages = torch.autograd.grad(function(q.requires_grad_(), *pages.requires_grad_()), (q, pages), grads)
    assert not d_q.isnan().any()
    assert d_pages[0, table[0, 0].item()].abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_attentions_own_result(serving, dtype):
    inputs, grads = batch_of((5, 7), dtype)
    options = {"causal": True, "window_size": (4, 0), "softcap": 2.0, "alibi_slopes": torch.rand(HEADS)}

    def own(q, k, v):
        out, lse = nearpeak.attention(
            *(t.transpose(1, 2) for t in (q, k, v)), causal=True, window=(4, 0), softcap=2.0,
            alibi_slopes=options["alibi_slopes"], return_lse=True,
        )  # fmt: skip
        return out.transpose(1, 2), lse

    function = with_lse(flash_attn.flash_attn_func, **options)
    mine, theirs = (plain.value_and_gradients(each, inputs, grads) for each in (function, own))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_out_lies_in_memory_as_flash_attns(serving):
    (q, k, v), _ = batch_of((5, 7), torch.float32)
    assert flash_attn.flash_attn_func(q, k, v).is_contiguous()
    strided = flash_attn.flash_attn_func(*map(every_second, (q, k, v)))
    assert torch.equal(strided, flash_attn.flash_attn_func(q, k, v))
    (q, k, v), _ = tokens_of(SEQUENCES["self"], torch.float32)
    bounds = bounds_of(SEQUENCES["self"])
    out = flash_attn.flash_attn_varlen_func(q, k, v, **bounds)
    assert out.is_contiguous()
    strided = flash_attn.flash_attn_varlen_func(*map(every_second, (q, k, v)), **bounds)
    assert torch.equal(strided, out)


def test_one_graph_under_compile(serving):
    (q, k, v), _ = batch_of((5, 7), torch.float32)
    tokens, bounds = tokens_of(SEQUENCES["self"], torch.float32)[0], bounds_of(SEQUENCES["self"])

    def calls(q, k, v, *tokens):
        one = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(3, -1))
        if serving == "reference":  # which reads where sequences begin
            return (one,)
        return one, *flash_attn.flash_attn_varlen_func(*tokens, **bounds, return_attn_probs=True)[:2]

    torch._dynamo.reset()
    compiled = torch.compile(calls, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(q, k, v, *tokens), calls(q, k, v, *tokens), strict=True):
        assert torch.equal(result, expected)


PROGRAM = """
import sys
import nearpeak, torch
nearpeak.compat.flash_attn.install()
nearpeak.compat.flash_attn.install()
import flash_attn
import flash_attn.flash_attn_interface
import importlib.util
from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import flash_attn_varlen_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
assert importlib.util.find_spec("flash_attn").name == "flash_attn"
assert flash_attn.flash_attn_func is flash_attn_func is nearpeak.compat.flash_attn.flash_attn_func
assert flash_attn.flash_attn_interface.flash_attn_with_kvcache is flash_attn_with_kvcache
assert tuple(map(int, flash_attn.__version__.split("+")[0].split("."))) >= (2, 8)
try:
    import flash_attn.layers
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("flash_attn.layers is not ours to give")
out = flash_attn_func(torch.randn(1, 3, 2, 8), *torch.randn(2, 1, 3, 2, 8), causal=True)
assert out.shape == (1, 3, 2, 8)
nearpeak.compat.flash_attn.uninstall()
assert not any(name.split(".")[0] == "flash_attn" for name in sys.modules)
try:
    nearpeak.compat.flash_attn.uninstall()
except RuntimeError as error:
    assert "install()" in str(error)
else:
    raise AssertionError("what is not installed was uninstalled")
sys.modules["flash_attn"] = type(sys)("flash_attn")
try:
    nearpeak.compat.flash_attn.install()
except RuntimeError as error:
    assert "imported already" in str(error)
else:
    raise AssertionError("the real flash_attn was replaced")
assert not hasattr(sys.modules["flash_attn"], "flash_attn_func")
"""


def test_a_program_that_imports_flash_attn_runs_unchanged():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_padded_batches_are_packed_and_padded_again():
    from nearpeak.compat.flash_attn.padding import pad_input, unpad_input

    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    batch = randn(3, 4, HEADS, HEAD_DIM, dtype=torch.float64).requires_grad_()
    tokens, indices, starts, longest, used = unpad_input(batch, mask)
    assert (starts.tolist(), starts.dtype, longest, used.tolist()) == ([0, 2, 6, 6], torch.int32, 4, [2, 4, 0])
    assert torch.equal(tokens[2:], batch[1])
    assert torch.equal(pad_input(tokens, indices, 3, 4), batch * mask[..., None, None])
    padded = torch.autograd.grad(pad_input(tokens, indices, 3, 4).sum(), batch)[0]
    assert torch.equal(padded, mask[..., None, None].expand_as(batch).double())
    tokens, _, starts, longest, used = unpad_input(batch, mask, torch.tensor([[0, 0, 1, 0], [0] * 4, [0] * 4]))
    assert (len(tokens), starts.tolist(), longest, used.tolist()) == (7, [0, 3, 7, 7], 4, [2, 4, 0])


Q, K = torch.ones(2, 5, 4, 8), torch.ones(2, 7, 2, 8)
TOKENS, STARTS = torch.ones(10, 4, 8), torch.tensor([0, 3, 10])
PAGES = torch.ones(3, 4, 4, 8)


def batched(q=Q, k=K, v=None, **options):
    return lambda: flash_attn.flash_attn_func(q, k, k if v is None else v, **options)


def packed(q=TOKENS, k=TOKENS, starts=STARTS, key_starts=STARTS, **options):
    return lambda: flash_attn.flash_attn_varlen_func(q, k, k, starts, key_starts, 7, 7, **options)


BAD = {
    "dropout of all": (ValueError, "dropout_p", batched(dropout_p=1.0)),
    "dropout of all sequences": (ValueError, "dropout_p", packed(dropout_p=1.0)),
    "negative dropout": (ValueError, "dropout_p", batched(dropout_p=-0.1)),
    "window": (ValueError, "window_size", batched(window_size=3)),
    "integers": (TypeError, "q must", batched(Q.int())),
    "no tensor": (TypeError, "k must", batched(k=[1.0])),
    "another dtype": (TypeError, "v must", batched(v=K.half())),
    "three dimensions": (ValueError, "q must", batched(Q[0])),
    "another batch": (ValueError, "k must", batched(k=K[:1])),
    "another head_dim": (ValueError, "k must", batched(k=K[..., :4])),
    "heads": (ValueError, "k must", batched(k=torch.ones(2, 7, 3, 8))),
    "another length": (ValueError, "v must", batched(v=K[:, :5])),
    "slopes": (ValueError, "alibi_slopes", batched(alibi_slopes=torch.ones(3))),
    "two keys": (ValueError, "kv must", lambda: flash_attn.flash_attn_kvpacked_func(Q, K[:, None])),
    "kv": (ValueError, "kv must", lambda: flash_attn.flash_attn_kvpacked_func(Q, K)),
    "qkv": (ValueError, "qkv must", lambda: flash_attn.flash_attn_qkvpacked_func(Q)),
    "no qkv": (TypeError, "qkv must", lambda: flash_attn.flash_attn_varlen_qkvpacked_func([1.0], STARTS, 7)),
    "batched tokens": (ValueError, "q must", packed(Q)),
    "float starts": (TypeError, "cu_seqlens_q", packed(starts=STARTS.float())),
    "list of starts": (TypeError, "cu_seqlens_k", packed(key_starts=[0, 3, 10])),
    "fewer starts": (ValueError, "cu_seqlens_k", packed(key_starts=STARTS[:2])),
    "too few tokens": (ValueError, "cu_seqlens_q", packed(starts=torch.tensor([0, 3, 9]))),
    "too many keys": (ValueError, "cu_seqlens_k", packed(key_starts=torch.tensor([0, 3, 11]))),
    "falling": (ValueError, "cu_seqlens_k", packed(key_starts=torch.tensor([0, 7, 3]))),
    "slopes of sequences": (ValueError, "alibi_slopes", packed(alibi_slopes=torch.ones(3, 4))),
    "starts with slopes": (
        ValueError,
        "cu_seqlens_q",
        packed(starts=torch.tensor([0, 3, 9]), alibi_slopes=torch.ones(2, 4)),
    ),
    "no pages": (ValueError, "k must", packed(block_table=torch.zeros(2, 2).int())),
    "table": (ValueError, "block_table", packed(k=PAGES, block_table=torch.zeros(3, 2).int())),
    "short table": (ValueError, "block_table", packed(k=PAGES, block_table=torch.zeros(2, 1).int())),
    "page that is not there": (
        ValueError,
        "block_table",
        packed(k=PAGES, block_table=torch.tensor([[0, 0], [1, 3]])),
    ),
    "negative page": (ValueError, "block_table", packed(k=PAGES, block_table=torch.tensor([[-1, 0], [1, 2]]))),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(bad):
    error, message, call = BAD[bad]
    with pytest.raises(error, match=message):
        call()


def test_dropout_is_attentions():
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8)
    torch.manual_seed(3)
    out = flash_attn.flash_attn_func(q, k, k, dropout_p=0.5)
    torch.manual_seed(3)
    query, key = q.transpose(1, 2), k.transpose(1, 2)
    expected = nearpeak.attention(query, key, key, dropout_p=0.5)
    assert torch.equal(out, expected.transpose(1, 2))
    assert not torch.equal(out, flash_attn.flash_attn_func(q, k, k))
    torch.manual_seed(3)
    tokens, starts = torch.randn(10, 4, 8), torch.tensor([0, 3, 10])
    dropped = flash_attn.flash_attn_varlen_func(tokens, tokens, tokens, starts, starts, 7, 7, dropout_p=0.5)
    assert not torch.equal(dropped, flash_attn.flash_attn_varlen_func(tokens, tokens, tokens, starts, starts, 7, 7))
