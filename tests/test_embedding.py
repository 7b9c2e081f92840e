"""Embeddings: as exact as PyTorch's layers on every backend, forward and backward, whatever tables and options."""

import functools
from typing import NamedTuple

import hypothesis.strategies as st
import nearpeak
import plain
import pytest
import torch
import torch.nn.functional as F
from draws import DRAWS, assert_as_exact, standards
from inputs import DTYPES, EXAMPLES, case_name, for_all, padded, randn
from nearpeak import dropout
from nearpeak.embedding import reference

SEED = 7


class Case(NamedTuple):
    tokens: tuple = (3, 17)
    rows: int = 40
    width: int = 64
    scale: float = 1.0
    positions: str | None = None  # "counted", "given" for each token, "shared" by all sequences
    segments: str | None = None
    eps: float | None = None
    weight: bool = True
    bias: bool = True
    parameters: torch.dtype | str = "the tables' dtype"
    dropout_p: float = 0.0
    padding_idx: int | None = None
    seed: int = 0


BERT = Case(positions="counted", segments="given", eps=1e-12)
CASES = [
    *(Case(width=width, scale=width**0.5) for width in (1, 7, 33, 64, 100, 640)),
    # A row of one element, or of two, has no gradient but eps's.
    *(BERT._replace(width=width, eps=1e-12 if width > 2 else 1.0) for width in (1, 3, 7, 16, 33, 100, 640, 4097)),
    *(Case(tokens=tokens, scale=2.0) for tokens in ((), (0,), (1,), (5,), (2, 0, 3), (2, 3, 5))),
    *(BERT._replace(tokens=tokens) for tokens in ((), (0,), (1,), (2, 3, 5))),
    *(Case(positions=positions) for positions in ("counted", "given", "shared")),
    *(Case(segments=segments) for segments in ("counted", "given", "shared")),
    *(BERT._replace(weight=weight, bias=bias) for weight, bias in ((False, False), (True, False), (False, True))),
    *(BERT._replace(parameters=torch.float32, positions=positions) for positions in (None, "shared")),
    *(case._replace(dropout_p=p) for case in (Case(), BERT, Case(width=33, scale=3.0)) for p in (0.1, 0.9)),
    *(case._replace(padding_idx=padding) for case in (Case(), BERT) for padding in (0, 3, -1)),
    # Rows that many tokens took, and many that none did.
    BERT._replace(tokens=(7, 100), rows=3),
    BERT._replace(tokens=(2, 200), rows=1, width=300),
    BERT._replace(tokens=(5,), rows=3000),
]


def ids_of(case):
    """token_ids, position_ids or None, segment_ids or None."""
    random = torch.Generator().manual_seed(case.seed)
    of = {"counted": None, None: None}
    of["given"], of["shared"] = case.tokens, case.tokens[-1:]

    def drawn(rows, shape):
        return None if shape is None else torch.randint(0, rows, shape, generator=random)

    return drawn(case.rows, case.tokens), drawn(300, of[case.positions]), drawn(2, of[case.segments])


def inputs_of(case, dtype):
    """weight, positions or None, segments or None, norm_weight or None, norm_bias or None, and y's gradient."""
    kind = dtype if case.parameters == "the tables' dtype" else case.parameters
    counts = (case.rows, True), (300, case.positions), (2, case.segments)
    tables = [
        randn(count, case.width, dtype=dtype, seed=case.seed + i) if given else None
        for i, (count, given) in enumerate(counts)
    ]
    norm = [
        randn(case.width, dtype=kind, seed=case.seed + 3 + i) if case.eps is not None and given else None
        for i, given in enumerate((case.weight, case.bias))
    ]
    return (*tables, *norm), [randn(*case.tokens, case.width, dtype=dtype, seed=case.seed + 5)]


