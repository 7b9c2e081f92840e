"""What a call costs beside its work: every operator on 64 elements, without gradients, against torch.relu."""

import nearpeak
import torch
from nearpeak import norm, rotary
from nearpeak.attention import reference as attention_reference
from nearpeak.linear import reference as linear_reference

from .cases import Case, Operator

ELEMENTS = 64
EPS = 1e-6


def _operator(name, kernel, inputs, ours, reference):
    """An operator whose time is all overhead: no work is counted, so no share of a limit is claimed."""
    operator = Operator(
        name=name,
        shape=f"{ELEMENTS} elements",
        inputs=inputs,
        reference=reference,
        plain=reference,
        work={},
        kernels={"forward": kernel},
    )

    @operator.implementation("nearpeak")
    def _(**inputs):
        arguments = tuple(inputs.values())
        return lambda: ours(*arguments)

    @operator.implementation("torch.relu", baseline=True, same_result=False)
    def _(**inputs):
        first = next(iter(inputs.values()))
        return lambda: torch.relu(first)

    return operator


def _rows(random, *names):
    return {name: random(1, ELEMENTS) for name in names} | {"weight": random(ELEMENTS)}


def _heads(random, *names):
    return {name: random(1, 1, 1, ELEMENTS) for name in names}


def _tables(random):
    return {name: random(1, ELEMENTS // 2) for name in ("cos", "sin")}


OPERATORS = [
    _operator(
        "overhead_rms_norm",
        "rms_norm_inference",
        lambda random: _rows(random, "x"),
        lambda x, weight: nearpeak.rms_norm(x, weight, EPS),
        lambda x, weight: norm.reference.rms_norm(x, weight, EPS, 0.0, False),
    ),
    _operator(
        "overhead_add_rms_norm",
        "add_rms_norm_inference",
        lambda random: _rows(random, "x", "residual"),
        lambda x, residual, weight: nearpeak.rms_norm(x, weight, EPS, residual=residual),
        lambda x, residual, weight: norm.reference.add_rms_norm(x, residual, weight, EPS, 0.0, False),
    ),
    _operator(
        "overhead_layer_norm",
        "layer_norm_inference",
        lambda random: _rows(random, "x") | {"bias": random(ELEMENTS)},
        lambda x, weight, bias: nearpeak.layer_norm(x, weight, bias, EPS),
        lambda x, weight, bias: norm.reference.layer_norm(x, weight, bias, EPS),
    ),
    _operator(
        "overhead_apply_rotary",
        "apply_rotary_inference",
        lambda random: _heads(random, "query", "key") | _tables(random),
        lambda query, key, cos, sin: nearpeak.apply_rotary(query, key, cos, sin),
        lambda query, key, cos, sin: rotary.reference.apply_rotary(
            query, key, cos[None], sin[None], False, False, ELEMENTS
        ),
    ),
    _operator(
        "overhead_linear",
        "linear_inference",
        lambda random: {"x": random(1, ELEMENTS), "weight": random(1, ELEMENTS)},
        lambda x, weight: nearpeak.linear(x, weight),
        lambda x, weight: linear_reference.linear(x, weight, None),
    ),
    _operator(
        "overhead_attention",
        "attention_inference",
        lambda random: _heads(random, "query", "key", "value"),
        lambda query, key, value: nearpeak.attention(query, key, value),
        lambda query, key, value: attention_reference.attention(query, key, value, None, None, ELEMENTS**-0.5, None)[0],
    ),
]

CASES = [Case(operator, {}, torch.float32, quick=True) for operator in OPERATORS]
