"""Small models of the real architectures with random weights, and how their patched selves are judged."""

import copy

import nearpeak
import pytest
import torch
from exactness import MEAN_RATIO, errors, unit_in_last_place
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
WINDOW = 5


def _llama(**options):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64, **options)
    return transformers.LlamaForCausalLM(config)


def _gemma3(**options):
    config = transformers.Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=64,
        **options,
    )
    return transformers.Gemma3ForCausalLM(config)


def _bert(**options):
    options = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, **options}
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, max_position_embeddings=64, **options))


ARCHITECTURES = {"llama": _llama, "gemma3": _gemma3, "bert": _bert}
DECODERS = ("llama", "gemma3")
REPLACED = {
    "llama": {"linear": 15, "norm": 5, "feedforward": 4, "rotary": 2, "attention": 2, "embedding": 1},
    "gemma3": {"linear": 15, "norm": 13, "feedforward": 4, "rotary": 2, "attention": 2, "embedding": 1},
    "bert": {"linear": 14, "norm": 6, "feedforward": 3, "rotary": 0, "attention": 2, "embedding": 4},
}


def make(name, **options):
    """A small model in which every parameter matters (norms' weights start as constants)."""
    model = ARCHITECTURES[name](**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_ids(batch=2, length=13):
    return torch.randint(3, SIZES["vocab_size"], (batch, length))


def logits_of(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def exactly(model, run):
    """What `run` gives for the model in float64.

    The double model is patched, with the float64 definitions, since Hugging Face's norms and eager softmax round to
    float32 even there. `judge` makes sure that it is still the same function.
    """
    double = copy.deepcopy(model).double()
    with nearpeak.use_backend("reference"), nearpeak.patched(double):
        return run(double)


def judge(served, plain, exact, name="logits"):
    """Assert the rule of exactness.py for mean errors.

    Not for maxima: the largest of a few hundred errors, each of which went through a whole network, is chance. The
    kernels' own tests hold those.
    """
    assert (plain - exact).norm() < 1e-4 * exact.norm(), f"{name}: the float64 model is another function"
    (mean, _), (plain_mean, _) = errors(served, exact), errors(plain, exact)
    allowed = MEAN_RATIO * plain_mean + unit_in_last_place(exact, served.dtype)
    assert mean <= allowed, f"{name}: mean error {mean:.3e}, unpatched model {plain_mean:.3e}, allowed {allowed:.3e}"


class Operators(TorchDispatchMode):
    """Names of the operators that run inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))

    def count(self, part):
        return sum(part in name for name in self.names)
