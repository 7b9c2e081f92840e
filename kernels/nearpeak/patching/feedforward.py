"""Activation modules, and feed-forward layers with a gate, recognised by what they compute:

    activation    y = f(x)                           f: GELU (exact, tanh, quick), SiLU, squared ReLU
    gated         y = (f(x Wg^T) * (x Wu^T)) Wd^T    Wg and Wu apart (Llama, Gemma, Qwen), or one matrix (Phi-3, GLM)

A candidate is run once on a small random input, the gated ones with small random products in place of their own, and
served where its result is the formula's. f and the product with `up` are then one pass, rounded once.
"""

import copy
import functools
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from ..feedforward import activation, geglu, reference, reglu, swiglu
from . import probing
from .classes import serving_subclass

# Of these modules' classes the forward takes one tensor, and keeps nothing. ReLU is not served alone: torch's own costs
# less a call, and the same a byte.
HOMES = ("torch.nn.modules.activation", "transformers.activations")
SERVED_ALONE = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu_squared")

GATES = {
    "silu": ("nearpeak.swiglu", swiglu),
    "gelu": ("nearpeak.geglu", geglu),
    "gelu_tanh": ('nearpeak.geglu, approximate="tanh"', functools.partial(geglu, approximate="tanh")),
    "quick_gelu": ('nearpeak.geglu, approximate="sigmoid"', functools.partial(geglu, approximate="sigmoid")),
    "relu": ("nearpeak.reglu", reglu),
}

# What the children of gated layers are called: of gate and up, or of both packed; of the product behind; of f.
FIRST_NAMES = (("gate_proj", "up_proj"), ("gate_up_proj",), ("w1", "w3"))
LAST_NAMES = ("down_proj", "w2")
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")


class Gated(NamedTuple):
    """What a gated layer was found to compute, and what its children are called."""

    activation: str  # the name of f in activations.py
    first: tuple[str, ...]
    last: str
    activation_child: str
    up_first: bool  # of packed ones

    @property
    def detail(self) -> str:
        return GATES[self.activation][0]


@functools.cache
def serving_activation(base: type, name: str) -> type:
    """The subclass of the activation class `base` that nearpeak serves."""

    def forward(self, input):
        return activation(input, name)

    return serving_subclass(base, forward, serving_activation, (base, name))


@functools.cache
def serving_gated(base: type, form: Gated) -> type:
    """The subclass of the gated class `base` that nearpeak serves; the activation module in it is not called."""
    gate = GATES[form.activation][1]
    options = {"up_first": True} if form.up_first else {}

    def forward(self, *positional, **named):
        (x,) = (*positional, *named.values())
        if probing.is_hooked(getattr(self, form.activation_child)):
            return base.forward(self, x)
        return getattr(self, form.last)(gate(*(getattr(self, name)(x) for name in form.first), **options))

    return serving_subclass(base, forward, serving_gated, (base, form))


def activation_of(module: torch.nn.Module) -> str | None:
    """The activation that the module computes, by its name; None if it is none that is served alone."""
    if type(module).__module__ not in HOMES or getattr(module, "inplace", False):
        return None
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        return None
    x = probing.random(64, 1) * 3
    result = probing.run(type(module).forward, module, x)
    return next((name for name in SERVED_ALONE if probing.is_same(result, _value(x, name))), None)


def gated_of(module: torch.nn.Module) -> Gated | None:
    """What the module computes, if that is a feed-forward layer with a gate; else None."""
    children = dict(module.named_children())
    if len(children) not in (3, 4):
        return None
    names = [
        (first, last, child)
        for first in FIRST_NAMES
        for last in LAST_NAMES
        for child in ACTIVATION_NAMES
        if children.keys() == {*first, last, child}
    ]
    return _probe(module, *names[0]) if names else None


def _probe(module, first, last, child) -> Gated | None:
    width, inner, out = 6, 10, 5
    # Of a size at which the activations differ.
    weights = [probing.random(inner * 2 // len(first), width, seed=seed) for seed, _ in enumerate(first)]
    behind = probing.random(out, inner, seed=2)
    stand_in = copy.copy(module)
    products = {name: functools.partial(linear, weight=weight) for name, weight in zip(first, weights, strict=True)}
    own = module._modules[child]
    # Without what hooks on the activation would see of this.
    functions = {last: functools.partial(linear, weight=behind), child: functools.partial(type(own).forward, own)}
    vars(stand_in)["_modules"] = {**products, **functions}
    x = probing.random(16, width, seed=3)
    result = probing.run(type(module).forward, stand_in, x)
    halves = linear(x, torch.cat(weights)).chunk(2, -1)
    for up_first in (False, True) if len(first) == 1 else (False,):
        gate, up = reversed(halves) if up_first else halves
        for name in GATES:
            if probing.is_same(result, linear(_value(gate, name) * up, behind)):
                return Gated(name, first, last, child, up_first)
    return None


def _value(x: torch.Tensor, name: str) -> torch.Tensor:
    return reference.activation(x, reference.NAMES.index(name))
