"""Linear layers and embeddings over GGUF's blocks: their numbers, and products as exact as dequantising first."""

import functools
import math
from typing import NamedTuple

import hypothesis.strategies as st
import nearpeak
import pytest
import torch
import torch.nn.functional as F
from draws import DRAWS, assert_as_exact, standards
from gguf_blocks import K_TYPES, one_by_one, random_blocks
from inputs import DTYPES, EXAMPLES, every_second, for_all, misaligned, padded, randn
from nearpeak.linear.gguf_blocks import TYPES, dequantized
from quantized_layers import followed, gradients


class Case(NamedTuple):
    kind: str
    rows: tuple = (5,)
    inputs: int = 256
    outputs: int = 21
    activation: str | None = None
    residual: bool = False
    bias: bool = True
    magnitude: float = 1.0
    seed: int = 0


def name_of(case):
    return "-".join(
        [case.kind, *(f"{k}={v}" for k, v in case._asdict().items() if v != case._field_defaults.get(k, v))]
    )


CASES = [
    *(Case(kind, rows=rows) for kind in TYPES for rows in ((1,), (), (2, 3, 7))),
    # How many rows are taken together, from one up to blocks.
    *(Case(kind, rows=(rows,), bias=False) for kind in TYPES for rows in (2, 4, 9, 17, 40)),
    *(Case(kind, rows=(rows,), outputs=outputs) for kind in TYPES for rows, outputs in ((1, 1), (3, 16), (20, 97))),
    *(Case(kind, rows=(rows,), inputs=32) for kind in TYPES if kind not in K_TYPES for rows in (1, 20)),
    *(Case(kind, rows=(rows,), inputs=352) for kind in ("Q8_0", "Q5_0") for rows in (1, 20)),
    *(Case(kind, rows=(rows,), activation="silu", residual=True) for kind in TYPES for rows in (1, 20)),
    # Long sums, whose rounding shows in float32; more than one block of rows, and of steps.
    *(Case(kind, rows=(rows,), inputs=4096, outputs=9) for kind in TYPES for rows in (1, 20)),
    Case("Q5_0", rows=(270,), inputs=64, outputs=790),
    *(Case(kind, rows=(rows,), magnitude=1e-2) for kind in ("Q8_0", "Q6_K") for rows in (3, 20)),
]


def inputs_of(case, dtype):
    x = randn(*case.rows, case.inputs, dtype=dtype, seed=case.seed)
    blocks = random_blocks(case.kind, case.outputs, case.inputs, case.seed + 1, case.magnitude)
    bias = randn(case.outputs, dtype=dtype, seed=case.seed + 2) if case.bias else None
    residual = randn(*case.rows, case.outputs, dtype=dtype, seed=case.seed + 3) if case.residual else None
    return x, nearpeak.GgufWeight(blocks, case.kind), bias, residual, case.activation


def draws_of(case, dtype, count=DRAWS):
    return [inputs_of(case._replace(seed=case.seed + 10 * draw), dtype) for draw in range(count)]


def dequantized_first(x, weight, bias, residual, activation):
    """What users have without a kernel."""
    return followed(F.linear(x, weight.dequantize(x.dtype), bias), residual, activation)


def exact(x, weight, bias, residual, activation):
    x, bias, residual = (None if t is None else t.double() for t in (x, bias, residual))
    wide = dequantized(weight.blocks, TYPES[weight.kind].number, torch.float64)
    return followed(F.linear(x, wide, bias), residual, activation)


def served(x, weight, bias, residual, activation):
    return nearpeak.quantized_linear(x, weight, bias, activation=activation, residual=residual)


def standards_of(draws):
    return standards([[(dequantized_first(*draw),) for draw in draws]], [(exact(*draw),) for draw in draws])


