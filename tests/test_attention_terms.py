"""Attention with what shapes its scores: bias, boolean mask, ALiBi, sinks; and with values of another width."""

import functools
import math
from typing import NamedTuple

import hypothesis.strategies as st
import nearpeak
import plain
import pytest
import torch
from draws import DRAWS, MOST_DRAWS, assert_as_exact, standards
from inputs import DTYPES, EXAMPLES, every_second, for_all, padded, randn
from nearpeak.attention import reference
from test_attention import ENOUGH_ROWS, Case, doubled, mask_of, scale_of, values, window_of


class Terms(NamedTuple):
    """What a case adds to attention's plain arguments: sizes of 1 broadcast."""

    case: Case = Case()
    bias: tuple | None = None  # which of (batch, heads, query length, key length) it has
    bias_dtype: torch.dtype | None = None  # None for query's
    mask: tuple | None = None
    alibi: tuple | None = None  # which of (batch, heads)
    sinks: bool = False
    value_dim: int | None = None


ALL, HEADS, KEYS, BATCH_KEYS, PAIRS = (1, 1, 1, 1), (0, 1, 1, 1), (0, 0, 0, 1), (1, 0, 0, 1), (0, 0, 1, 1)
WIDE = Case(33, 40, heads=4, key_heads=2, batch=2, causal=True)
FEW = Case(3, 97, heads=4, key_heads=2, batch=2)
LONG = Case(150, 400, heads=2, key_heads=1, batch=2, causal=True)
CASES = [
    *(Terms(case, bias=bias) for case in (WIDE, FEW) for bias in (ALL, HEADS, KEYS, BATCH_KEYS, PAIRS, (0, 1, 1, 0))),
    *(Terms(LONG, bias=bias) for bias in (ALL, HEADS, KEYS, (1, 0, 1, 1))),
    *(Terms(case, mask=mask) for case in (WIDE, FEW, LONG) for mask in (ALL, BATCH_KEYS, PAIRS, (1, 0, 1, 0))),
    *(Terms(case, alibi=alibi) for case in (WIDE, FEW, LONG) for alibi in ((0, 1), (1, 1))),
    *(Terms(case, sinks=True) for case in (WIDE, FEW, LONG, Case(5, 0), Case(40, 33, causal=True))),
    *(Terms(case, value_dim=dim) for case in (WIDE, FEW, LONG) for dim in (1, 17, 40)),
    Terms(Case(20, 30, head_dim=576), value_dim=512),
    Terms(Case(2, 70, head_dim=192, heads=16), value_dim=128),
    Terms(Case(9, 30, head_dim=8), value_dim=300),
    Terms(WIDE, bias=HEADS, bias_dtype=torch.float32),
    *(Terms(case, HEADS, None, BATCH_KEYS, (0, 1), True, 24) for case in (WIDE, FEW, LONG)),
    Terms(WIDE._replace(softcap=2.0), bias=ALL, mask=ALL, sinks=True),
    Terms(LONG._replace(softcap=20.0, window=(60, None)), bias=HEADS, alibi=(0, 1)),
    Terms(WIDE._replace(batch=0), bias=HEADS, mask=KEYS, alibi=(0, 1), sinks=True),
    Terms(Case(0, 9), bias=HEADS, mask=KEYS, sinks=True),
]


def terms_name(terms):
    case = "-".join(str(v) for name, v in terms.case._asdict().items() if v != Case._field_defaults[name])
    options = [f"{name}={v}" for name, v in list(terms._asdict().items())[1:] if v != Terms._field_defaults[name]]
    return "-".join([case, *options]).replace(" ", "")


def value_dim_of(terms):
    return terms.case.head_dim if terms.value_dim is None else terms.value_dim


def sizes_of(terms, kept):
    whole = (terms.case.batch, terms.case.heads, terms.case.query_length, terms.case.key_length)
    return [size if keep else 1 for size, keep in zip(whole, kept, strict=False)]


