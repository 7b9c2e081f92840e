"""What `patch` replaces and leaves alone, that nothing else changes, and that it is undone exactly."""

import copy
import pickle
import subprocess
import sys

import nearpeak
import pytest
import torch
from exactness import assert_as_exact_as_plain
from nearpeak.linear.operator import FAST_IN_TORCH
from nearpeak.patching.model import RECORD
from tiny_models import (
    ARCHITECTURES,
    DECODERS,
    REPLACED,
    SIZES,
    Operators,
    exactly,
    judge,
    logits_of,
    make,
    random_ids,
    transformers,
)


def _snapshot(model):
    """Class, attributes in order, and attributes of configurations, of every module."""
    state = {}
    for name, module in model.named_modules():
        config = vars(module).get("config")
        held = [(key, id(value)) for key, value in vars(module).items()]
        state[name] = (type(module), held, config and list(vars(config).items()))
    return state


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_report_counts_what_was_replaced(name):
    model = make(name)
    report = nearpeak.patch(model)
    assert {kind: report.count(kind) for kind in REPLACED[name]} == REPLACED[name]
    left = [(entry.layer, entry.detail) for entry in report.left_alone]
    assert left == ([("BertLMPredictionHead", "not served yet")] if name == "bert" else [])
    assert nearpeak.patch(model) is report
    assert "nearpeak.attention" in str(report)
    assert report.__rich__().row_count == len(report.replaced) + len(report.left_alone)


def test_our_own_modules_are_left_as_they_are():
    layers = [nearpeak.nn.Linear(64, 64), nearpeak.nn.RMSNorm(64), nearpeak.nn.QuantizedLinear(64, 64)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 64))
    report = nearpeak.patch(model)
    assert [type(layer) for layer in model[:3]] == [
        nearpeak.nn.Linear,
        nearpeak.nn.RMSNorm,
        nearpeak.nn.QuantizedLinear,
    ]
    assert {entry.layer: entry.detail for entry in report.left_alone} == dict.fromkeys(
        ("Linear", "RMSNorm", "QuantizedLinear"), "served by nearpeak already"
    )
    assert report.count("linear") == 1


def test_berts_layer_norms_are_served_and_share_their_parameters():
    model = make("bert")
    norm = model.bert.encoder.layer[0].output.LayerNorm
    parameters = [p.data_ptr() for p in norm.parameters()]
    with nearpeak.patched(model) as report:
        assert any(entry.detail == "nearpeak.layer_norm" and entry.count == 6 for entry in report.replaced)
        assert [p.data_ptr() for p in norm.parameters()] == parameters
        assert "nearpeak::layer_norm_inference" in _explained(norm, torch.randn(2, 3, 32))
    assert type(norm) is torch.nn.LayerNorm


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unpatch_restores_every_module_and_configuration_exactly(name):
    model = make(name)
    before = _snapshot(model)
    nearpeak.patch(model)
    assert _snapshot(model) != before
    nearpeak.unpatch(model)
    assert _snapshot(model) == before


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_patched_model_keeps_weights_names_classes_and_hooks(name):
    model = make(name)
    parameters = {key: value.data_ptr() for key, value in model.state_dict().items()}
    modules = {key: (id(module), type(module)) for key, module in model.named_modules()}
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: seen.append(id(module)))
    logits_of(model, random_ids())
    plain = seen.copy()
    seen.clear()
    with nearpeak.patched(model):
        logits_of(model, random_ids())
        assert {key: value.data_ptr() for key, value in model.state_dict().items()} == parameters
        for key, module in model.named_modules():
            assert id(module) == modules[key][0]
            assert isinstance(module, modules[key][1])
            assert repr(type(module)) == repr(modules[key][1])
    assert seen == plain


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_models_are_untouched_even_with_the_same_configuration_object(name):
    model = make(name)
    other = type(model)(model.config).eval()
    before, ids = _snapshot(other), random_ids()
    logits = logits_of(other, ids)
    with nearpeak.patched(model):
        assert _snapshot(other) == before
        with Operators() as operators:
            assert torch.equal(logits_of(other, ids), logits)
        assert operators.count("nearpeak::") == 0