def served(case):
    ids, position_ids, segment_ids = ids_of(case)

    def run(weight, positions, segments, norm_weight, norm_bias):
        return nearpeak.embedding(
            ids, weight, scale=case.scale, positions=positions, position_ids=position_ids, segments=segments,
            segment_ids=segment_ids, norm_weight=norm_weight, norm_bias=norm_bias, eps=case.eps,
            dropout_p=case.dropout_p, dropout_seed=SEED if case.dropout_p else None, padding_idx=case.padding_idx,
        )  # fmt: skip

    return run


def layers(case):
    """What users have: an embedding for each table, their sum, F.layer_norm, and dropout of the same elements."""
    ids, position_ids, segment_ids = ids_of(case)

    def run(weight, positions, segments, norm_weight, norm_bias):
        y = F.embedding(ids, weight, case.padding_idx) * case.scale
        if positions is not None:
            y = y + F.embedding(reference.position_numbers(ids) if position_ids is None else position_ids, positions)
        if segments is not None:
            y = y + F.embedding(torch.zeros_like(ids) if segment_ids is None else segment_ids, segments)
        if case.eps is not None:
            y = F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, case.eps)
        if case.dropout_p:
            kept = dropout.kept(torch.tensor(SEED), case.dropout_p, (1, 1, ids.numel(), case.width), (0, 0, 0))
            y = y * (kept.view_as(y).to(y.dtype) / (1.0 - case.dropout_p))
        return y

    return run


def results(case, draws):
    return [plain.value_and_gradients(served(case), inputs, grads) for inputs, grads in draws]


def standards_of(case, draws):
    plains = [plain.value_and_gradients(layers(case), inputs, grads) for inputs, grads in draws]
    doubles = [(plain.doubled(inputs), plain.doubled(grads)) for inputs, grads in draws]
    exacts = [plain.value_and_gradients(layers(case), inputs, grads) for inputs, grads in doubles]
    return standards([plains], exacts)


def draws_of(case, dtype, count=DRAWS):
    return [inputs_of(case._replace(seed=case.seed + 10 * draw), dtype) for draw in range(count)]


