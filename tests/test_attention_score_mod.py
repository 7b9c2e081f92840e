"""Attention with scores of the user's own: functions that are traced into programs, run in the kernels and derived."""

import functools
import math

import hypothesis.strategies as st
import nearpeak
import plain
import pytest
import torch
from draws import assert_as_exact, standards
from inputs import DTYPES, EXAMPLES, for_all, randn
from nearpeak.attention import reference
from nearpeak.attention.score_instructions import MOST_VALUES
from test_attention import Case, doubled, draws_of, inputs_of, mask_of, scale_of, values

SLOPES, TABLE = randn(8, seed=1).abs() * 0.1, randn(8, 64, seed=2)
DOCUMENTS = torch.arange(500).repeat(3, 1) // torch.tensor([[7], [20], [100]])
STEPS = torch.arange(500, dtype=torch.int32) % 5

# Of (score, batch, head, query, key).
MODS = {
    "relative": lambda s, b, h, q, k: s + 0.1 * (k - q),
    "alibi": lambda s, b, h, q, k: s - SLOPES[h] * (q - k).abs(),
    "softcap": lambda s, b, h, q, k: 2.0 * torch.tanh(s / 2.0),
    "table": lambda s, b, h, q, k: s * torch.exp(0.1 * TABLE[h, (q - k) % 64]) + TABLE[h, -1 - (k % 8)],
    "documents": lambda s, b, h, q, k: torch.where(DOCUMENTS[b, q] == DOCUMENTS[b, k], s, s - 3.0),
    "steps": lambda s, b, h, q, k: torch.where(STEPS[k] > STEPS[q], s, 0.5 * s * STEPS[k]),
    "sigmoid": lambda s, b, h, q, k: torch.sigmoid(s) + s.clamp(-0.5, 1.0) + torch.maximum(s, 0.3 * s),
    "curve": lambda s, b, h, q, k: s / torch.sqrt(1 + s**2) + torch.log(s.abs() + 1.5) + 0.1 * torch.sin(3 * s),
    "powers": lambda s, b, h, q, k: (1.5 + torch.cos(s)) ** 1.5 - torch.rsqrt(2 + s * s) + 0.01 * s**3,
    "exps": lambda s, b, h, q, k: (
        torch.exp(-s.abs()) - torch.exp2(0.5 * s - 3.0) + torch.relu(s) - torch.log2(2 + s * s)
    ),
    "integers": lambda s, b, h, q, k: (
        s + 0.05 * torch.minimum(q // 3, k % 7) - 0.1 * torch.maximum(-h, b - 2) * ((q - k) // 5 + (k - q) % 4).float()
    ),
    "nothing of the score": lambda s, b, h, q, k: 0.0 * s + 0.01 * (q * k % 50).float(),
}
# Of (batch, head, query, key).
MASKS = {
    "causal": lambda b, h, q, k: q >= k,
    "either": lambda b, h, q, k: ((q // 4 == k // 4) | (k < 2)) & ~((k == 1) ^ (q > 5)),
    "documents": lambda b, h, q, k: DOCUMENTS[b, q] == DOCUMENTS[b, k],
    "heads": lambda b, h, q, k: torch.where(h % 2 == 0, (q - k).abs() < 9, k >= q),
    "some rows see nothing": lambda b, h, q, k: (q % 3 != 0) & (k != q),
    "nothing": lambda b, h, q, k: q < 0,
}
WIDE = Case(33, 40, heads=4, key_heads=2, batch=2)
FEW = Case(3, 97, heads=4, key_heads=2, batch=2)
LONG = Case(150, 400, heads=2, key_heads=1, batch=2, causal=True)
CASES = [
    *((WIDE, mod, None) for mod in MODS),
    *((FEW, mod, None) for mod in MODS),
    *((case, None, mask) for case in (WIDE, FEW) for mask in MASKS),
    *((case, "table", "either") for case in (WIDE, FEW, LONG)),
    (LONG, "curve", None),
    (LONG._replace(window=(60, None), softcap=5.0), "sigmoid", "heads"),
    (WIDE._replace(softcap=2.0), "alibi", None),
    (Case(1, 1), "relative", None),
    (Case(0, 5), "relative", "causal"),
    (Case(5, 0), "relative", "causal"),
]


def name_of(value):
    return "x".join(map(str, value[:2])) if isinstance(value, Case) else str(value)


def places(batch, heads, queries, keys):
    """Numbers of batch entry, head, query and key, which broadcast against scores."""
    sizes = batch, heads, queries, keys
    return [torch.arange(size).view([-1 if i == dim else 1 for i in range(4)]) for dim, size in enumerate(sizes)]


def eager_layer(case, mod, mask):
    """What users write: scores of the whole sequence, and the functions on them."""
    where = places(case.batch, case.heads, case.query_length, case.key_length)
    allowed = mask_of(case) if mask is None else mask_of(case) & MASKS[mask](*where)
    allowed = allowed.expand(case.batch, case.heads, case.query_length, case.key_length)

    def modify(scores):
        return MODS[mod](scores, *where).to(scores.dtype).expand_as(scores)

    def call(query, key, value):
        options = allowed, scale_of(case), case.softcap
        return plain.attention(query, key, value, *options, modify=None if mod is None else modify)

    return call


def served(case, mod, mask):
    score_mod = nearpeak.trace_score_mod(mod and MODS[mod], mask and MASKS[mask])

    def call(query, key, value):
        return nearpeak.attention(
            query, key, value, causal=case.causal, window=case.window, scale=case.scale, softcap=case.softcap,
            score_mod=score_mod, return_lse=True,
        )  # fmt: skip

    return call


def standards_of(case, mod, mask, draws):
    layer = eager_layer(case, mod, mask)
    return standards([values(layer, draws)], values(layer, doubled(draws)))


@functools.lru_cache(maxsize=2)
def standard(case, mod, mask, dtype):
    return standards_of(case, mod, mask, draws_of(case, dtype))


@pytest.mark.parametrize(("case", "mod", "mask"), CASES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(serving, dtype, case, mod, mask):
    mine = values(served(case, mod, mask), draws_of(case, dtype))
    assert_as_exact(mine, standard(case, mod, mask, dtype))


@pytest.mark.parametrize("mod", MODS)
def test_float64_is_the_functions_own(mod):
    case = WIDE._replace(softcap=3.0)
    inputs, grads = inputs_of(case, torch.float64)
    mine, theirs = (plain.value_and_gradients(f(case, mod, "either"), inputs, grads) for f in (served, eager_layer))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # tables are float32 to the program, scores float64


@pytest.mark.parametrize("mod", MODS)
def test_the_formula_of_the_gradients_is_the_derivative(mod):
    inputs, grads = inputs_of(WIDE, torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    score_mod = nearpeak.trace_score_mod(MODS[mod], MASKS["either"])
    options = None, None, scale_of(WIDE), 5.0, *[None] * 8, 0.0, *score_mod[1:]
    out, lse = reference.attention(*leaves, *options)
    expected = torch.autograd.grad((out, lse), leaves, grads)
    mine = reference.attention_backward(*grads, *(t.detach() for t in (*inputs, out, lse)), *options)
    for a, b in zip(mine, expected, strict=False):
        torch.testing.assert_close(a, b)


def test_functions_are_taken_as_they_are(serving):
    inputs, _ = inputs_of(WIDE, torch.float32)
    expected = nearpeak.attention(*inputs, score_mod=nearpeak.trace_score_mod(MODS["alibi"], MASKS["causal"]))
    found = nearpeak.attention(*inputs, score_mod=MODS["alibi"], mask_mod=MASKS["causal"])
    assert torch.equal(found, expected)
    masked = nearpeak.attention(*inputs, mask_mod=nearpeak.masks.causal)
    assert torch.equal(
        masked, nearpeak.attention(*inputs, score_mod=lambda s, b, h, q, k: torch.where(q >= k, s, -math.inf))
    )


def test_what_tables_hold_is_read_when_attention_is_called(serving):
    table = torch.zeros(40)
    score_mod = nearpeak.trace_score_mod(lambda s, b, h, q, k: s + table[k])
    inputs, _ = inputs_of(WIDE, torch.float32)
    before = nearpeak.attention(*inputs, score_mod=score_mod)
    table[3] = 5.0
    after = nearpeak.attention(*inputs, score_mod=score_mod)
    torch.testing.assert_close(before, nearpeak.attention(*inputs))
    torch.testing.assert_close(after, nearpeak.attention(*inputs, bias=table))


def test_an_element_that_is_not_there_is_nan(serving):
    table = torch.zeros(39)
    inputs, _ = inputs_of(WIDE, torch.float32)
    out = nearpeak.attention(*inputs, score_mod=lambda s, b, h, q, k: s + table[k])
    assert out.isnan().all()
    out = nearpeak.attention(
        *inputs, score_mod=lambda s, b, h, q, k: s + table[k - 39], mask_mod=lambda b, h, q, k: k < 39
    )
    assert torch.allclose(out, nearpeak.attention(*inputs, mask_mod=lambda b, h, q, k: k < 39))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "ranges"])
def test_places_are_counted_in_the_tensors(serving, packed):
    """Of sequences that lie one behind the other, and of ranges of keys."""
    query, key = randn(1, 4, 30, 16), randn(1, 2, 60, 16, seed=1)
    if packed:
        options = {"query_starts": torch.tensor([0, 13, 30]), "key_starts": torch.tensor([0, 20, 60])}
        sequence = torch.arange(30) >= 13
        allowed = sequence[:, None] == (torch.arange(60) >= 20)
    else:
        options = {"key_starts": torch.tensor([7]), "key_ends": torch.tensor([50])}
        allowed = ((torch.arange(60) >= 7) & (torch.arange(60) < 50)).expand(30, 60)
    score_mod = nearpeak.trace_score_mod(MODS["table"], MASKS["either"])
    found = nearpeak.attention(query, key, key, score_mod=score_mod, **options)
    torch.testing.assert_close(found, nearpeak.attention(query, key, key, score_mod=score_mod, mask=allowed))


def test_beside_every_other_term(serving):
    inputs, _ = inputs_of(WIDE, torch.float32)
    bias, slopes, sinks = randn(4, 33, 40, seed=5), randn(4, seed=6).abs(), randn(4, seed=7)
    blocks = nearpeak.create_block_mask(nearpeak.masks.causal, None, None, 33, 40, block_size=16)
    options = {"alibi_slopes": slopes, "sinks": sinks, "block_mask": blocks, "dropout_p": 0.2, "dropout_seed": 3}
    found = nearpeak.attention(*inputs, bias=bias, score_mod=lambda s, b, h, q, k: 2.0 * s, **options)
    expected = nearpeak.attention(*inputs, bias=bias, scale=2.0 * scale_of(WIDE), **options)
    torch.testing.assert_close(found, expected)


def test_results_do_not_depend_on_the_threads(serving):
    draws = [inputs_of(LONG, torch.float32)]
    call = served(LONG, "table", "either")
    expected = values(call, draws)[0]
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(values(call, draws)[0], expected, strict=True))


@pytest.mark.parametrize("length", [3, 33])
def test_it_compiles_whole_and_is_saved_for_backward(length):
    score_mod = nearpeak.trace_score_mod(MODS["table"])
    query, key = randn(1, 2, length, 16).requires_grad_(), randn(1, 2, 40, 16, seed=1)

    def call(query, key):
        return nearpeak.attention(query, key, key, score_mod=score_mod)

    expected = torch.autograd.grad(call(query, key).sum(), query)[0]
    found = torch.autograd.grad(torch.compile(call, fullgraph=True)(query, key).sum(), query)[0]
    torch.testing.assert_close(found, expected)


LEARNED = torch.zeros(40, requires_grad=True)
BAD = {
    "not_callable": (TypeError, "score_mod must be", {"score_mod": 3}),
    "mask_not_callable": (TypeError, "mask_mod must be", {"mask_mod": torch.ones(3)}),
    "nothing_returned": (TypeError, "must return", {"score_mod": lambda s, b, h, q, k: None}),
    "unknown_operation": (NotImplementedError, "erf has no instruction", {"score_mod": lambda s, *_: torch.erf(s)}),
    "whole_table": (NotImplementedError, "look tensors up", {"score_mod": lambda s, *_: s + TABLE}),
    "row_of_table": (NotImplementedError, "one number for each", {"score_mod": lambda s, b, h, q, k: s + TABLE[h]}),
    "learned": (NotImplementedError, "get no gradient", {"score_mod": lambda s, b, h, q, k: s + LEARNED[k]}),
    "traced_and_mask": (
        ValueError,
        "mask_mod must be given to",
        {"score_mod": nearpeak.trace_score_mod(MODS["relative"]), "mask_mod": MASKS["causal"]},
    ),
    "too_long": (
        NotImplementedError,
        f"more than the {MOST_VALUES}",
        {"score_mod": lambda s, b, h, q, k: sum(torch.tanh(s * n) for n in range(2, 40))},
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_functions_are_named(serving, bad):
    error, message, options = BAD[bad]
    inputs, _ = inputs_of(WIDE, torch.float32)
    with pytest.raises(error, match=message):
        nearpeak.attention(*inputs, **options)


@pytest.mark.parametrize(
    "rows",
    [
        [[5, 7, 0, 0, 0], [5, 0, 1, 0, 0]],  # an operand that is not there yet
        [[999, 0, 0, 0, 0], [5, 0, 1, 0, 0]],  # no such operation
        [[2, 0, 1, 0, 0], [5, 0, 1, 0, 0]],  # no such tensor
        [[5, 0, 0, 0, 0], [9, 0, 1, 0, 0]],  # no such result
        [[5, 0, 0, 0, 0], [5, 0, 0, 0, 0]],  # a score that is not made yet
        [[5, 0, 0, 0, 0]] * 200,  # more values than there is room for
    ],
)
def test_a_program_that_is_none_is_refused(serving, rows):
    if serving == "reference":
        pytest.skip("Python checks as it goes")
    inputs, _ = inputs_of(WIDE, torch.float32)
    with pytest.raises(RuntimeError, match="score_program"):
        torch.ops.nearpeak.attention(*inputs, None, None, 1.0, None, *[None] * 8, 0.0, torch.tensor(rows), None)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_random_cases_are_as_exact_as_plain(serving, examples):
    @for_all(
        examples,
        queries=st.integers(1, 40),
        keys=st.integers(1, 60),
        mod=st.sampled_from(list(MODS)),
        mask=st.sampled_from([None, *MASKS]),
        causal=st.booleans(),
        head_dim=st.integers(1, 70),
        seed=st.integers(0, 99),
    )
    def check(queries, keys, mod, mask, causal, head_dim, seed):
        case = Case(queries, keys, head_dim, heads=4, key_heads=2, causal=causal, seed=seed)
        draws = draws_of(case, torch.float32, count=examples.draws)
        assert_as_exact(values(served(case, mod, mask), draws), standards_of(case, mod, mask, draws))