def test_a_model_that_leaves_its_window_to_the_mask_keeps_its_attention():
    config = transformers.Qwen2MoeConfig(
        **SIZES, num_key_value_heads=2, num_experts=2, use_sliding_window=True, sliding_window=4, max_window_layers=0
    )
    report = nearpeak.patch(transformers.Qwen2MoeForCausalLM(config))
    assert report.count("attention") == 0
    assert any("sliding window" in entry.detail for entry in report.left_alone)
    assert report.count("norm") == 5


def test_the_name_can_be_asked_for_without_patching():
    nearpeak.patching.register()
    model = make("llama")
    asked = transformers.LlamaForCausalLM._from_config(model.config, attn_implementation="nearpeak").eval()
    asked.load_state_dict(model.state_dict())
    ids = random_ids()
    torch.testing.assert_close(logits_of(asked, ids), logits_of(model, ids))
    assert "nearpeak::attention_inference" in _explained(asked, ids)


def _explained(model, ids):
    with torch.no_grad():
        return nearpeak.explain(model, ids)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_a_copy_of_a_patched_model_is_patched_and_can_be_unpatched_alone(copied):
    model, ids = make("gemma3"), random_ids()
    plain = logits_of(model, ids)
    nearpeak.patch(model)
    served = logits_of(model, ids)
    twin = copied(model)
    assert torch.equal(logits_of(twin, ids), served)
    nearpeak.unpatch(twin)
    assert torch.equal(logits_of(twin, ids), plain)
    assert torch.equal(logits_of(model, ids), served)
    assert "nearpeak::attention" in _explained(model, ids)


def test_what_the_user_sets_while_patched_stays():
    model = make("llama")
    config = model.config
    with nearpeak.patched(model):
        model.config.use_cache = False
    assert model.config is config
    assert config.use_cache is False
    assert config._attn_implementation == "sdpa"


def test_patched_leaves_a_model_patched_that_was():
    model = make("llama")
    nearpeak.patch(model)
    with nearpeak.patched(model):
        pass
    assert RECORD in vars(model)
    nearpeak.unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        nearpeak.unpatch(model)


@pytest.mark.parametrize("order", [1, -1], ids=["inner first", "outer first"])
def test_a_part_and_the_whole_are_patched_and_unpatched_each_for_itself(order):
    model, ids = make("gemma3"), random_ids()
    before, plain = _snapshot(model), logits_of(model, ids)
    parts = [model.model.layers[0], model.model, model]
    norms = [nearpeak.patch(part).count("norm") for part in parts]
    assert norms == [6, REPLACED["gemma3"]["norm"] - 6, 0]
    for part in parts[::order]:
        nearpeak.unpatch(part)
        torch.testing.assert_close(logits_of(model, ids), plain)
    assert _snapshot(model) == before


def test_unpatch_refuses_a_module_whose_class_was_changed_since():
    model = make("llama")
    nearpeak.patch(model)
    norm = model.model.norm
    served = type(norm)
    norm.__class__ = type("FSDPLlamaRMSNorm", (served,), {})
    with pytest.raises(RuntimeError, match="FSDPLlamaRMSNorm"):
        nearpeak.unpatch(model)
    norm.__class__ = served
    nearpeak.unpatch(model)


def test_nothing_to_replace_is_reported():
    model = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1), torch.nn.ReLU())
    report = nearpeak.patch(model)
    assert report.replaced == ()
    assert "nothing" in str(report)
    with pytest.raises(ValueError, match="not patched"):
        nearpeak.unpatch(model)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        nearpeak.patch("model")


