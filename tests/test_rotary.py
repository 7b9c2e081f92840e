"""Rotary embedding: as exact as Hugging Face's formula on every backend, forward and backward, in every layout."""

import functools
import math
from typing import NamedTuple

import hypothesis.strategies as st
import nearpeak
import plain
import pytest
import torch
from draws import DRAWS, assert_as_exact, standards
from inputs import (
    DTYPES,
    EXAMPLES,
    case_name,
    every_second,
    for_all,
    laid_out_like,
    misaligned,
    padded,
    randn,
    sequence_first,
)
from nearpeak.rotary import reference


class Case(NamedTuple):
    batch: int = 2
    heads: int = 3
    key_heads: int = 1
    sequence: int = 5
    head_dim: int = 64
    rotary_dim: int | None = None
    interleaved: bool = False
    table: str = "shared"
    table_dtype: torch.dtype | str = "query's dtype"
    first_position: int = 0
    seed: int = 0


TABLES = ["shared", "shared_batch", "per_batch", "full", "full_per_batch"]
CASES = [
    *(
        Case(head_dim=head_dim, interleaved=interleaved)
        for head_dim in (2, 4, 6, 14, 16, 18, 30, 32, 34, 62, 64, 66, 80, 96, 128, 192, 256, 320)
        for interleaved in (False, True)
    ),
    *(Case(table=table, interleaved=interleaved) for table in TABLES[1:] for interleaved in (False, True)),
    *(Case(table=table, table_dtype=torch.float32, head_dim=34) for table in TABLES),
    Case(table_dtype=torch.float32, interleaved=True),
    *(Case(sequence=sequence) for sequence in (0, 1, 2, 33)),
    *(Case(heads=heads, key_heads=key_heads) for heads, key_heads in ((1, 1), (8, 8), (4, 0), (0, 2), (0, 0))),
    Case(batch=0),
    Case(batch=0, table="per_batch"),
    Case(first_position=100_000, table_dtype=torch.float32),
    *(
        Case(head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved)
        for head_dim, rotary_dim in ((3, 2), (7, 4), (64, 16), (80, 32), (96, 64), (128, 30), (256, 254), (34, 34))
        for interleaved in (False, True)
    ),
    *(Case(head_dim=80, rotary_dim=20, table=table, interleaved=True) for table in TABLES[2:]),
    *(Case(head_dim=80, rotary_dim=32, table=table, table_dtype=torch.float32) for table in TABLES[2:]),
    *(Case(head_dim=80, rotary_dim=32, heads=heads, key_heads=key_heads) for heads, key_heads in ((4, 0), (0, 2))),
    *(Case(head_dim=80, rotary_dim=32, sequence=sequence) for sequence in (0, 1, 33)),
]


def tables(case, dtype):
    """cos and sin of the case's form, in its dtype."""
    positions = case.first_position + torch.arange(case.sequence, dtype=torch.float64)
    if "batch" in case.table:
        rows = case.batch if "per_batch" in case.table else 1
        positions = positions + 7 * torch.arange(rows)[:, None]
    width = case.rotary_dim or case.head_dim
    angles = positions[..., None] * 1e4 ** -(torch.arange(0, width, 2) / width)
    if "full" in case.table:
        repeat = functools.partial(torch.repeat_interleave, repeats=2, dim=-1)
        angles = repeat(angles) if case.interleaved else torch.cat((angles, angles), dim=-1)
    dtype = dtype if case.table_dtype == "query's dtype" else case.table_dtype
    return angles.cos().to(dtype), angles.sin().to(dtype)


def half_tables(case, dtype):
    """The same numbers as `tables`, each pair's once."""
    return tables(case._replace(table=case.table.replace("full_", "").replace("full", "shared")), dtype)


def inputs_of(case, dtype):
    query = randn(case.batch, case.heads, case.sequence, case.head_dim, dtype=dtype, seed=case.seed)
    key = randn(case.batch, case.key_heads, case.sequence, case.head_dim, dtype=dtype, seed=case.seed + 1)
    grads = [randn(*t.shape, dtype=dtype, seed=case.seed + 2 + i) for i, t in enumerate((query, key))]
    return (query, key), grads