@functools.lru_cache(maxsize=2)
def standard(case, dtype):
    return standards_of(draws_of(case, dtype))


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_stand_for_what_the_format_defines(kind):
    blocks = random_blocks(kind, 3, 512, seed=1)
    weight = nearpeak.GgufWeight(blocks, kind)
    expected = one_by_one(kind, blocks)
    assert (weight.out_features, weight.in_features, weight.nbytes) == (3, 512, blocks.numel())
    assert torch.equal(dequantized(blocks, TYPES[kind].number, torch.float64), expected)
    # With a minimum the difference of two products is rounded, else nothing is.
    torch.testing.assert_close(weight.dequantize().double(), expected, rtol=2**-22, atol=2**-22)


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_stand_for_what_the_gguf_package_says(kind):
    gguf = pytest.importorskip("gguf")
    blocks = random_blocks(kind, 3, 512, seed=2)
    theirs = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(nearpeak.GgufWeight(blocks, kind).dequantize(), torch.from_numpy(theirs))


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_dequantising_first(serving, dtype, case):
    mine = [(served(*draw),) for draw in draws_of(case, dtype)]
    assert all(y.dtype is dtype and y.is_contiguous() for (y,) in mine)
    assert_as_exact(mine, standard(case, dtype))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_dequantised_weight(serving, dtype, activation):
    case = Case("Q4_K", rows=(20,), residual=True, activation=activation)
    draws = draws_of(case, dtype)
    grads = [(randn(20, 21, dtype=dtype, seed=draw),) for draw in range(len(draws))]
    plains, exacts = gradients(dequantized_first, draws, grads), gradients(exact, draws, grads, double=True)
    assert_as_exact(gradients(served, draws, grads), standards([plains], exacts))


LAYOUTS = {"every_second": every_second, "misaligned": misaligned, "padded": padded}