def inputs_of(terms, dtype):
    """(query, key, value, bias, sinks), None where there is none; and the gradients of (out, lse)."""
    case, seed = terms.case, terms.case.seed + 100
    query_shape = (case.batch, case.heads, case.query_length)
    key_shape = (case.batch, case.key_heads, case.key_length)
    inputs = [
        randn(*query_shape, case.head_dim, dtype=dtype, seed=seed),
        randn(*key_shape, case.head_dim, dtype=dtype, seed=seed + 1),
        randn(*key_shape, value_dim_of(terms), dtype=dtype, seed=seed + 2),
        terms.bias and randn(*sizes_of(terms, terms.bias), dtype=terms.bias_dtype or dtype, seed=seed + 5),
        randn(case.heads, dtype=dtype, seed=seed + 6) if terms.sinks else None,
    ]
    grads = (
        randn(*query_shape, value_dim_of(terms), dtype=dtype, seed=seed + 3),
        randn(*query_shape, dtype=plain.lse_dtype(dtype), seed=seed + 4),
    )
    return tuple(inputs), grads


def boolean_mask_of(terms):
    """Each row, and each batch entry's keys, allowed with a chance of 0.7: rows of few keys may have none."""
    if terms.mask is None:
        return None
    return randn(*sizes_of(terms, terms.mask), dtype=torch.float32, seed=terms.case.seed + 7) < 0.5


def slopes_of(terms):
    if terms.alibi is None:
        return None
    shape = [size for size, keep in zip((terms.case.batch, terms.case.heads), terms.alibi, strict=True) if keep]
    return randn(*shape, dtype=torch.float32, seed=terms.case.seed + 8).abs() * 0.1


def served(terms):
    case, mask, slopes = terms.case, boolean_mask_of(terms), slopes_of(terms)

    def call(query, key, value, bias, sinks):
        return nearpeak.attention(
            query, key, value, causal=case.causal, window=case.window, scale=case.scale, softcap=case.softcap,
            mask=mask, bias=bias, alibi_slopes=slopes, sinks=sinks, return_lse=True,
        )  # fmt: skip

    return call


def exact_layer(terms):
    case, mask, slopes = terms.case, boolean_mask_of(terms), slopes_of(terms)

    def call(query, key, value, bias, sinks):
        options = (*window_of(case), scale_of(case), case.softcap)
        return reference.attention(
            query, key, value, *options, mask, bias, None if slopes is None else slopes.double(), sinks
        )

    return call


def eager_layer(terms):
    case, mask, slopes = terms.case, mask_of(terms.case), slopes_of(terms)
    extra = boolean_mask_of(terms)
    mask = (mask if extra is None else mask & extra).expand(sizes_of(terms, ALL))
    distance = reference.distances(case.query_length, case.key_length, "cpu").abs()

    def call(query, key, value, bias, sinks):
        alibi = None if slopes is None else -slopes[..., None, None].to(query.dtype) * distance
        terms_added = [term for term in (bias, alibi) if term is not None]
        return plain.attention(query, key, value, mask, scale_of(case), case.softcap, terms_added, sinks)

    return call


