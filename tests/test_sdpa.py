"""nearpeak.scaled_dot_product_attention: torch's function to the letter, as exact as torch's, or torch itself."""

import inspect
from typing import NamedTuple

import nearpeak
import plain
import pytest
import torch
import torch.nn.functional as F
from draws import DRAWS, assert_as_exact, standards
from inputs import DTYPES, case_name, every_second, randn, sequence_first


class Case(NamedTuple):
    query_length: int = 17
    key_length: int = 17
    heads: int = 4
    key_heads: int = 4
    head_dim: int = 32
    batch: int = 2
    seed: int = 0


LENGTHS = [(17, 17), (5, 33), (33, 5), (1, 40), (40, 1), (0, 4), (97, 97)]
CASES = [
    *(Case(*lengths, heads, key_heads) for lengths in LENGTHS for heads, key_heads in ((4, 4), (4, 1), (6, 2))),
    *(Case(head_dim=head_dim) for head_dim in (1, 8, 63, 256)),
    Case(batch=0),
]


def inputs_of(case, dtype):
    shapes = [(case.batch, case.heads, case.query_length, case.head_dim)]
    shapes += [(case.batch, case.key_heads, case.key_length, case.head_dim)] * 2
    inputs = tuple(randn(*shape, dtype=dtype, seed=case.seed + i) for i, shape in enumerate(shapes))
    return inputs, (randn(*shapes[0], dtype=dtype, seed=case.seed + 3),)


def served(**options):
    return lambda query, key, value: nearpeak.scaled_dot_product_attention(query, key, value, **options)


def torch_layer(**options):
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, **options)


def values(layer, draws):
    return [plain.value_and_gradients(layer, inputs, grads) for inputs, grads in draws]


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_torch(serving, dtype, is_causal, case):
    options = {"is_causal": is_causal, "enable_gqa": case.key_heads != case.heads, "scale": 0.3}
    draws = [inputs_of(case._replace(seed=10 * draw), dtype) for draw in range(DRAWS)]
    doubles = [(plain.doubled(inputs), plain.doubled(grads)) for inputs, grads in draws]
    results = values(served(**options), draws)
    assert_as_exact(
        results, standards([values(torch_layer(**options), draws)], values(torch_layer(**options), doubles))
    )


def test_the_signature_is_torchs():
    mine = inspect.signature(nearpeak.scaled_dot_product_attention).parameters
    theirs = torch.ops.aten.scaled_dot_product_attention.default._schema.arguments
    assert [(name, p.default) for name, p in mine.items() if p.default is not p.empty] == [
        (argument.name, argument.default_value) for argument in theirs if argument.has_default_value()
    ]
    assert list(mine) == [argument.name for argument in theirs]


Q, K = randn(2, 4, 5, 8), randn(2, 4, 7, 8, seed=1)
MASK = torch.arange(7) < torch.arange(2, 7)[:, None]
MASKED = {
    "bool_mask": ((K,), {"attn_mask": MASK}),
    "float_mask": ((K,), {"attn_mask": randn(5, 7, seed=2)}),
    "mask_of_infinities": ((K,), {"attn_mask": torch.zeros(5, 7).masked_fill(~MASK, -torch.inf)}),
    "mask_of_the_most_negative": ((K,), {"attn_mask": torch.zeros(5, 7).masked_fill(~MASK, -3e38)}),
    "mask_per_head": ((K,), {"attn_mask": randn(2, 4, 5, 7, seed=2)}),
    "mask_of_keys": ((K,), {"attn_mask": torch.arange(7) < torch.tensor([3, 6])[:, None, None, None]}),
    "mask_and_causal": ((K,), {"attn_mask": MASK, "is_causal": True}),
    "mask_and_gqa": ((K[:, :2],), {"attn_mask": MASK, "enable_gqa": True}),
    "value_of_another_width": ((K, randn(2, 4, 7, 16, seed=3)), {"is_causal": True}),
    "wide_heads": ((randn(2, 4, 7, 300, seed=1),), {}),
}