@pytest.mark.parametrize("rows", [(2, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(serving, layout, rows):
    x, weight, bias, *others = inputs_of(Case("Q6_K", rows=rows), torch.float32)
    strided = LAYOUTS[layout]
    result = served(strided(x), weight._replace(blocks=strided(weight.blocks)), strided(bias), *others)
    assert_as_exact([(result,)], standards_of([(x, weight, bias, *others)]))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (20, 0)], ids=str)
def test_empty(serving, shape):
    inputs = inputs_of(Case("Q8_0", rows=shape[:1], outputs=shape[1]), torch.float32)
    assert served(*inputs).shape == shape


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("kind", TYPES)
def test_special_values(serving, kind, rows):
    x, weight, bias, *others = inputs_of(Case(kind, rows=(rows,)), torch.float32)
    x[0, 3], x[1, 3], bias[6] = math.inf, math.nan, math.inf
    expected, found = exact(x, weight, bias, *others).float(), served(x, weight, bias, *others)
    # An infinity times a weight of zero is NaN, and so may be what a kernel makes of it with the group's sum.
    assert not found[:2].isfinite().any()
    torch.testing.assert_close(found[2:], expected[2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("kind", ["Q5_0", "Q6_K"])
def test_threads_change_nothing(serving, kind, dtype, rows):
    if serving == "reference":
        pytest.skip("torch's own products make no such promise")
    inputs = inputs_of(Case(kind, rows=(rows,), inputs=512, outputs=700), dtype)
    first = served(*inputs)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(served(*inputs), first)


def test_under_compile_and_opcheck():
    x, weight, bias, *others = inputs_of(Case("Q8_0"), torch.float32)
    compiled = torch.compile(lambda x: served(x, weight, bias, *others), fullgraph=True)
    assert torch.equal(compiled(x), served(x, weight, bias, *others))
    arguments = x.requires_grad_(), weight.blocks, bias.requires_grad_(), TYPES["Q8_0"].number, None, 3, True
    torch.library.opcheck(torch.ops.nearpeak.gguf_linear.default, arguments)


def test_explain_names_the_kernel():
    said = nearpeak.explain(served, *inputs_of(Case("Q8_0"), torch.bfloat16))
    assert said.startswith("nearpeak::gguf_linear_inference on cpu, bfloat16")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(kind, dtype):
    weight = nearpeak.GgufWeight(random_blocks(kind, 7, 256), kind)
    layer = nearpeak.nn.GgufEmbedding(weight, scale=16.0).to(dtype)
    ids = torch.tensor([[3, 0, 6], [3, 3, 1]])
    assert torch.equal(layer(ids), (weight.dequantize()[ids] * 16).to(dtype))
    assert not layer.state_dict()
    assert (layer.num_embeddings, layer.embedding_dim) == (7, 256)


def test_linear_layer():
    x, weight, bias, _, _ = inputs_of(Case("Q4_0"), torch.float32)
    layer = nearpeak.nn.GgufLinear(weight, bias, activation="silu")
    assert torch.equal(layer(x), served(x, weight, bias, None, "silu"))
    assert list(layer.state_dict()) == ["bias"]
    assert "in_features=256, out_features=21, bias=True, kind='Q4_0', activation='silu'" in repr(layer)
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype is torch.bfloat16


X = torch.ones(2, 256)
BLOCKS, BIAS = random_blocks("Q4_K", 3, 256), torch.ones(3)
WEIGHT = nearpeak.GgufWeight(BLOCKS, "Q4_K")
BAD_CALLS = {
    "x_int": (TypeError, "x must", lambda: nearpeak.quantized_linear(X.int(), WEIGHT)),
    "x_scalar": (ValueError, "x must", lambda: nearpeak.quantized_linear(torch.tensor(1.0), WEIGHT)),
    "x_width": (ValueError, "x must have whole blocks", lambda: nearpeak.quantized_linear(X[:, :32], WEIGHT)),
    "x_wider": (ValueError, "blocks must have shape", lambda: nearpeak.quantized_linear(X.repeat(1, 2), WEIGHT)),
    "x_meta": (ValueError, "blocks must", lambda: nearpeak.quantized_linear(X.to("meta"), WEIGHT)),
    "kind": (ValueError, "kind must be one of", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(kind="Q9"))),
    "blocks_none": (TypeError, "blocks must", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(blocks=None))),
    "blocks_dtype": (
        TypeError, "blocks must", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(blocks=BLOCKS.int())),
    ),
    "blocks_vector": (
        ValueError, "blocks must", lambda: nearpeak.quantized_linear(X, WEIGHT._replace(blocks=BLOCKS[0])),
    ),
    "bias_dtype": (TypeError, "bias must", lambda: nearpeak.quantized_linear(X, WEIGHT, BIAS.half())),
    "bias_shape": (ValueError, "bias must", lambda: nearpeak.quantized_linear(X, WEIGHT, BIAS[:2])),
    "residual": (ValueError, "residual must", lambda: nearpeak.quantized_linear(X, WEIGHT, residual=X)),
    "layer": (TypeError, "weight must", lambda: nearpeak.nn.GgufLinear(torch.ones(3, 3))),
    "activation": (ValueError, "activation must", lambda: nearpeak.nn.GgufLinear(WEIGHT, activation="no")),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_calls_are_named(serving, bad):
    error, message, run = BAD_CALLS[bad]
    with pytest.raises(error, match=message):
        run()


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(list(TYPES)))
    return Case(
        kind=kind,
        rows=tuple(draw(st.lists(st.integers(1, 6), max_size=2))),
        inputs=TYPES[kind].weights * draw(st.integers(1, 4)),
        outputs=draw(st.integers(1, 130)),
        activation=draw(st.sampled_from([None, "silu"])),
        residual=draw(st.booleans()),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_cases_are_as_exact_as_plain(serving, dtype, examples):
    @for_all(examples, case=cases())
    def check(case):
        draws = draws_of(case, dtype, examples.draws)
        assert_as_exact([(served(*draw),) for draw in draws], standards_of(draws))