def draws_of(terms, dtype, count=DRAWS):
    rows = max(1, terms.case.batch * terms.case.heads * terms.case.query_length)
    count = max(count, min(MOST_DRAWS, ENOUGH_ROWS // rows))
    seeds = (terms.case._replace(seed=terms.case.seed + 10 * draw) for draw in range(count))
    return [inputs_of(terms._replace(case=case), dtype) for case in seeds]


def standards_of(terms, draws):
    return standards([values(eager_layer(terms), draws)], values(exact_layer(terms), doubled(draws)))


@functools.lru_cache(maxsize=2)
def standard(terms, dtype):
    return standards_of(terms, draws_of(terms, dtype))


@pytest.mark.parametrize("terms", CASES, ids=terms_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(serving, dtype, terms):
    assert_as_exact(values(served(terms), draws_of(terms, dtype)), standard(terms, dtype))


LAYOUTS = {
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "padded": padded,
    "every_second": every_second,
    "expanded_rows": lambda t: t[:, :, :1].expand(t.shape),
    "expanded_keys": lambda t: t[..., :1].expand(t.shape),
    "expanded_batch": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [WIDE, FEW], ids=["prefill", "decode"])
def test_layouts_of_bias_and_mask(serving, case, layout):
    terms = Terms(case, bias=ALL, mask=ALL)
    inputs, grads = inputs_of(terms, torch.float32)
    mask, bias = LAYOUTS[layout](boolean_mask_of(terms)), LAYOUTS[layout](inputs[3])

    def call(query, key, value, bias):
        return nearpeak.attention(query, key, value, mask=mask, bias=bias, return_lse=True)

    def dense(query, key, value, bias):
        return nearpeak.attention(query, key, value, mask=mask.contiguous(), bias=bias.contiguous(), return_lse=True)

    mine = plain.value_and_gradients(call, (*inputs[:3], bias), grads)
    expected = plain.value_and_gradients(dense, (*inputs[:3], bias.contiguous()), grads)
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@pytest.mark.parametrize("missing", [0, 1, 2, 3], ids=lambda n: f"{4 - n}d")
def test_leading_dimensions_may_be_left_out(serving, missing):
    inputs, _ = inputs_of(Terms(WIDE), torch.float32)
    pairs = randn(2, 4, 33, 40, seed=5)[(0,) * missing]
    whole = pairs.expand(2, 4, 33, 40)
    for mine, expected in (({"bias": pairs}, {"bias": whole}), ({"mask": pairs > 0}, {"mask": whole > 0})):
        assert torch.equal(nearpeak.attention(*inputs[:3], **mine), nearpeak.attention(*inputs[:3], **expected))


@pytest.mark.parametrize("kept", [ALL, HEADS, KEYS, BATCH_KEYS, PAIRS], ids=str)
def test_gradients_of_a_bias_are_the_same_bits_on_any_number_of_threads(serving, kept):
    if serving == "reference":
        pytest.skip("PyTorch's matrix products sum in an order that depends on the threads")
    terms = Terms(Case(200, 700, heads=4, key_heads=2, batch=3, causal=True), bias=kept)
    inputs, grads = inputs_of(terms, torch.float32)
    expected = plain.value_and_gradients(served(terms), inputs, grads)
    for threads in (2, 5, 2):
        torch.set_num_threads(threads)
        again = plain.value_and_gradients(served(terms), inputs, grads)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("case", [WIDE, FEW], ids=["prefill", "decode"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_all_as_unlikely_as_can_be_are_all_seen(serving, dtype, case):
    """Where plain softmax sees them all: the most negative bias is finite, in base 2 too."""
    (query, key, value, *_), grads = inputs_of(Terms(case._replace(causal=False)), dtype)
    bias = torch.full((1, 1, 1, case.key_length), torch.finfo(dtype).min, dtype=dtype)

    def layer(query, key, value):
        return nearpeak.attention(query, key, value, bias=bias)

    out, *gradients = plain.value_and_gradients(layer, (query, key, value), grads[:1])
    mean = value.float().mean(2, keepdim=True).repeat_interleave(2, dim=1).expand(out.shape)
    if dtype is not torch.float16:  # whose most negative number leaves scores their differences
        torch.testing.assert_close(out.float(), mean, atol=1e-2, rtol=1e-2)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_sink_takes_its_share(serving):
    """A sink as large as a row's only score takes half of the weight."""
    query, key, value = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
    out, lse = nearpeak.attention(query, key, value, sinks=torch.tensor([0.0, -math.inf]), return_lse=True)
    torch.testing.assert_close(out[:, 0], torch.full((1, 3, 4), 0.5))
    torch.testing.assert_close(lse[:, 0], torch.full((1, 3), math.log(2)))
    assert (out[:, 1] == 1).all()
    assert (lse[:, 1] == 0).all()


Q, KV = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 6, 8)


def attend(value=KV, **options):
    return lambda: nearpeak.attention(Q, KV, value, **options)


BAD = {
    "mask_float": (TypeError, "mask must", attend(mask=torch.ones(5, 6))),
    "mask_list": (TypeError, "mask must", attend(mask=[True])),
    "mask_keys": (ValueError, "mask must", attend(mask=torch.ones(5, 5).bool())),
    "mask_rows": (ValueError, "mask must", attend(mask=torch.ones(6, 6).bool())),
    "mask_heads": (ValueError, "mask must", attend(mask=torch.ones(2, 5, 6).bool())),
    "mask_batch": (ValueError, "mask must", attend(mask=torch.ones(3, 1, 5, 6).bool())),
    "mask_5d": (ValueError, "mask must", attend(mask=torch.ones(1, 2, 4, 5, 6).bool())),
    "mask_meta": (ValueError, "mask must", attend(mask=torch.ones(5, 6, device="meta").bool())),
    "bias_list": (TypeError, "bias must", attend(bias=[1.0])),
    "bias_bool": (TypeError, "bias must", attend(bias=torch.ones(5, 6).bool())),
    "bias_half": (TypeError, "bias must", attend(bias=torch.ones(5, 6).half())),
    "bias_keys": (ValueError, "bias must", attend(bias=torch.ones(5, 5))),
    "bias_meta": (ValueError, "bias must", attend(bias=torch.ones(5, 6, device="meta"))),
    "alibi_list": (TypeError, "alibi_slopes must", attend(alibi_slopes=[1.0])),
    "alibi_ints": (TypeError, "alibi_slopes must", attend(alibi_slopes=torch.ones(4).int())),
    "alibi_heads": (ValueError, "alibi_slopes must", attend(alibi_slopes=torch.ones(2))),
    "alibi_batch": (ValueError, "alibi_slopes must", attend(alibi_slopes=torch.ones(3, 4))),
    "sinks_number": (TypeError, "sinks must", attend(sinks=1.0)),
    "sinks_heads": (ValueError, "sinks must", attend(sinks=torch.ones(2))),
    "sinks_batch": (ValueError, "sinks must", attend(sinks=torch.ones(2, 4))),
    "value_dim_0": (ValueError, "value must", attend(KV[..., :0])),
    "value_dim_577": (ValueError, "value must", attend(torch.ones(2, 2, 6, 577))),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(serving, bad):
    error, message, run = BAD[bad]
    with pytest.raises(error, match=message):
        run()


kept = st.none() | st.tuples(*[st.integers(0, 1)] * 4)


@st.composite
def random_terms(draw):
    key_heads = draw(st.integers(1, 3))
    case = Case(
        query_length=draw(st.integers(0, 50)),
        key_length=draw(st.integers(0, 120)),
        head_dim=draw(st.integers(1, 70)),
        heads=key_heads * draw(st.integers(1, 4)),
        key_heads=key_heads,
        batch=draw(st.integers(1, 2)),
        causal=draw(st.booleans()),
        window=(draw(st.none() | st.integers(-20, 60)), None),
        seed=draw(st.integers(0, 99)),
    )
    return Terms(
        case,
        bias=draw(kept),
        bias_dtype=draw(st.sampled_from([None, torch.float32])),
        mask=draw(kept),
        alibi=draw(st.sampled_from([None, (0, 1), (1, 1)])),
        sinks=draw(st.booleans()),
        value_dim=draw(st.none() | st.integers(1, 70)),
    )


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_terms_are_as_exact_as_plain(serving, dtype, examples):
    @for_all(examples, terms=random_terms())
    def check(terms):
        draws = draws_of(terms, dtype, count=examples.draws)
        assert_as_exact(values(served(terms), draws), standards_of(terms, draws))
