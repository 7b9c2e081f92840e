"""QK-norm: query and key as exact as by PyTorch's layer, on every backend, wherever they lie, forward and backward."""

import functools
import math
from typing import NamedTuple

import nearpeak
import plain
import pytest
import torch
from draws import DRAWS, assert_as_exact, standards
from inputs import DTYPES, case_name, every_second, laid_out_like, misaligned, padded, randn
from nearpeak.norm import reference


class Case(NamedTuple):
    """query is (2, sequence, heads, head_dim) and key (2, sequence, key_heads, head_dim); see LAYOUTS for others."""

    sequence: int = 5
    heads: int = 3
    key_heads: int = 2
    head_dim: int = 64
    weight: torch.dtype | str | None = "x's dtype"
    offset: float = 0.0
    cast_first: bool = False
    eps: float = 1e-6
    magnitude: float = 1.0
    seed: int = 0


CASES = [
    *(Case(head_dim=head_dim) for head_dim in (2, 7, 16, 33, 96, 128, 256, 320)),
    Case(head_dim=1, eps=1.0),
    *(Case(sequence=sequence) for sequence in (0, 1, 33)),
    *(Case(heads=heads, key_heads=key_heads) for heads, key_heads in ((1, 1), (17, 8), (4, 0), (0, 2), (0, 0))),
    *(Case(weight=weight, offset=1.0) for weight in ("x's dtype", None, torch.float32)),
    *(Case(cast_first=True, weight=weight) for weight in ("x's dtype", None, torch.float32)),
    *(Case(magnitude=magnitude) for magnitude in (1e-3, 1e3)),
    Case(sequence=70, head_dim=20),
]


def inputs_of(case, dtype):
    """query, key, and their weights or None; and gradients of the outputs."""
    shapes = [(2, case.sequence, heads, case.head_dim) for heads in (case.heads, case.key_heads)]
    parts = [randn(*shape, dtype=dtype, magnitude=case.magnitude, seed=case.seed + i) for i, shape in enumerate(shapes)]
    weights = [None, None]
    if case.weight is not None:
        weight_dtype = dtype if case.weight == "x's dtype" else case.weight
        weights = [randn(case.head_dim, dtype=weight_dtype, seed=case.seed + 2 + i) for i in range(2)]
    return (*parts, *weights), [randn(*shape, dtype=dtype, seed=case.seed + 4 + i) for i, shape in enumerate(shapes)]


def draws_of(case, dtype, count=DRAWS):
    return [inputs_of(case._replace(seed=case.seed + 10 * draw), dtype) for draw in range(count)]


def served(case):
    options = {"offset": case.offset, "cast_first": case.cast_first}
    return lambda *inputs: nearpeak.qk_norm(*inputs, case.eps, **options)


def of_each(norm, case):
    """query and key by the layer `norm`, one after the other."""
    formula = case.eps, case.offset, case.cast_first
    return lambda query, key, query_weight, key_weight: (
        norm(query, query_weight, *formula),
        norm(key, key_weight, *formula),
    )


def results(case, draws):
    return [plain.value_and_gradients(served(case), *draw) for draw in draws]


def standards_of(case, draws):
    plains = [plain.value_and_gradients(of_each(plain.rms_norm, case), *draw) for draw in draws]
    doubles = [(plain.doubled(inputs), plain.doubled(grads)) for inputs, grads in draws]
    exacts = [plain.value_and_gradients(of_each(reference.rms_norm, case), *draw) for draw in doubles]
    return standards([plains], exacts)