class _ScaledRMSNorm(torch.nn.Module):
    """Looks like RMSNorm, and divides by the mean magnitude."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x):
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.mark.parametrize(
    ("norm", "served"),
    [
        (torch.nn.RMSNorm(12), True),
        (torch.nn.RMSNorm(12, eps=1e-3), True),
        (torch.nn.RMSNorm(12, elementwise_affine=False), True),
        (torch.nn.RMSNorm((3, 12)), False),
        (torch.nn.LayerNorm(12), True),
        (torch.nn.LayerNorm(12, eps=1e-3, bias=False), True),
        (torch.nn.LayerNorm(12, elementwise_affine=False), True),
        (torch.nn.LayerNorm((3, 12)), False),
        (torch.nn.GroupNorm(1, 3), False),
        (torch.nn.GroupNorm(1, 3, affine=False), False),
        (torch.nn.InstanceNorm1d(3), False),
        (torch.nn.BatchNorm1d(3).eval(), False),
        (_ScaledRMSNorm(12), False),
        (transformers.models.t5.modeling_t5.T5LayerNorm(12), True),
        (transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm(12), True),
        (transformers.models.cohere.modeling_cohere.CohereLayerNorm(12), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_norms_are_recognised_by_what_they_compute(norm, served, serving):
    model, x = torch.nn.Sequential(norm), torch.randn(2, 3, 12)
    model.requires_grad_(False)
    plain, exact = model(x), exactly(model, lambda model: model(x.double()))
    with nearpeak.patched(model) as report:
        assert report.count("norm") == served
        judge(model(x), plain, exact)


@pytest.mark.parametrize("name", DECODERS)
def test_float32_norm_weights_give_bfloat16_inputs_the_dtype_that_the_class_gives(name):
    norm = make(name).model.norm
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    expected = norm(x)
    with nearpeak.patched(norm):
        assert norm(x).dtype is expected.dtype


class _DoubledLinear(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "detail"),
    [
        (
            torch.nn.Linear(5, 3),
            "up to 16 rows, torch's own for more" if torch.float32 in FAST_IN_TORCH else "nearpeak.linear",
        ),
        (torch.nn.Linear(5, 3, bias=False, dtype=torch.bfloat16), "nearpeak.linear"),
        (torch.nn.Linear(5, 3, dtype=torch.float16), "nearpeak.linear"),
        (torch.nn.Linear(5, 3, dtype=torch.float64), None),
        (torch.nn.Linear(5, 3, device="meta"), None),
        (torch.nn.modules.linear.NonDynamicallyQuantizableLinear(5, 3), None),
        (_DoubledLinear(5, 3), None),
    ],
    ids=["float32", "bfloat16", "float16", "float64", "meta", "attention's", "subclass"],
)
def test_linear_layers_are_served_where_kernels_are_worth_it(layer, detail):
    model = torch.nn.Sequential(layer)
    with nearpeak.patched(model) as report:
        assert report.count("linear") == (detail is not None)
        if detail is None:
            assert report.left_alone[0].detail
        else:
            assert detail in report.replaced[0].detail
            assert "nearpeak::linear" in nearpeak.explain(model, torch.ones(2, 5, dtype=layer.weight.dtype))


@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_patched_linear_layers_are_as_exact_as_torchs(serving, dtype, rows):
    model = torch.nn.Sequential(torch.nn.Linear(70, 50), torch.nn.Linear(50, 90, bias=False)).to(dtype)
    model.requires_grad_(False)
    x = torch.randn(rows, 70, dtype=dtype)
    plain, exact = model(x), copy.deepcopy(model).double()(x.double())
    with nearpeak.patched(model) as report:
        assert report.count("linear") == 2
        assert_as_exact_as_plain(model(x), plain, exact)


def test_an_instance_with_its_own_forward_is_left_alone():
    norm = torch.nn.RMSNorm(8)
    norm.forward = lambda x: x
    report = nearpeak.patch(torch.nn.Sequential(norm))
    assert report.replaced == ()
    assert "on the instance" in report.left_alone[0].detail


# Whether neighbours make a pair.
ROTARIES = {
    "Cohere": (True, lambda: transformers.CohereConfig(**SIZES, num_key_value_heads=2)),
    "Glm": (True, lambda: transformers.GlmConfig(**SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0)),
    "GPTNeoX": (False, lambda: transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.5)),
    "Phi": (False, lambda: transformers.PhiConfig(**SIZES, partial_rotary_factor=0.5)),
}


@pytest.mark.parametrize("name", ROTARIES)
def test_other_forms_of_rotary_are_recognised(name, serving):
    interleaved, config = ROTARIES[name]
    model, ids = getattr(transformers, f"{name}ForCausalLM")(config()).eval(), random_ids()
    plain, exact = logits_of(model, ids), exactly(model, lambda model: logits_of(model, ids))
    with nearpeak.patched(model) as report:
        (entry,) = [entry for entry in report.replaced if entry.kind == "rotary"]
        assert ("interleaved" in entry.detail) == interleaved
        with Operators() as operators:
            judge(logits_of(model, ids), plain, exact)
        assert operators.count("nearpeak::apply_rotary") == (serving != "reference") * SIZES["num_hidden_layers"]


def test_importing_nearpeak_leaves_transformers_unimported():
    code = "import nearpeak, sys, torch; nearpeak.patch(torch.nn.RMSNorm(4)); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
