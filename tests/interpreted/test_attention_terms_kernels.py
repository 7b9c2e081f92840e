"""The Triton kernels of attention with what shapes its scores, held to the rule that every backend is held to."""

import nearpeak
import pytest
import test_attention_terms as terms_of
import torch
from draws import assert_as_exact
from inputs import DTYPES, some_by_default
from test_attention import Case, values
from test_attention_terms import ALL, BATCH_KEYS, HEADS, KEYS, PAIRS, Terms

WIDE, FEW = terms_of.WIDE, terms_of.FEW
# Many keys, whose first tile of rows sees blocks at the left edge, whole, and at the right; and keys split and merged.
MIDDLE = Case(60, 150, heads=2, key_heads=1, batch=2, causal=True)
SPLIT = Case(1, 1100, head_dim=64, heads=4, key_heads=2)
CASES = [
    *(Terms(case, bias=bias) for case in (WIDE, FEW) for bias in (ALL, HEADS, KEYS, BATCH_KEYS, (0, 1, 1, 0))),
    *(Terms(case, mask=mask) for case in (WIDE, FEW, MIDDLE) for mask in (ALL, BATCH_KEYS, (1, 0, 1, 0))),
    *(Terms(case, alibi=alibi) for case in (WIDE, MIDDLE) for alibi in ((0, 1), (1, 1))),
    *(Terms(case, sinks=True) for case in (WIDE, FEW, MIDDLE, Case(5, 0), Case(40, 33, causal=True))),
    *(Terms(case, value_dim=dim) for case in (WIDE, FEW) for dim in (1, 17, 40)),
    Terms(Case(2, 70, head_dim=192, heads=16), value_dim=128),
    Terms(Case(9, 30, head_dim=8), value_dim=250),
    Terms(WIDE, bias=HEADS, bias_dtype=torch.float32),
    *(Terms(case, HEADS, None, BATCH_KEYS, (0, 1), True, 24) for case in (WIDE, FEW, MIDDLE, SPLIT)),
    Terms(SPLIT, sinks=True),
    Terms(WIDE._replace(softcap=2.0), bias=ALL, mask=ALL, sinks=True),
    Terms(WIDE._replace(scale=-0.3), bias=PAIRS, sinks=True),
    Terms(MIDDLE._replace(softcap=20.0, window=(60, None)), bias=HEADS, alibi=(0, 1)),
    Terms(MIDDLE._replace(window=(20, 30), causal=False), mask=PAIRS, sinks=True),
    Terms(WIDE._replace(batch=0), bias=HEADS, mask=KEYS, alibi=(0, 1), sinks=True),
    Terms(Case(0, 9), bias=HEADS, mask=KEYS, sinks=True),
]


def draws_of(terms, dtype):
    """Rounding to 16 bits drowns what float32 sums do by chance; float32 itself takes more draws to judge."""
    return terms_of.draws_of(terms, dtype)[: 4 if dtype is torch.float32 else 1]


def judge(terms, draws):
    assert_as_exact(values(terms_of.served(terms), draws), terms_of.standards_of(terms, draws))


@pytest.mark.parametrize("terms", some_by_default(CASES, 4, terms_of.terms_name))
def test_forward_and_gradients_are_as_exact_as_plain(rounded_once, terms):
    judge(terms, draws_of(terms, torch.float32))


@pytest.mark.parametrize("terms", some_by_default(CASES[1::4], 4, terms_of.terms_name))
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_forward_and_gradients_in_16_bits_are_as_exact_as_plain(dtype, terms):
    judge(terms, draws_of(terms, dtype))


# head_dim in parts, value's in parts that overlap, and both; of 64 elements and more.
LATENT = Case(40, 45, head_dim=576, heads=4, key_heads=1, causal=True)
PARTS = [
    Terms(LATENT, value_dim=512),
    Terms(LATENT._replace(head_dim=300, scale=-0.1, batch=2), HEADS, None, BATCH_KEYS, (0, 1), True, 270),
    Terms(Case(40, 30, head_dim=8), value_dim=257),
    Terms(LATENT._replace(head_dim=320, window=(9, 4), causal=False)),
]
DECODE = Terms(Case(1, 600, head_dim=576, heads=16, key_heads=1), value_dim=512)


@pytest.mark.parametrize("terms", some_by_default(PARTS, 2, terms_of.terms_name))
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_wider_than_a_tile_are_as_exact_as_plain(dtype, terms):
    judge(terms, [(inputs, None) for inputs, _ in draws_of(terms, dtype)])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_one_token_of_latent_attention_is_as_exact_as_plain(dtype):
    judge(DECODE, [(inputs, None) for inputs, _ in draws_of(DECODE, dtype)])


@pytest.mark.parametrize("case", [WIDE, FEW], ids=["prefill", "decode"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_all_as_unlikely_as_can_be_are_all_seen(dtype, case):
    terms_of.test_keys_all_as_unlikely_as_can_be_are_all_seen(None, dtype, case)


def test_a_sink_takes_its_share():
    terms_of.test_a_sink_takes_its_share(None)


@pytest.mark.parametrize("layout", terms_of.LAYOUTS)
def test_layouts_of_bias_and_mask(layout):
    terms_of.test_layouts_of_bias_and_mask(None, Case(17, 20, heads=2, key_heads=1, batch=2), layout)


def test_slopes_and_sinks_may_have_gaps():
    query, slopes, sinks = (torch.ones(1, 4, 3, 8), torch.rand(2, 8), torch.rand(8))
    gaps = {"alibi_slopes": slopes[:1, ::2], "sinks": sinks[::2]}
    dense = {name: tensor.contiguous() for name, tensor in gaps.items()}
    assert torch.equal(
        nearpeak.attention(query, query, query, **gaps), nearpeak.attention(query, query, query, **dense)
    )


def test_a_row_whose_mask_or_bias_forbids_all_is_zero():
    case = Case(5, 9)
    (query, key, value, *_), grads = terms_of.inputs_of(Terms(case), torch.float32)
    keep = torch.ones(5, 9, dtype=torch.bool)
    keep[2] = False
    for options in ({"mask": keep}, {"bias": torch.zeros(5, 9).masked_fill(~keep, -torch.inf)}):

        def layer(query, key, value, options=options):
            return nearpeak.attention(query, key, value, **options, return_lse=True)

        out, lse, d_query, *others = terms_of.plain.value_and_gradients(layer, (query, key, value), grads)
        assert (out[:, :, 2] == 0).all()
        assert (lse[:, :, 2] == -torch.inf).all()
        assert (d_query[:, :, 2] == 0).all()
        assert all(gradient.isfinite().all() for gradient in others)
