"""Linear layers with what follows them in one call: BERT's feed-forward layers, GELU after one, a sum after the other.

The baseline is the same in separate calls. Float32 of many rows is multiplied by torch behind nearpeak's door too,
where only the activation is ours.
"""

import math

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak.activations import KINDS
from nearpeak.linear import reference

from .cases import Case, Operator, Work, compiled
from .linear import MOST_NAIVE

# (in_features, out_features, activation, whether a residual is added)
LAYERS = [(768, 3072, "gelu", False), (3072, 768, None, True)]
ROWS = [1, 16, 128, 512]
QUICK = [(1, 768), (16, 768), (512, 768), (16, 3072)]


def _inputs(random, rows, inputs, outputs, activation, residual):
    tensors = {"x": random(rows, inputs), "weight": random(outputs, inputs), "bias": random(outputs)}
    return tensors | {"residual": random(rows, outputs) if residual else None, "activation": activation}


def _separately(x, weight, bias, residual, activation):
    y = F.linear(x, weight, bias)
    y = y if activation is None else F.gelu(y)
    return y if residual is None else y + residual


def _reference(x, weight, bias, residual, activation):
    kind = None if activation is None else KINDS[activation]
    return reference.linear_epilogue(x, weight, bias, residual, kind, False)[0]


OPERATOR = Operator(
    name="linear_epilogue",
    shape="{rows}x{inputs}x{outputs} {activation}",
    inputs=_inputs,
    reference=_reference,
    plain=_separately,
    work={
        "forward": lambda rows, inputs, outputs, activation, residual: Work(
            2 * rows * inputs * outputs, (rows + outputs) * inputs + outputs + residual * rows * outputs, rows * outputs
        )
    },
    kernels={"forward": "linear_epilogue_inference", "training": "linear_epilogue"},
    differentiable=("x", "weight", "bias"),
)


@OPERATOR.implementation("nearpeak")
def _(**inputs):
    return lambda: nearpeak.linear(**inputs)


@OPERATOR.implementation("separate calls", baseline=True)
def _(**inputs):
    return lambda: _separately(**inputs)


@OPERATOR.implementation("torch.compile", baseline=True, compiled=True)
def _(**inputs):
    function = compiled(_separately)
    return lambda: function(**inputs)


def _cases():
    for dtype in (torch.float32, torch.bfloat16):
        for inputs, outputs, activation, residual in LAYERS:
            for rows in ROWS:
                if dtype is torch.float32 or math.prod((rows, inputs, outputs)) <= MOST_NAIVE:
                    parameters = {"rows": rows, "inputs": inputs, "outputs": outputs}
                    parameters |= {"activation": activation, "residual": residual}
                    yield Case(OPERATOR, parameters, dtype, quick=(rows, inputs) in QUICK)


CASES = list(_cases())
