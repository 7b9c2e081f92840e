"""nearpeak.nn.QuantizedLinear, and nearpeak.quantize for whole models."""

import copy

import nearpeak
import pytest
import torch
from inputs import randn


def linear(inputs=64, outputs=24, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


OPTIONS = [
    {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    for bits in (8, 4)
    for group_size in (32, 64)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_layer_is_the_linear_layer_of_its_dequantised_weight(options, bias):
    module = linear(bias=bias)
    layer = nearpeak.nn.QuantizedLinear.from_linear(module, **options)
    x = randn(2, 5, 64)
    expected = torch.nn.functional.linear(x, layer.weight.dequantize(), module.bias)
    torch.testing.assert_close(layer(x), expected)
    assert layer.bias is module.bias
    assert layer.group_size == options["group_size"]
    torch.testing.assert_close(layer(x), module(x), atol=0.5 if options["bits"] == 4 else 0.05, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_state_dict_is_the_layer(tmp_path, options, bias):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = nearpeak.nn.QuantizedLinear.from_linear(linear(bias=bias), **options)
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    empty = nearpeak.nn.QuantizedLinear(64, 24, bias=bias, **options)
    empty.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    x = randn(3, 64)
    assert torch.equal(empty(x), layer(x))
    assert repr(empty) == repr(layer)


def test_a_state_dict_of_other_bits_is_refused():
    state = nearpeak.nn.QuantizedLinear.from_linear(linear(), bits=4).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        nearpeak.nn.QuantizedLinear(64, 24).load_state_dict(state)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_a_cast_leaves_the_weight_as_it_is(cast):
    layer = nearpeak.nn.QuantizedLinear.from_linear(linear(), symmetric=False)
    before = layer.weight
    after = getattr(copy.deepcopy(layer), cast)()
    assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(after.weight[:3], before[:3], strict=True))
    x = getattr(randn(3, 64), cast)()
    assert after(x).dtype is x.dtype


def test_gradients_reach_x_and_bias():
    layer = nearpeak.nn.QuantizedLinear.from_linear(linear())
    x = randn(3, 64).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((24,), 3.0))
    torch.testing.assert_close(x.grad, layer.weight.dequantize().sum(0).expand_as(x))


def test_a_layer_compiles_and_moves():
    layer = nearpeak.nn.QuantizedLinear.from_linear(linear(), bits=4)
    x = randn(3, 64)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    moved = copy.deepcopy(layer).to("meta")
    assert moved.codes.is_meta
    assert moved.scales.is_meta
    assert moved(x.to("meta")).shape == (3, 24)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("bits must be 8 or 4, not 3", {"bits": 3}),
        ("group_size must be 32, 64 or 128, not 16", {"group_size": 16}),
        ("in_features must be a multiple of group_size 128, not 64", {"group_size": 128}),
    ],
)
def test_bad_options_are_named(message, options):
    with pytest.raises(ValueError, match=message):
        nearpeak.nn.QuantizedLinear(64, 24, **options)