@functools.lru_cache(maxsize=2)
def standard(case, dtype):
    return standards_of(case, draws_of(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(serving, dtype, case):
    mine = results(case, draws_of(case, dtype))
    assert all(t.dtype is dtype for result in mine for t in result[:4])
    assert_as_exact(mine, standard(case, dtype))


@pytest.mark.parametrize("case", CASES[::3], ids=case_name)
def test_forward_without_gradients_is_the_same(serving, case):
    inputs, grads = inputs_of(case, torch.float32)
    training = plain.value_and_gradients(served(case), inputs, grads)
    inference = plain.value_and_gradients(served(case), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inference, training, strict=False))


def packed(query, key):
    """Slices of one projection's result, (batch, sequence, heads, head_dim)."""
    both = torch.cat((query, key), dim=2)
    return both[:, :, : query.shape[2]], both[:, :, query.shape[2] :]


def heads_first(query, key):
    """(batch, heads, sequence, head_dim), lying in memory as the projection wrote them."""
    return tuple(t.transpose(1, 2) for t in packed(query, key))


def in_a_cache(query, key):
    """(batch, heads, sequence, head_dim), whose batch entries, heads and positions all have gaps between them."""
    cache = query.new_empty(3, query.shape[2] + key.shape[2] + 1, query.shape[1] + 4, query.shape[3])
    query_part = cache[:2, : query.shape[2], : query.shape[1]].copy_(query.transpose(1, 2))
    return query_part, cache[:2, query.shape[2] : -1, : query.shape[1]].copy_(key.transpose(1, 2))


def each(layout):
    return lambda query, key: (layout(query), layout(key))


LAYOUTS = {
    "packed": packed,
    "heads_first": heads_first,
    "in_a_cache": in_a_cache,
    "heads_first_contiguous": each(lambda t: t.transpose(1, 2).contiguous()),
    "padded": each(padded),
    "misaligned": each(misaligned),
    "every_second": each(every_second),
    "expanded": each(lambda t: t[:, :1].expand(t.shape)),
    "reversed_order": each(lambda t: t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_inputs_are_kept(serving, dtype, layout):
    check_layout(dtype, layout, draws_of(Case(head_dim=34), dtype))


def check_layout(dtype, layout, draws):
    case, lay_out = Case(head_dim=34), LAYOUTS[layout]
    draws = [
        (
            (*lay_out(*inputs[:2]), *inputs[2:]),
            [grad.reshape(t.shape) for grad, t in zip(grads, lay_out(*inputs[:2]), strict=True)],
        )
        for inputs, grads in draws
    ]
    mine = results(case, draws)
    assert_as_exact(mine, standards_of(case, draws))
    for tensor, like in zip(mine[0][:2], draws[0][0][:2], strict=True):
        assert laid_out_like(tensor, like)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_gradients_and_weights(serving, layout):
    check_layouts_of_gradients(layout, draws_of(Case(head_dim=34), torch.float32))


def check_layouts_of_gradients(layout, draws):
    def laid_out(inputs, grads):
        as_query = (t.transpose(1, 2) for t in inputs[:2]) if layout in HEADS_FIRST else inputs[:2]
        return (*as_query, *map(every_second, inputs[2:])), LAYOUTS[layout](*grads)

    case, draws = Case(head_dim=34), [laid_out(*draw) for draw in draws]
    assert_as_exact(results(case, draws), standards_of(case, draws))


HEADS_FIRST = ("heads_first", "in_a_cache", "heads_first_contiguous")


def test_only_the_gradients_asked_for(serving):
    inputs, _ = inputs_of(Case(), torch.float32)
    for wanted in range(4):
        leaf = inputs[wanted].detach().requires_grad_()
        arguments = [leaf if i == wanted else t for i, t in enumerate(inputs)]
        out = nearpeak.qk_norm(*arguments)[wanted % 2]
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
        (expected,) = torch.autograd.grad(of_each(plain.rms_norm, Case())(*arguments)[wanted % 2].sum(), leaf)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=["inf", "nan"])
def test_a_bad_head_spoils_no_other(serving, bad):
    (query, key, *_), _ = inputs_of(Case(), torch.float32)
    query[1, 2, 1, 5] = bad
    out_query, out_key = nearpeak.qk_norm(query, key)
    spoiled = out_query.isnan().any(-1)
    assert spoiled.sum() == 1
    assert spoiled[1, 2, 1]
    assert out_key.isfinite().all()


def test_float64_is_served_in_float64():
    inputs, grads = inputs_of(Case(offset=1.0), torch.float64)
    mine = plain.value_and_gradients(served(Case(offset=1.0)), inputs, grads)
    expected = plain.value_and_gradients(of_each(plain.rms_norm, Case(offset=1.0)), inputs, grads)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_formula_is_the_derivative():
    inputs = tuple(t.double().requires_grad_() for t in inputs_of(Case(sequence=2, head_dim=3), torch.float32)[0])
    assert torch.autograd.gradcheck(lambda *t: nearpeak.qk_norm(*t, 1e-3, offset=1.0), inputs, fast_mode=True)


Q, K, W = torch.ones(2, 5, 4, 8), torch.ones(2, 5, 2, 8), torch.ones(8)


def norm(query=Q, key=K, query_weight=W, key_weight=W):
    return lambda: nearpeak.qk_norm(query, key, query_weight, key_weight)


BAD = {
    "query_list": (TypeError, "query must", norm([1.0])),
    "query_int": (TypeError, "query must", norm(Q.int())),
    "query_3d": (ValueError, "query must", norm(Q[0])),
    "query_0d": (ValueError, "query must", norm(torch.tensor(1.0))),
    "query_no_head_dim": (ValueError, "query must", norm(Q[..., :0], K[..., :0], None, None)),
    "key_none": (TypeError, "key must", norm(key=None)),
    "key_dtype": (TypeError, "key must", norm(key=K.half())),
    "key_meta": (ValueError, "key must", norm(key=K.to("meta"))),
    "key_3d": (ValueError, "key must", norm(key=K[0])),
    "key_head_dim": (ValueError, "key must", norm(key=K[..., :4])),
    "query_weight_list": (TypeError, "query_weight must", norm(query_weight=[1.0] * 8)),
    "query_weight_shape": (ValueError, "query_weight must", norm(query_weight=W[:4])),
    "query_weight_dtype": (TypeError, "query_weight must", norm(query_weight=W.double())),
    "key_weight_shape": (ValueError, "key_weight must", norm(key_weight=W[:4])),
    "key_weight_dtype": (TypeError, "key_weight must", norm(key_weight=W.half())),
    "key_weight_meta": (ValueError, "key_weight must", norm(key_weight=W.to("meta"))),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(serving, bad):
    error, message, run = BAD[bad]
    with pytest.raises(error, match=message):
        run()