@pytest.mark.parametrize("call", MASKED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_are_as_exact_as_torch(serving, dtype, call):
    keys, options = MASKED[call]
    mask = options.get("attn_mask")

    def layer(function):
        def run(query, key, value):
            if mask is not None and mask.dtype is not torch.bool:
                lowest = max(-3e38, torch.finfo(query.dtype).min)
                finite = mask.clamp(min=lowest) if mask.isfinite().all() else mask
                return function(query, key, value, **{**options, "attn_mask": finite.to(query.dtype)})
            return function(query, key, value, **options)

        return run

    shapes = [(2, 4, 5, keys[0].shape[3]), keys[0].shape, keys[-1].shape]
    draws = []
    for draw in range(4 * DRAWS):
        inputs = tuple(randn(*shape, dtype=dtype, seed=10 * draw + i) for i, shape in enumerate(shapes))
        draws.append((inputs, (randn(2, 4, 5, shapes[2][3], dtype=dtype, seed=10 * draw + 5),)))
    doubles = [(plain.doubled(inputs), plain.doubled(grads)) for inputs, grads in draws]
    torchs = layer(F.scaled_dot_product_attention)
    results = values(layer(nearpeak.scaled_dot_product_attention), draws)
    assert_as_exact(results, standards([values(torchs, draws)], values(torchs, doubles)))


def test_a_float_mask_gets_its_gradient(serving):
    mask, grad = randn(4, 5, 7, seed=4), randn(2, 4, 5, 8, seed=5)
    mine, theirs = (
        plain.value_and_gradients(function, (Q, K, K.flip(0), mask), (grad,))
        for function in (nearpeak.scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_without_keys_are_zero(serving):
    mask = MASK.clone()
    mask[1] = False
    assert (nearpeak.scaled_dot_product_attention(Q, K, K, mask)[:, :, 1] == 0).all()


HANDED_OVER = {
    "three_dimensions": ((Q[0], K[0], K[0]), {"is_causal": True}),
    "two_dimensions": ((Q[0, 0], K[0, 0], K[0, 0]), {}),
    "five_dimensions": ((Q[None], K[None], K[None]), {}),
    "one_batch_of_keys": ((Q, K[:1], K[:1]), {}),
    "one_head_of_keys": ((Q, K[:, :1], K[:, :1]), {}),
    "wider_heads": ((randn(1, 2, 5, 600), randn(1, 2, 7, 600), randn(1, 2, 7, 600)), {}),
    "strided": ((every_second(Q), K, K), {}),
    "no_head_dim": ((Q[..., :0], K[..., :0], K[..., :0]), {}),
}


@pytest.mark.parametrize("call", HANDED_OVER)
def test_calls_that_torch_serves_are_torchs(serving, call):
    args, options = HANDED_OVER[call]
    expected = F.scaled_dot_product_attention(*args, **options)
    assert torch.equal(nearpeak.scaled_dot_product_attention(*args, **options), expected)


def test_dropout_is_that_of_attention(serving):
    torch.manual_seed(5)
    expected = nearpeak.attention(Q, K, K, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(nearpeak.scaled_dot_product_attention(Q, K, K, dropout_p=0.5), expected)


@pytest.mark.parametrize("p", [-0.5, 1.0, 1.5])
def test_a_dropout_beyond_its_range_is_what_torch_makes_of_it(serving, p):
    try:
        expected = F.scaled_dot_product_attention(Q, K, K, dropout_p=p)
    except ERRORS:
        with pytest.raises(ERRORS):
            nearpeak.scaled_dot_product_attention(Q, K, K, dropout_p=p)
    else:
        torch.testing.assert_close(nearpeak.scaled_dot_product_attention(Q, K, K, dropout_p=p), expected)


REFUSED = {
    "two_dtypes": ((Q, K.half(), K.half()), {}),
    "value_of_another_dtype": ((Q, K, K.half()), {}),
    "integers": ((Q.int(), K.int(), K.int()), {}),
    "another_device": ((Q, K.to("meta"), K.to("meta")), {}),
    "another_head_dim": ((Q, K[..., :4], K[..., :4]), {}),
    "another_batch": ((Q, randn(3, 4, 7, 8), randn(3, 4, 7, 8)), {}),
    "heads_without_enable_gqa": ((Q, K[:, :2], K[:, :2]), {}),
    "heads_that_do_not_divide": ((Q, K[:, :3], K[:, :3]), {"enable_gqa": True}),
    "one_dimension": ((Q[0, 0, 0], K[0, 0, 0], K[0, 0, 0]), {}),
    "not_a_tensor": (([1.0], K, K), {}),
}
ERRORS = (RuntimeError, ValueError, TypeError)


@pytest.mark.parametrize("call", REFUSED)
def test_what_torch_refuses_is_refused(serving, call):
    args, options = REFUSED[call]
    with pytest.raises(ERRORS):
        F.scaled_dot_product_attention(*args, **options)
    with pytest.raises(ERRORS):
        nearpeak.scaled_dot_product_attention(*args, **options)


def test_causal_aligns_to_the_top_left(serving):
    """Where nearpeak.attention aligns to the bottom right."""
    value = torch.eye(7, 8).expand(2, 4, 7, 8)
    out = nearpeak.scaled_dot_product_attention(Q, K, value, is_causal=True)
    assert torch.equal(out[0, 0] > 0, torch.ones(5, 8).tril().bool())
    assert torch.equal(nearpeak.attention(Q, K, value, causal=True)[0, 0] > 0, torch.ones(5, 8).tril(2).bool()[:, :8])


def test_out_is_laid_out_as_query(serving):
    query = sequence_first(Q)
    assert nearpeak.scaled_dot_product_attention(query, K, K).stride() == query.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_casts_as_torch_does(serving, dtype):
    with torch.autocast("cpu", dtype=dtype):
        mine = nearpeak.scaled_dot_product_attention(Q, K.bfloat16(), K)
        theirs = F.scaled_dot_product_attention(Q, K.bfloat16(), K)
    assert mine.dtype is theirs.dtype is dtype