class Model(torch.nn.Module):
    """Linear layers as models have them: nested, shared, tied, ours, and of a width that no group divides."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(11, 64)
        self.block = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64))
        self.ours = nearpeak.nn.Linear(64, 64)
        self.again = self.block[0]
        self.attention = torch.nn.MultiheadAttention(64, 2)
        self.head = torch.nn.Linear(64, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.ours(self.block(self.embedding(ids)))
        return self.head(self.attention(x, x, x)[0] + self.again(x)[..., :64])


IDS = torch.arange(10).view(2, 5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_is_quantised_in_place(bits):
    model = Model().eval()
    with torch.no_grad():
        expected = model(IDS)
        report = nearpeak.quantize(model, bits=bits, group_size=32)
        found = model(IDS)
    assert [layer.name for layer in report.replaced] == ["block.0", "block.2", "ours", "head"]
    assert report.left_alone == ()
    assert model.again is model.block[0]
    assert isinstance(model.head, nearpeak.nn.QuantizedLinear)
    assert isinstance(model.embedding.weight, torch.nn.Parameter)
    assert not model.head.training
    largest = {8: 0.01, 4: 0.12}[bits]
    assert all(0 < layer.error < largest and layer.bytes_after < layer.bytes_before for layer in report.replaced)
    assert (found - expected).norm() < 2 * largest * expected.norm()


def test_samples_make_results_err_less():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(11, 64), torch.nn.Linear(64, 96))
    # As in language models, some features are much larger than others.
    model[0].weight.data.mul_(torch.where(torch.arange(64) % 8 == 0, 10.0, 1.0))
    plain, informed = copy.deepcopy(model), copy.deepcopy(model)
    nearpeak.quantize(plain, bits=4, group_size=32)
    with torch.no_grad():
        report = nearpeak.quantize(informed, bits=4, group_size=32, samples=[IDS, (IDS,), {"input": IDS[:1]}])
        expected = model(IDS)
        errors = [(each(IDS) - expected).norm() for each in (plain, informed)]
    assert errors[1] < 0.9 * errors[0]
    assert all(0 < layer.error < 0.12 for layer in report.replaced)
    assert not any(module._forward_pre_hooks for module in informed.modules())


def test_a_layer_that_no_sample_reaches_is_rounded_as_without():
    model = torch.nn.ModuleDict({"used": linear(), "unused": linear()})
    model.forward = lambda x: model["used"](input=x)
    expected = nearpeak.quantize_weight(model["unused"].weight, 4, 32)
    nearpeak.quantize(model, bits=4, group_size=32, samples=[randn(3, 64), randn(0, 64)])
    assert torch.equal(model["unused"].codes, expected.codes)
    assert not torch.equal(model["used"].codes, expected.codes)


def test_a_sample_that_the_model_refuses_changes_nothing():
    model = Model()
    with pytest.raises(TypeError):
        nearpeak.quantize(model, samples=[{"other": IDS}])
    assert type(model.head) is torch.nn.Linear
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_left_alone_is_said():
    model = Model()
    with torch.device("meta"):
        model.extra = torch.nn.Linear(64, 64)
    report = nearpeak.quantize(model, group_size=64, skip=["head", "block.0"])
    assert [layer.name for layer in report.replaced] == ["ours"]
    assert dict(report.left_alone) == {
        "block.0": "named in skip",
        "block.2": "group_size 64 does not divide its 96 in_features",
        "head": "named in skip",
        "extra": "its weight is on meta, without numbers",
    }
    assert type(model.head) is torch.nn.Linear
    lines = str(report).splitlines()
    assert lines[0] == "nearpeak.quantize"
    assert lines[2].split() == ["ours", f"{report.replaced[0].error:.2%}", "0.02", "0.00"]
    assert lines[3].split("  ")[-1] == "left alone: named in skip"


def test_quantised_models_are_saved_and_loaded(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    first, second = Model().eval(), Model().eval()
    nearpeak.quantize(first, bits=4, group_size=32)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    nearpeak.quantize(second, bits=4, group_size=32)
    safetensors.save_model(first, str(tmp_path / "model.safetensors"))
    safetensors.load_model(second, str(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(second(IDS), first(IDS))


def test_a_second_call_finds_nothing():
    model = Model()
    nearpeak.quantize(model, group_size=32)
    assert nearpeak.quantize(model, group_size=32) == nearpeak.QuantizationReport((), ())


BAD = {
    "model": (TypeError, "model must", lambda: nearpeak.quantize([torch.nn.Linear(64, 64)])),
    "bits": (ValueError, "bits must", lambda: nearpeak.quantize(Model(), bits=5)),
    "group_size": (ValueError, "group_size must", lambda: nearpeak.quantize(Model(), group_size=0)),
    "skip_string": (TypeError, "skip must", lambda: nearpeak.quantize(Model(), skip="head")),
    "skip_unknown": (ValueError, "skip names no linear layer", lambda: nearpeak.quantize(Model(), skip=["tail"])),
    "weight_nan": (ValueError, "weight must be finite", lambda: nearpeak.quantize(_with_nan())),
}


def _with_nan():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    model[1].weight.data[3, 3] = torch.nan
    return model


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(bad):
    error, message, run = BAD[bad]
    with pytest.raises(error, match=message):
        run()


def test_an_error_leaves_the_model_whole():
    model = _with_nan()
    with pytest.raises(ValueError, match="finite"):
        nearpeak.quantize(model)
    assert [type(module) for module in model] == [torch.nn.Linear] * 2