@functools.lru_cache(maxsize=2)
def standard(case, dtype):
    return standards_of(case, draws_of(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(serving, dtype, case):
    mine = results(case, draws_of(case, dtype))
    assert all(result[0].dtype is dtype for result in mine)
    assert_as_exact(mine, standard(case, dtype))


@pytest.mark.parametrize("case", [Case(scale=8.0), BERT, BERT._replace(dropout_p=0.2)], ids=case_name)
def test_forward_without_gradients_is_the_same(serving, case):
    inputs, grads = inputs_of(case, torch.float32)
    training = plain.value_and_gradients(served(case), inputs, grads)
    assert torch.equal(plain.value_and_gradients(served(case), inputs)[0], training[0])


@pytest.mark.parametrize("case", [Case(scale=8.0), BERT, BERT._replace(dropout_p=0.2)], ids=case_name)
def test_float64_is_served_in_float64(case):
    inputs, grads = inputs_of(case, torch.float64)
    mine, theirs = (plain.value_and_gradients(f(case), inputs, grads) for f in (served, layers))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_formula_of_the_gradients_is_the_derivative():
    case = BERT._replace(tokens=(2, 3), rows=4, width=5, eps=1e-3, scale=2.0, dropout_p=0.3)
    inputs, (grad,) = inputs_of(case, torch.float64)
    weight, positions, segments, *norm = (t.requires_grad_() for t in inputs)
    ids, _, segment_ids = ids_of(case)
    operands = ids, weight, positions, None, segments, segment_ids, *norm
    formula = case.scale, case.eps, torch.tensor(SEED), case.dropout_p
    y = reference.embedding(*operands, *formula, 3, False)
    expected = torch.autograd.grad(y, (weight, positions, segments, *norm), grad)
    d_hidden, *mine = reference.hidden_gradient(grad, *operands, *formula)
    tables = (ids, 4, case.scale, 3), (reference.position_numbers(ids), 300, 1.0, -1), (segment_ids, 2, 1.0, -1)
    mine = *(reference.table_gradient(d_hidden, *table) for table in tables), *mine
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_a_sparse_gradient_is_the_dense_one(serving, padding_idx):
    weight, ids = randn(1000, 33).requires_grad_(), torch.randint(0, 20, (3, 17))

    def gradient(sparse):
        y = nearpeak.embedding(ids, weight, scale=2.0, padding_idx=padding_idx, sparse=sparse)
        return torch.autograd.grad(y, weight, randn(*y.shape, seed=1))[0]

    found = gradient(True)
    assert found.is_sparse
    assert torch.equal(found.to_dense(), gradient(False))


def test_gradients_have_the_same_bits_whatever_the_threads(serving):
    case = BERT._replace(tokens=(8, 130), rows=5, width=300, dropout_p=0.1)
    inputs, grads = inputs_of(case, torch.float32)
    expected = plain.value_and_gradients(served(case), inputs, grads)
    torch.set_num_threads(2)
    for _ in range(3):
        again = plain.value_and_gradients(served(case), inputs, grads)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_dropout_draws_by_torchs_generator(serving):
    weight, ids = torch.ones(4, 256), torch.zeros(64, dtype=torch.int64)
    y = nearpeak.embedding(ids, weight, dropout_p=0.25)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((y == 0).double().mean() - 0.25) < 0.02
    assert not torch.equal(nearpeak.embedding(ids, weight, dropout_p=0.25), y)


LAYOUTS = {
    "padded": padded,
    "transposed": lambda table: table.T.contiguous().T,
    "one row": lambda table: table[:1].expand_as(table),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_tables_and_gradients(serving, dtype, layout):
    case = BERT._replace(tokens=(4, 5), width=67)
    strange = LAYOUTS[layout]
    draws = [
        ((*(strange(table) for table in tables), weight, bias), [strange(grad.flatten(0, 1)).unflatten(0, (4, 5))])
        for (*tables, weight, bias), (grad,) in draws_of(case, dtype)
    ]
    assert_as_exact(results(case, draws), standards_of(case, draws))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(17,), (1, 17), (3, 1), (1, 1), (1,), (3, 17)])
def test_ids_of_any_type_that_broadcast(serving, kind, shape):
    weight, positions = randn(40, 33), randn(50, 33, seed=1)
    ids, position_ids = torch.randint(0, 40, (3, 17)), torch.randint(0, 50, shape)
    y = nearpeak.embedding(ids.to(kind), weight, positions=positions, position_ids=position_ids.to(kind))
    torch.testing.assert_close(y, weight[ids] + positions[position_ids])
    strided = torch.stack((ids, ids), dim=-1)[..., 0]
    assert torch.equal(nearpeak.embedding(strided, weight, positions=positions, position_ids=position_ids), y)


def test_only_the_gradients_asked_for(serving):
    inputs, _ = inputs_of(BERT, torch.float32)
    for wanted in inputs:
        leaf = wanted.detach().requires_grad_()
        y = served(BERT)(*(leaf if t is wanted else t for t in inputs))
        assert torch.autograd.grad(y.sum(), leaf)[0].shape == leaf.shape


WEIGHT, IDS, NORM = torch.ones(4, 8), torch.tensor([[0, 3]]), torch.ones(8)
embedding = nearpeak.embedding
BAD = {
    "ids_list": (TypeError, "token_ids must", lambda: embedding([0], WEIGHT)),
    "ids_float": (TypeError, "token_ids must", lambda: embedding(IDS.float(), WEIGHT)),
    "ids_high": (IndexError, "token_ids must be from 0 to 3", lambda: embedding(IDS + 1, WEIGHT)),
    "ids_negative": (IndexError, "token_ids must be from 0 to 3", lambda: embedding(IDS - 1, WEIGHT)),
    "ids_meta": (ValueError, "token_ids must", lambda: embedding(IDS.to("meta"), WEIGHT)),
    "weight_int": (TypeError, "weight must", lambda: embedding(IDS, WEIGHT.int())),
    "weight_row": (ValueError, "weight must", lambda: embedding(IDS, WEIGHT[0])),
    "weight_no_width": (ValueError, "weight must", lambda: embedding(IDS, WEIGHT[:, :0])),
    "positions_width": (ValueError, "positions must", lambda: embedding(IDS, WEIGHT, positions=WEIGHT[:, :7])),
    "positions_dtype": (TypeError, "positions must", lambda: embedding(IDS, WEIGHT, positions=WEIGHT.half())),
    "positions_few": (IndexError, "positions must", lambda: embedding(IDS, WEIGHT, positions=WEIGHT[:1])),
    "position_high": (
        IndexError,
        "position_ids must be from 0 to 3",
        lambda: embedding(IDS, WEIGHT, positions=WEIGHT, position_ids=IDS + 1),
    ),
    "position_alone": (ValueError, "position_ids", lambda: embedding(IDS, WEIGHT, position_ids=IDS)),
    "position_shape": (
        ValueError,
        "position_ids must",
        lambda: embedding(IDS, WEIGHT, positions=WEIGHT, position_ids=IDS[:, [0, 1, 0]]),
    ),
    "segment_float": (
        TypeError,
        "segment_ids must",
        lambda: embedding(IDS, WEIGHT, segments=WEIGHT, segment_ids=NORM[:2]),
    ),
    "norm_short": (ValueError, "norm_weight must", lambda: embedding(IDS, WEIGHT, norm_weight=NORM[:7], eps=1e-5)),
    "norm_dtype": (TypeError, "norm_bias must", lambda: embedding(IDS, WEIGHT, norm_bias=NORM.half(), eps=1e-5)),
    "norm_without_eps": (ValueError, "eps must", lambda: embedding(IDS, WEIGHT, norm_weight=NORM)),
    "dropout_all": (ValueError, "dropout_p must", lambda: embedding(IDS, WEIGHT, dropout_p=1.0)),
    "dropout_seed": (TypeError, "dropout_seed must", lambda: embedding(IDS, WEIGHT, dropout_p=0.5, dropout_seed=0.5)),
    "padding_high": (ValueError, "padding_idx must", lambda: embedding(IDS, WEIGHT, padding_idx=4)),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(serving, bad):
    error, message, run = BAD[bad]
    with pytest.raises(error, match=message):
        run()


@st.composite
def cases(draw):
    positions, segments = (st.sampled_from([None, "counted", "given", "shared"]) for _ in range(2))
    weight = draw(st.booleans())
    # F.layer_norm takes no float32 bias alone.
    kinds = ["the tables' dtype", torch.float32] if weight else ["the tables' dtype"]
    return Case(
        tokens=tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))),
        rows=draw(st.integers(1, 50)),
        width=draw(st.integers(3, 300)),
        scale=draw(st.sampled_from([1.0, 8.0, 0.1])),
        positions=draw(positions),
        segments=draw(segments),
        eps=draw(st.sampled_from([None, 1e-5, 1e-12])),
        weight=weight,
        bias=draw(st.booleans()),
        parameters=draw(st.sampled_from(kinds)),
        dropout_p=draw(st.sampled_from([0.0, 0.1])),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_cases_are_as_exact_as_plain(serving, dtype, examples):
    @for_all(examples, case=cases())
    def check(case):
        draws = draws_of(case, dtype, examples.draws)
        assert_as_exact(results(case, draws), standards_of(case, draws))


@pytest.mark.parametrize("options", [{}, {"padding_idx": -2}, {"sparse": True}, {"max_norm": 1.0}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_module_is_torchs(serving, scale, options):
    mine, theirs = nearpeak.nn.Embedding(40, 33, scale=scale, **options), torch.nn.Embedding(40, 33, **options)
    mine.load_state_dict(theirs.state_dict())
    assert repr(mine) == repr(theirs).replace(")", ", scale=8)" if scale == 8.0 else ")")
    ids = torch.randint(0, 40, (3, 17))
    grad = randn(3, 17, 33)
    torch.testing.assert_close(mine(ids), scale * theirs(ids))
    gradients = [torch.autograd.grad(layer(ids), layer.weight, grad)[0] for layer in (mine, theirs)]
    torch.testing.assert_close(gradients[0].to_dense(), scale * gradients[1].to_dense())