def served(case, dtype):
    cos, sin = tables(case, dtype)
    return lambda query, key: nearpeak.apply_rotary(query, key, cos, sin, **form_of(case))


def form_of(case):
    return {"interleaved": case.interleaved, "rotary_dim": case.rotary_dim}


def standards_of(case, dtype, draws):
    cos, sin = half_tables(case, dtype)
    wide_cos, wide_sin = (table if table.dim() == 3 else table[None] for table in (cos.double(), sin.double()))

    def eager(query, key):
        return plain.rotary(query, key, cos, sin, case.interleaved)

    def exact(query, key):
        rotary_dim = case.rotary_dim or case.head_dim
        return reference.apply_rotary(query, key, wide_cos, wide_sin, case.interleaved, False, rotary_dim)

    plains = [plain.value_and_gradients(eager, inputs, grads) for inputs, grads in draws]
    doubles = [(plain.doubled(inputs), plain.doubled(grads)) for inputs, grads in draws]
    return standards([plains], [plain.value_and_gradients(exact, inputs, grads) for inputs, grads in doubles])


def results(case, dtype, draws):
    return [plain.value_and_gradients(served(case, dtype), inputs, grads) for inputs, grads in draws]


def draws_of(case, dtype, count=DRAWS):
    return [inputs_of(case._replace(seed=case.seed + 10 * draw), dtype) for draw in range(count)]


