"""nearpeak.nn: layers that take torch's place, with their constructor, state and numbers."""

import copy
import inspect

import nearpeak
import pytest
import torch
from draws import DRAWS, assert_as_exact, standards
from inputs import DTYPES, randn

SHARED = {
    "default": {},
    "eps": {"eps": 1e-4},
    "no_weight": {"elementwise_affine": False},
    "tuple": {"normalized_shape": (67,)},
    "two_dimensions": {"normalized_shape": (5, 67)},
}
LAYERS = {f"{kind} {name}": (kind, options) for kind in ("RMSNorm", "LayerNorm") for name, options in SHARED.items()}
LAYERS["LayerNorm no_bias"] = "LayerNorm", {"bias": False}
DEFAULTS = ["RMSNorm default", "LayerNorm default"]


def both(layer, dtype=torch.float32):
    """nearpeak's and torch's layer with the same random parameters."""
    kind, options = LAYERS[layer]
    options = {"normalized_shape": 67, **options}
    theirs = getattr(torch.nn, kind)(**options, dtype=dtype)
    for seed, parameter in enumerate(theirs.parameters()):
        parameter.data = randn(*parameter.shape, dtype=dtype, seed=seed)
    mine = getattr(nearpeak.nn, kind)(**options, dtype=dtype)
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
def test_a_norm_is_as_exact_as_torchs(serving, dtype, magnitude, layer):
    """Small inputs show which eps the layer chose where it was given none."""
    mine, theirs = both(layer, dtype)
    exact = copy.deepcopy(theirs).double()
    if exact.eps is None:  # RMSNorm's default
        exact.eps = torch.finfo(torch.float32).eps
    draws = [
        (randn(3, 5, 67, dtype=dtype, magnitude=magnitude, seed=i), randn(3, 5, 67, dtype=dtype, seed=i + 50))
        for i in range(DRAWS)
    ]
    results, plains = ([value_and_gradients(each, *draw) for draw in draws] for each in (mine, theirs))
    exacts = [value_and_gradients(exact, x.double(), grad.double()) for x, grad in draws]
    assert_as_exact(results, standards([plains], exacts))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_norm_has_torchs_constructor_state_and_repr(layer):
    mine, theirs = both(layer)
    kind = LAYERS[layer][0]
    assert inspect.signature(getattr(nearpeak.nn, kind)) == inspect.signature(getattr(torch.nn, kind))
    assert isinstance(mine, getattr(torch.nn, kind))
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert repr(mine) == repr(theirs)
    theirs.load_state_dict(mine.state_dict(), strict=True)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_a_norm_is_made_on_any_device_and_in_any_dtype(kind):
    make = getattr(nearpeak.nn, kind)
    layer = make(8, device="meta", dtype=torch.bfloat16)
    assert layer.weight.device.type == "meta"
    assert layer(torch.empty(2, 8, device="meta", dtype=torch.bfloat16)).shape == (2, 8)
    assert make(8).double().weight.dtype is torch.float64


@pytest.mark.parametrize("layer", DEFAULTS)
def test_a_norm_copies_and_pickles(tmp_path, layer):
    layer, _ = both(layer)
    x = randn(3, 67)
    torch.save(layer, tmp_path / "layer.pt")
    for other in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert other.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("layer", DEFAULTS)
def test_a_norm_in_float32_takes_bfloat16_input(serving, layer):
    mine, theirs = both(layer)
    x = randn(3, 67, dtype=torch.bfloat16)
    assert mine(x).dtype is theirs(x).dtype is torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 66), (67, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("layer", [*DEFAULTS, "LayerNorm two_dimensions"])
def test_a_norm_refuses_what_torch_refuses(serving, layer, shape):
    mine, theirs = both(layer)
    with pytest.raises((RuntimeError, ValueError)):
        theirs(torch.ones(shape))
    with pytest.raises(ValueError, match="x must"):
        mine(torch.ones(shape))


@pytest.mark.parametrize("stride", [1, 2], ids=["dense", "every second matrix"])
def test_layer_norm_of_two_dimensions_of_any_layout(serving, stride):
    mine, theirs = both("LayerNorm two_dimensions")
    x = randn(5, 67, 4).permute(2, 0, 1)[::stride]
    torch.testing.assert_close(mine(x), theirs(x))


@pytest.mark.parametrize("layer", DEFAULTS)
def test_a_training_step_moves_both_layers_alike(serving, layer):
    mine, theirs = both(layer)
    for each in (mine, theirs):
        optimiser = torch.optim.AdamW(each.parameters(), lr=0.1)
        for step in range(5):
            optimiser.zero_grad()
            (each(randn(4, 67, seed=step)) - randn(4, 67, seed=step + 9)).square().mean().backward()
            optimiser.step()
    for parameter, expected in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


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
    *mine, activation = inspect.signature(nearpeak.nn.Linear).parameters.values()
    theirs = inspect.signature(torch.nn.Linear).parameters.values()
    assert [(each.name, each.default) for each in mine] == [(each.name, each.default) for each in theirs]
    assert activation.name == "activation"
    mine, theirs = nearpeak.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    assert isinstance(mine, torch.nn.Linear)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert repr(mine) == repr(theirs)
