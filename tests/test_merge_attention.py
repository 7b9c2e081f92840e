"""nearpeak.merge_attention: parts over disjoint keys give the whole, and gradients reach every part."""

import nearpeak
import plain
import pytest
import torch
from draws import DRAWS, assert_as_exact, standards
from inputs import DTYPES, randn

SHAPE = 2, 4, 5, 8
MINUS_INFINITY = float("-inf")
SPLITS = {"two": (9, 14), "three": (1, 7, 15), "empty part": (0, 23), "no keys": (0, 0)}


def inputs_of(split, dtype, seed=0):
    query, *keys = (
        randn(2, 4, length, 8, dtype=dtype, seed=10 * seed + i) for i, length in enumerate((5, sum(split), sum(split)))
    )
    grads = randn(*SHAPE, dtype=dtype, seed=10 * seed + 5), randn(*SHAPE[:3], seed=10 * seed + 6)
    return (query, *keys), (grads[0], grads[1].to(plain.lse_dtype(dtype)))


def whole(query, key, value):
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    return plain.attention(query, key, value, mask, query.shape[3] ** -0.5, None)


def merged(split):
    def layer(query, key, value):
        parts = zip(key.split(split, 2), value.split(split, 2), strict=True)
        (out, lse), *others = (nearpeak.attention(query, k, v, return_lse=True) for k, v in parts)
        for other in others:
            out, lse = nearpeak.merge_attention(out, lse, *other)
        return out, lse

    return layer


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_merge_to_the_whole_with_its_gradients(serving, dtype, name):
    """As exact as the plain layer over all keys, up to one rounding of each part."""
    split = SPLITS[name]
    draws = [inputs_of(split, dtype, seed) for seed in range(2 * DRAWS)]
    doubles = [(plain.doubled(inputs), plain.doubled(grads)) for inputs, grads in draws]
    plains, exacts = ([plain.value_and_gradients(whole, *draw) for draw in of_dtype] for of_dtype in (draws, doubles))
    results = [plain.value_and_gradients(merged(split), *draw) for draw in draws]
    assert_as_exact(results, standards([plains], exacts))


def parts(dtype=torch.float64, unseen1=(), unseen2=()):
    """Two parts, of which given queries saw no key."""
    arguments = [randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate((SHAPE, SHAPE[:3]) * 2)]
    for lse, unseen in ((1, unseen1), (3, unseen2)):
        arguments[lse] = arguments[lse].to(plain.lse_dtype(dtype))
        arguments[lse][:, :, list(unseen)] = MINUS_INFINITY
    return arguments


def test_gradients_are_those_of_the_formula():
    arguments = [t[:1, :2, :2].contiguous().requires_grad_() for t in parts()]
    assert torch.autograd.gradcheck(nearpeak.merge_attention, arguments)
    assert torch.autograd.gradgradcheck(nearpeak.merge_attention, arguments)


@pytest.mark.parametrize("held", [0.0, torch.nan], ids=["zeros", "nan"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_saw_no_key_counts_for_nothing(dtype, held):
    """Query 1 of the first part, 2 of the second, 3 of both; whatever their out holds."""
    arguments = parts(dtype, (1, 3), (2, 3))
    for out, lse in (arguments[:2], arguments[2:]):
        out[lse == MINUS_INFINITY] = held
    leaves = [t.requires_grad_() for t in arguments]
    out, lse = nearpeak.merge_attention(*leaves)
    grads = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    assert torch.equal(out[:, :, 1], arguments[2][:, :, 1])
    assert torch.equal(lse[:, :, 2], arguments[1][:, :, 2])
    assert (out[:, :, 3] == 0).all()
    assert (lse[:, :, 3] == MINUS_INFINITY).all()
    assert not any(t.isnan().any() for t in (out, lse, *grads))
    assert all((grad[:, :, 3] == 0).all() for grad in grads)
    assert (grads[0][:, :, 1] == 0).all()
    assert (grads[3][:, :, 1] == 1).all()


def test_large_lse_does_not_overflow():
    out1, lse1, out2, _ = parts(torch.float32)
    out, lse = nearpeak.merge_attention(out1, lse1 + 1e4, out2, lse1 + 1e4)
    torch.testing.assert_close(out, (out1 + out2) / 2)
    torch.testing.assert_close(lse, lse1 + 1e4 + torch.tensor(2.0).log())


def test_one_graph_under_compile():
    arguments = [t.requires_grad_() for t in parts(torch.float32, (1,), (1,))]
    torch._dynamo.reset()
    compiled = torch.compile(nearpeak.merge_attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (nearpeak.merge_attention, compiled):
        outputs = function(*arguments)
        results.append((*outputs, *torch.autograd.grad(outputs, arguments, [torch.ones_like(t) for t in outputs])))
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


OUT, LSE = torch.ones(SHAPE), torch.ones(SHAPE[:3])
BAD = {
    "not a tensor": (TypeError, "out1 must", ([1.0], LSE, OUT, LSE)),
    "integers": (TypeError, "out1 must", (OUT.int(), LSE, OUT, LSE)),
    "number": (ValueError, "out1 must", (OUT[0, 0, 0, 0], LSE, OUT, LSE)),
    "two dtypes": (TypeError, "out2 must", (OUT, LSE, OUT.half(), LSE)),
    "two shapes": (ValueError, "out2 must", (OUT, LSE, OUT[1:], LSE)),
    "lse of out's dtype": (TypeError, "lse1 must", (OUT.half(), LSE.half(), OUT.half(), LSE)),
    "lse of float64": (TypeError, "lse2 must", (OUT, LSE, OUT, LSE.double())),
    "no lse": (TypeError, "lse2 must", (OUT, LSE, OUT, None)),
    "lse with a dimension more": (ValueError, "lse1 must", (OUT, LSE[..., None], OUT, LSE)),
    "another device": (ValueError, "lse2 must", (OUT, LSE, OUT, LSE.to("meta"))),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(bad):
    error, message, arguments = BAD[bad]
    with pytest.raises(error, match=message):
        nearpeak.merge_attention(*arguments)