@functools.lru_cache(maxsize=2)
def standard(case, dtype):
    return standards_of(case, dtype, draws_of(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(serving, dtype, case):
    mine = results(case, dtype, draws_of(case, dtype))
    assert all(t.dtype is dtype for result in mine for t in result)
    assert_as_exact(mine, standard(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_in_place_and_without_gradients_are_the_same(serving, case):
    (query, key), grads = inputs_of(case, torch.float32)
    expected = plain.value_and_gradients(served(case, torch.float32), (query, key), grads)[:2]
    out_of_place = plain.value_and_gradients(served(case, torch.float32), (query, key))
    cos, sin = tables(case, torch.float32)
    in_place = nearpeak.apply_rotary(query, key, cos, sin, **form_of(case), inplace=True)
    assert in_place[0] is query
    assert in_place[1] is key
    for results in (out_of_place, in_place):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, expected, strict=True))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_float64_is_served_in_float64(interleaved):
    case = Case(interleaved=interleaved)
    inputs, grads = inputs_of(case, torch.float64)
    cos, sin = tables(case, torch.float64)
    result = plain.value_and_gradients(served(case, torch.float64), inputs, grads)
    expected = plain.value_and_gradients(lambda q, k: plain.rotary(q, k, cos, sin, interleaved), inputs, grads)
    for mine, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


LAYOUTS = {
    "sequence_first": sequence_first,
    "padded": padded,
    "misaligned": misaligned,
    "batch_last": lambda t: t.movedim(0, 2).contiguous().movedim(2, 0),
    "reversed_order": lambda t: t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
}


def packed(query, key):
    """Views of query and key into one projection's result, (batch, sequence, heads * head_dim)."""
    both = torch.cat((query, key), dim=1).transpose(1, 2).contiguous().flatten(2)
    both = both.unflatten(2, (-1, query.shape[-1])).transpose(1, 2)
    return both[:, : query.shape[1]], both[:, query.shape[1] :]


def laid_out(layout, query, key):
    if layout == "packed":
        return packed(query, key)
    if layout == "expanded_heads":
        return query[:, :1].expand(query.shape), key
    return LAYOUTS[layout](query), LAYOUTS[layout](key)


ROTARY_DIMS = pytest.mark.parametrize("rotary_dim", [None, 20], ids=["whole", "partial"])


@ROTARY_DIMS
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "packed", "expanded_heads"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_inputs_are_kept(serving, dtype, layout, interleaved, rotary_dim):
    case = Case(head_dim=34, interleaved=interleaved, rotary_dim=rotary_dim)
    draws = [(laid_out(layout, *inputs), grads) for inputs, grads in draws_of(case, dtype)]
    mine = results(case, dtype, draws)
    assert_as_exact(mine, standards_of(case, dtype, draws))
    for tensor, like in zip(mine[0][:2], draws[0][0], strict=True):
        assert laid_out_like(tensor, like)


@ROTARY_DIMS
@pytest.mark.parametrize("layout", [*LAYOUTS, "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_writes_only_its_own_elements(serving, dtype, layout, rotary_dim):
    case = Case(head_dim=34, rotary_dim=rotary_dim)
    (query, key), _ = inputs_of(case, dtype)
    cos, sin = tables(case, dtype)
    expected = nearpeak.apply_rotary(query, key, cos, sin, rotary_dim=rotary_dim)
    query, key = laid_out(layout, query, key)
    around = torch.full((query.untyped_storage().nbytes() // query.element_size(),), 0.0, dtype=dtype)
    storage = query.as_strided(around.shape, (1,), 0)
    outside = torch.ones_like(around, dtype=torch.bool)
    for view in (query, key) if layout == "packed" else (query,):
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    before = storage.clone()
    nearpeak.apply_rotary(query, key, cos, sin, rotary_dim=rotary_dim, inplace=True)
    assert torch.equal(query, expected[0])
    assert torch.equal(key, expected[1])
    assert torch.equal(storage[outside].nan_to_num(), before[outside].nan_to_num())


@pytest.mark.parametrize("layout", [*LAYOUTS, "every_second", "expanded"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_layouts_of_gradients(serving, interleaved, layout):
    case = Case(head_dim=34, interleaved=interleaved, rotary_dim=20)
    layouts = {**LAYOUTS, "every_second": every_second, "expanded": lambda t: t[:1, :1, :1, :1].expand(t.shape)}
    draws = [(inputs, [layouts[layout](grad) for grad in grads]) for inputs, grads in draws_of(case, torch.float32)]
    assert_as_exact(results(case, torch.float32, draws), standards_of(case, torch.float32, draws))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_layouts_of_tables(serving, interleaved):
    case = Case(table="per_batch", head_dim=34, interleaved=interleaved)
    (query, key), _ = inputs_of(case, torch.float32)
    cos, sin = tables(case, torch.float32)
    expected = nearpeak.apply_rotary(query, key, cos, sin, interleaved=interleaved)
    for strange in (padded, misaligned, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
        result = nearpeak.apply_rotary(query, key, strange(cos), strange(sin), interleaved=interleaved)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(result, expected, strict=True))


def test_what_does_not_turn_passes_through_bit_by_bit(serving):
    """NaN and infinities too, forward and backward."""
    case = Case(head_dim=40, rotary_dim=16)
    (query, key), grads = inputs_of(case, torch.float32)
    for tensor in (query, key, *grads):
        tensor[..., 16:19] = torch.tensor([math.nan, math.inf, -math.inf])
    for mine, given in zip(
        plain.value_and_gradients(served(case, torch.float32), (query, key), grads), (query, key, *grads), strict=True
    ):
        assert torch.equal(mine[..., 16:].view(torch.int32), given[..., 16:].view(torch.int32))


def test_a_gradient_of_one_result_alone(serving):
    (query, key), grads = inputs_of(Case(), torch.float32)
    query.requires_grad_()
    rotated, _ = served(Case(), torch.float32)(query, key)
    (gradient,) = torch.autograd.grad(rotated, query, grads[0])
    full = plain.value_and_gradients(served(Case(), torch.float32), (query.detach(), key), grads)
    assert torch.equal(gradient, full[2])


def test_tables_that_want_a_gradient_get_it(serving):
    (query, key), grads = inputs_of(Case(), torch.float32)
    leaves = [table.requires_grad_() for table in tables(Case(), torch.float32)]
    mine = torch.autograd.grad(nearpeak.apply_rotary(query, key, *leaves), leaves, grads)
    theirs = torch.autograd.grad(plain.rotary(query, key, *leaves, False), leaves, grads)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_in_place_makes_a_saved_tensor_stale(serving):
    (query, key), _ = inputs_of(Case(), torch.float32)
    product = torch.ones_like(query).requires_grad_() * query
    with torch.no_grad():
        nearpeak.apply_rotary(query, key, *tables(Case(), torch.float32), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=["inf", "nan"])
def test_a_bad_element_spoils_its_pair_only(serving, bad):
    (query, key), _ = inputs_of(Case(), torch.float32)
    query[1, 2, 3, 5] = bad
    rotated, _ = served(Case(), torch.float32)(query, key)
    spoiled = ~rotated.isfinite()
    assert spoiled.sum() == 2
    assert spoiled[1, 2, 3, 5]
    assert spoiled[1, 2, 3, 5 + 32]


Q, K, COS = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 5, 8), torch.ones(5, 4)
LEAF = torch.ones(2, 4, 5, 8, requires_grad=True)


def rotary(query=Q, key=K, cos=COS, sin=COS, **options):
    return lambda: nearpeak.apply_rotary(query.clone() if query is Q else query, key, cos, sin, **options)


BAD = {
    "query_list": (TypeError, "query must", rotary([1.0])),
    "query_int": (TypeError, "query must", rotary(Q.int())),
    "query_complex": (TypeError, "query must", rotary(Q.cfloat())),
    "query_3d": (ValueError, "query must", rotary(Q[0])),
    "query_odd": (ValueError, "query must have an even head_dim", rotary(Q[..., :7], K[..., :7])),
    "query_no_head_dim": (ValueError, "query must", rotary(Q[..., :0], K[..., :0])),
    "query_strided": (ValueError, "query must", rotary(every_second(Q))),
    "key_list": (TypeError, "key must", rotary(key=[1.0])),
    "key_none": (TypeError, "key must", rotary(key=None)),
    "key_dtype": (TypeError, "key must", rotary(key=K.half())),
    "key_meta": (ValueError, "key must", rotary(key=K.to("meta"))),
    "key_3d": (ValueError, "key must", rotary(key=K[0])),
    "key_batch": (ValueError, "key must", rotary(key=K[:1])),
    "key_sequence": (ValueError, "key must", rotary(key=K[:, :, :4])),
    "key_head_dim": (ValueError, "key must", rotary(key=K[..., :4])),
    "key_strided": (ValueError, "key must", rotary(key=every_second(K))),
    "cos_list": (TypeError, "cos", rotary(cos=[1.0])),
    "cos_int": (TypeError, "cos", rotary(cos=COS.int(), sin=COS.int())),
    "cos_float64": (TypeError, "cos", rotary(cos=COS.double(), sin=COS.double())),
    "cos_float16": (TypeError, "cos", rotary(cos=COS.half(), sin=COS.half())),
    "cos_width": (ValueError, "cos", rotary(cos=COS[:, :3], sin=COS[:, :3])),
    "cos_sequence": (ValueError, "cos", rotary(cos=COS[:4], sin=COS[:4])),
    "cos_batch": (ValueError, "cos", rotary(cos=torch.ones(3, 5, 4), sin=torch.ones(3, 5, 4))),
    "cos_1d": (ValueError, "cos", rotary(cos=COS[0], sin=COS[0])),
    "cos_4d": (ValueError, "cos", rotary(cos=torch.ones(1, 1, 5, 4), sin=torch.ones(1, 1, 5, 4))),
    "cos_meta": (ValueError, "cos", rotary(cos=COS.to("meta"))),
    "cos_strided": (ValueError, "cos", rotary(cos=every_second(COS))),
    "sin_list": (TypeError, "sin must", rotary(sin=[1.0])),
    "sin_dtype": (TypeError, "sin must", rotary(Q.half(), K.half(), sin=COS.half())),
    "sin_shape": (ValueError, "sin must", rotary(sin=torch.ones(2, 5, 4))),
    "sin_meta": (ValueError, "sin must", rotary(sin=COS.to("meta"))),
    "rotary_dim_odd": (ValueError, "rotary_dim must be even", rotary(rotary_dim=3)),
    "rotary_dim_zero": (ValueError, "rotary_dim must be even", rotary(rotary_dim=0)),
    "rotary_dim_negative": (ValueError, "rotary_dim must be even", rotary(rotary_dim=-4)),
    "rotary_dim_wide": (ValueError, "rotary_dim must be even", rotary(rotary_dim=10)),
    "rotary_dim_float": (TypeError, "rotary_dim must be an int", rotary(rotary_dim=4.0)),
    "rotary_dim_bool": (TypeError, "rotary_dim must be an int", rotary(rotary_dim=True)),
    "rotary_dim_table": (ValueError, "rotary_dim / 2 = 3", rotary(rotary_dim=6)),
    "query_0d": (ValueError, "query must", rotary(torch.tensor(1.0))),
    "inplace_gradient": (ValueError, "inplace cannot", rotary(LEAF, inplace=True)),
    "inplace_expanded": (ValueError, "query must", rotary(Q[:, :1].expand(2, 4, 5, 8), inplace=True)),
    "inplace_same": (ValueError, "key must", rotary(K, K, inplace=True)),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(serving, bad):
    error, message, run = BAD[bad]
    with pytest.raises(error, match=message):
        run()


@st.composite
def cases(draw):
    heads, head_dim = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 70))
    return Case(
        batch=draw(st.integers(1, 3)),
        heads=heads,
        key_heads=draw(st.integers(1, heads)),
        sequence=draw(st.integers(0, 20)),
        head_dim=head_dim,
        rotary_dim=draw(st.sampled_from([None, *range(2, head_dim + 1, 2)])),
        interleaved=draw(st.booleans()),
        table=draw(st.sampled_from(TABLES)),
        table_dtype=draw(st.sampled_from(["query's dtype", torch.float32])),
        first_position=draw(st.integers(0, 10_000)),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_cases_are_as_exact_as_plain(serving, dtype, examples):
    @for_all(examples, case=cases())
    def check(case):
        draws = draws_of(case, dtype, examples.draws)
        assert_as_exact(results(case, dtype, draws), standards_of(case, dtype, draws))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_rotation_keeps_lengths_and_the_inverse_restores(serving, examples):
    @for_all(examples, case=cases())
    def check(case):
        """Held to the error of the same two steps in plain PyTorch."""
        half_cos, half_sin = half_tables(case, torch.float32)
        cos, sin = tables(case, torch.float32)

        def mine(query, key):
            there = nearpeak.apply_rotary(query, key, cos, sin, **form_of(case))
            return *lengths(there), *nearpeak.apply_rotary(*there, cos, -sin, **form_of(case))

        def eager(query, key):
            there = plain.rotary(query, key, half_cos, half_sin, case.interleaved)
            return *lengths(there), *plain.rotary(*there, half_cos, -half_sin, case.interleaved)

        pairs = [inputs for inputs, _ in draws_of(case, torch.float32, examples.draws)]
        exacts = [(*(t.double().norm(dim=-1) for t in pair), *plain.doubled(pair)) for pair in pairs]
        assert_as_exact([mine(*pair) for pair in pairs], standards([[eager(*pair) for pair in pairs]], exacts))


def lengths(tensors):
    return tuple(t.double().norm(dim=-1).float() for t in tensors)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_scores_depend_on_distance_only(serving, examples):
    """Turning query and key by the same further angle leaves their products, which is the point of RoPE."""

    @for_all(examples, shift=st.integers(0, 1000), half=st.integers(1, 64), seed=st.integers(0, 99))
    def check(shift, half, seed):
        here = Case(sequence=9, head_dim=2 * half, seed=seed)
        there = here._replace(first_position=shift)
        pairs = [inputs for inputs, _ in draws_of(here, torch.float32, examples.draws)]
        mine = [(scores(*served(there, torch.float32)(*pair)),) for pair in pairs]
        tables_there, tables_here = half_tables(there, torch.float32), half_tables(here, torch.float64)
        eager = [(scores(*plain.rotary(*pair, *tables_there, False)),) for pair in pairs]
        exacts = [(scores(*plain.rotary(*plain.doubled(pair), *tables_here, False)),) for pair in pairs]
        assert_as_exact(mine, standards([eager], exacts))


def scores(query, key):
    """In float64, and rounded last: only the rotation's own error shows."""
    return (query.double() @ key.double().mT).to(query.dtype)
