"""The CUDA kernels on a GPU, through the public functions: as exact as the plain layers, forward and backward."""

import nearpeak
import pytest
import test_norm
import test_rotary
import torch
from draws import assert_as_exact
from inputs import DTYPES
from nearpeak import backends

DEVICE, BACKEND = "cuda", "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backends.missing(BACKEND) is not None, reason=str(backends.missing(BACKEND))),
]

SHAPES = [(3, width) for width in (1, 7, 64, 127, 640, 4096, 8200, 16400, 33000, 70000)]
# More rows than the blocks of a backward call take at once.
SHAPES += [(9000, 33), (3000, 640), (700, 8200)]


def on_device(draws):
    return [tuple([None if t is None else t.to(DEVICE) for t in tensors] for tensors in draw) for draw in draws]


def on_cpu(results):
    return [tuple(t.cpu() for t in result) for result in results]


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_as_exact_as_plain(dtype, rows, width):
    case = test_norm.Case(rows=(rows,), width=width, residual=True, offset=1.0)
    draws = test_norm.draws_of(case, dtype)[:2]
    with nearpeak.use_backend(BACKEND):
        mine = test_norm.results(case, on_device(draws))
    assert_as_exact(on_cpu(mine), test_norm.standards_of(case, draws))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("head_dim", [34, 64, 128, 2080])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_is_as_exact_as_plain(dtype, head_dim, interleaved):
    case = test_rotary.Case(heads=17, key_heads=3, sequence=33, head_dim=head_dim, interleaved=interleaved)
    draws = test_rotary.draws_of(case, dtype)
    cos, sin = (table.to(DEVICE) for table in test_rotary.tables(case, dtype))

    def call(query, key):
        return nearpeak.apply_rotary(query, key, cos, sin, interleaved=interleaved)

    with nearpeak.use_backend(BACKEND):
        mine = [test_rotary.plain.value_and_gradients(call, inputs, grads) for inputs, grads in on_device(draws)]
    assert_as_exact(on_cpu(mine), test_rotary.standards_of(case, dtype, draws))


@pytest.mark.parametrize("width", [33, 640, 70000])
def test_the_gradient_of_the_weight_is_the_same_bits_every_time(width):
    x = torch.randn(300, width, device=DEVICE)
    weight = torch.randn(width, device=DEVICE, requires_grad=True)
    with nearpeak.use_backend(BACKEND):
        first, second = (torch.autograd.grad(nearpeak.rms_norm(x, weight).sum(), weight)[0] for _ in range(2))
    assert torch.equal(first, second)
