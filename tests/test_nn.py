"""nearpeak.nn: layers that take torch's place, with their constructor, state and numbers."""

import copy
import inspect

import nearpeak
import pytest
import torch
from draws import DRAWS, assert_as_exact, standards
from inputs import DTYPES, randn

LAYERS = {
    "default": {},
    "eps": {"eps": 1e-5},
    "no_weight": {"elementwise_affine": False},
    "tuple": {"normalized_shape": (67,)},
    "two_dimensions": {"normalized_shape": (5, 67)},
}


def both(layer, dtype=torch.float32):
    """nearpeak's and torch's layer with the same random weight."""
    options = {"normalized_shape": 67, **LAYERS[layer]}
    theirs = torch.nn.RMSNorm(**options, dtype=dtype)
    if theirs.weight is not None:
        theirs.weight.data = randn(*theirs.weight.shape, dtype=dtype)
    mine = nearpeak.nn.RMSNorm(**options, dtype=dtype)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def value_and_gradients(layer, x, grad):
    x = x.detach().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    return y.detach(), *gradients


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("magnitude", [1.0, 1e-3], ids=["ones", "small"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_as_exact_as_torchs(serving, dtype, magnitude, layer):
    """Small inputs show which eps the layer chose where it was given none."""
    mine, theirs = both(layer, dtype)
    exact = copy.deepcopy(theirs).double()
    if exact.eps is None:
        exact.eps = torch.finfo(torch.float32).eps
    draws = [
        (randn(3, 5, 67, dtype=dtype, magnitude=magnitude, seed=i), randn(3, 5, 67, dtype=dtype, seed=i + 50))
        for i in range(DRAWS)
    ]
    results, plains = ([value_and_gradients(each, *draw) for draw in draws] for each in (mine, theirs))
    exacts = [value_and_gradients(exact, x.double(), grad.double()) for x, grad in draws]
    assert_as_exact(results, standards([plains], exacts))


def test_rms_norm_has_torchs_constructor_and_state():
    assert inspect.signature(nearpeak.nn.RMSNorm) == inspect.signature(torch.nn.RMSNorm)
    mine, theirs = both("eps")
    assert isinstance(mine, torch.nn.RMSNorm)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert repr(mine) == repr(theirs)
    theirs.load_state_dict(mine.state_dict(), strict=True)


def test_rms_norm_is_made_on_any_device_and_in_any_dtype():
    layer = nearpeak.nn.RMSNorm(8, device="meta", dtype=torch.bfloat16)
    assert layer.weight.device.type == "meta"
    assert layer(torch.empty(2, 8, device="meta", dtype=torch.bfloat16)).shape == (2, 8)
    assert nearpeak.nn.RMSNorm(8).double().weight.dtype is torch.float64


def test_rms_norm_copies_and_pickles(tmp_path):
    layer, _ = both("default")
    x = randn(3, 67)
    torch.save(layer, tmp_path / "layer.pt")
    for other in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert other.weight.data_ptr() != layer.weight.data_ptr()


def test_rms_norm_in_float32_takes_bfloat16_input(serving):
    mine, theirs = both("default")
    x = randn(3, 67, dtype=torch.bfloat16)
    assert mine(x).dtype is theirs(x).dtype is torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 66), (67, 3), (), (0,)], ids=str)
def test_rms_norm_refuses_what_torch_refuses(serving, shape):
    mine, theirs = both("default")
    with pytest.raises((RuntimeError, ValueError)):
        theirs(torch.ones(shape))
    with pytest.raises(ValueError, match="x must"):
        mine(torch.ones(shape))


def test_a_training_step_moves_both_layers_alike(serving):
    mine, theirs = both("default")
    for layer in (mine, theirs):
        optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for step in range(5):
            optimiser.zero_grad()
            (layer(randn(4, 67, seed=step)) - randn(4, 67, seed=step + 9)).square().mean().backward()
            optimiser.step()
    torch.testing.assert_close(mine.weight, theirs.weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_as_exact_as_torchs(serving, dtype, bias):
    theirs = torch.nn.Linear(67, 45, bias=bias, dtype=dtype)
    mine = nearpeak.nn.Linear(67, 45, bias=bias, dtype=dtype)
    mine.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    draws = [(randn(2, 3, 67, dtype=dtype, seed=i), randn(2, 3, 45, dtype=dtype, seed=i + 50)) for i in range(DRAWS)]
    results, plains = ([value_and_gradients(each, *draw) for draw in draws] for each in (mine, theirs))
    exacts = [value_and_gradients(exact, x.double(), grad.double()) for x, grad in draws]
    assert_as_exact(results, standards([plains], exacts))


def test_linear_has_torchs_constructor_and_state():
    assert inspect.signature(nearpeak.nn.Linear) == inspect.signature(torch.nn.Linear)
    mine, theirs = nearpeak.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    assert isinstance(mine, torch.nn.Linear)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert repr(mine) == repr(theirs)
