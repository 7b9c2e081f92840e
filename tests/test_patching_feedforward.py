"""Activation modules and gated feed-forward layers that `patch` recognises by what they compute."""

import copy
import pickle

import nearpeak
import pytest
import torch
from nearpeak.patching import feedforward
from tiny_models import Operators, exactly, judge, transformers

ACTIVATIONS = transformers.activations


class ClippedSilu(torch.nn.SiLU):
    __module__ = torch.nn.SiLU.__module__

    def forward(self, input):
        return super().forward(input).clamp(max=1.0)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (torch.nn.GELU(), "gelu"),
        (torch.nn.GELU(approximate="tanh"), "gelu_tanh"),
        (torch.nn.SiLU(), "silu"),
        (ACTIVATIONS.GELUActivation(), "gelu"),
        (ACTIVATIONS.GELUActivation(use_gelu_python=True), "gelu"),
        (ACTIVATIONS.GELUTanh(), "gelu_tanh"),
        (ACTIVATIONS.NewGELUActivation(), "gelu_tanh"),
        (ACTIVATIONS.FastGELUActivation(), "gelu_tanh"),
        (ACTIVATIONS.QuickGELUActivation(), "quick_gelu"),
        (ACTIVATIONS.SiLUActivation(), "silu"),
        (ACTIVATIONS.ReLUSquaredActivation(), "relu_squared"),
        (torch.nn.ReLU(), None),
        (torch.nn.SiLU(inplace=True), None),
        (torch.nn.RReLU(), None),
        (torch.nn.PReLU(), None),
        (torch.nn.Softmax(-1), None),
        (torch.nn.GLU(), None),
        (torch.nn.MultiheadAttention(8, 2), None),
        (torch.nn.Identity(), None),
        (ACTIVATIONS.ClippedGELUActivation(-10, 10), None),
        (ClippedSilu(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else str(value),
)
def test_activations_are_recognised_by_what_they_compute(module, name, serving):
    generator = torch.random.get_rng_state()
    assert feedforward.activation_of(module) == name
    assert torch.equal(torch.random.get_rng_state(), generator)
    if name is None:
        return
    model, x = torch.nn.Sequential(module), 3 * torch.randn(5, 33)
    plain, exact = model(x), exactly(model, lambda model: model(x.double()))
    with nearpeak.patched(model) as report:
        assert report.count("feedforward") == 1
        judge(model(x), plain, exact)
    assert type(module).forward is not feedforward.serving_activation(type(module), name).forward


class Apart(torch.nn.Module):
    def __init__(self, act, names=("gate_proj", "up_proj", "down_proj", "act_fn"), bias=False):
        super().__init__()
        gate, up, down, child = names
        setattr(self, gate, torch.nn.Linear(12, 20, bias))
        setattr(self, up, torch.nn.Linear(12, 20, bias))
        setattr(self, down, torch.nn.Linear(20, 12, bias))
        setattr(self, child, act)
        self.names = names

    def forward(self, x):
        gate, up, down, act = (getattr(self, name) for name in self.names)
        return down(act(gate(x)) * up(x))


class Packed(torch.nn.Module):
    def __init__(self, act, up_first=False):
        super().__init__()
        self.gate_up_proj, self.down_proj = torch.nn.Linear(12, 40), torch.nn.Linear(20, 12)
        self.activation_fn, self.up_first = act, up_first

    def forward(self, hidden_states):
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        if self.up_first:
            gate, up = up, gate
        return self.down_proj(up * self.activation_fn(gate))


class Swapped(Apart):
    """Looks the same, and lets `up` be the gate's activation's factor twice."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) ** 2)


SIZES = dict(hidden_size=12, intermediate_size=20, num_attention_heads=2, num_key_value_heads=2)
LLAMA = transformers.LlamaConfig(**SIZES)
GATED = {
    "silu": (Apart(torch.nn.SiLU()), "nearpeak.swiglu"),
    "with biases": (Apart(torch.nn.SiLU(), bias=True), "nearpeak.swiglu"),
    "other names": (Apart(torch.nn.SiLU(), ("w1", "w3", "w2", "act")), "nearpeak.swiglu"),
    "gelu": (Apart(torch.nn.GELU()), "nearpeak.geglu"),
    "quick": (Apart(ACTIVATIONS.QuickGELUActivation()), 'nearpeak.geglu, approximate="sigmoid"'),
    "relu": (Apart(torch.nn.ReLU()), "nearpeak.reglu"),
    "packed": (Packed(torch.nn.SiLU()), "nearpeak.swiglu"),
    "packed, up first": (Packed(torch.nn.GELU("tanh"), up_first=True), 'nearpeak.geglu, approximate="tanh"'),
    "Llama": (transformers.models.llama.modeling_llama.LlamaMLP(LLAMA), "nearpeak.swiglu"),
    "Gemma": (
        transformers.models.gemma3.modeling_gemma3.Gemma3MLP(transformers.Gemma3TextConfig(**SIZES)),
        'nearpeak.geglu, approximate="tanh"',
    ),
    "Phi-3": (
        transformers.models.phi3.modeling_phi3.Phi3MLP(transformers.Phi3Config(**SIZES, pad_token_id=0)),
        "nearpeak.swiglu",
    ),
    "another activation": (Apart(torch.nn.Mish()), None),
    "another formula": (Swapped(torch.nn.SiLU()), None),
    "no gate": (torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.SiLU(), torch.nn.Linear(20, 12)), None),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_layers_are_recognised_by_what_they_compute(name, serving):
    module, detail = GATED[name]
    gated = feedforward.gated_of(module)
    assert (gated and gated.detail) == detail
    if detail is None:
        return
    model, x = copy.deepcopy(module).requires_grad_(False), torch.randn(2, 7, 12)
    plain, exact = model(x), exactly(model, lambda model: model(x.double()))
    with nearpeak.patched(model), Operators() as operators:
        judge(model(x), plain, exact)
        judge(pickle.loads(pickle.dumps(model))(x), plain, exact)
    gates = sum(operators.count(f"nearpeak::{each}") for each in ("gated_activation", "packed_gated_activation"))
    assert gates == (2 if serving != "reference" else 0)
    assert type(model) is type(module)


def test_hooks_on_the_activation_are_called():
    model, seen = Apart(torch.nn.SiLU()), []
    model.act_fn.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with nearpeak.patched(model):
        model(torch.randn(3, 12))
    assert seen == [(3, 20)]


def test_gradients_flow_through_a_gated_layer():
    model, x = Apart(torch.nn.SiLU()), torch.randn(3, 12, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    with nearpeak.patched(model):
        found = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    torch.testing.assert_close(found, expected)
