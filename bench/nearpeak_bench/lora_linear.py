"""Linear layers with a low-rank update of rank 16 (LoRA), against the separate calls."""

import math

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak.linear import reference

from .cases import Case, Operator, Work, compiled
from .linear import MOST_NAIVE

RANK, SCALE = 16, 2.0
LAYERS = [(640, 2048), (2048, 640), (4096, 4096)]
ROWS = [1, 16, 128, 512]
QUICK = [(1, 4096), (16, 640), (512, 640)]


def _inputs(random, rows, inputs, outputs):
    weight, lora_a, lora_b = random(outputs, inputs), random(RANK, inputs), random(outputs, RANK)
    return {"x": random(rows, inputs), "weight": weight, "lora_a": lora_a, "lora_b": lora_b}


def _separately(x, weight, lora_a, lora_b):
    """As PEFT writes it."""
    return F.linear(x, weight) + F.linear(F.linear(x, lora_a), lora_b) * SCALE


def _work(rows, inputs, outputs):
    weights = inputs * outputs + RANK * (inputs + outputs)
    return Work(2 * rows * weights, rows * inputs + weights, rows * outputs)


def _training_work(rows, inputs, outputs):
    weights = inputs * outputs + RANK * (inputs + outputs)
    updates = RANK * (inputs + outputs)
    return Work(
        2 * rows * (2 * weights + updates), 2 * weights + rows * (2 * inputs + outputs),
        rows * (inputs + outputs) + updates,
    )  # fmt: skip


OPERATOR = Operator(
    name="lora_linear",
    shape="{rows}x{inputs}x{outputs}",
    inputs=_inputs,
    reference=lambda x, weight, lora_a, lora_b: reference.lora_linear(
        x, weight, lora_a, lora_b, SCALE, None, None, None, False
    )[0],
    plain=_separately,
    work={"forward": _work, "training": _training_work},
    kernels={"forward": "lora_linear_inference", "training": "lora_linear"},
    differentiable=("x", "lora_a", "lora_b"),
)


@OPERATOR.implementation("nearpeak")
def _(x, weight, lora_a, lora_b):
    return lambda: nearpeak.lora_linear(x, weight, lora_a, lora_b, SCALE)


@OPERATOR.implementation("separate calls", baseline=True)
def _(**inputs):
    return lambda: _separately(**inputs)


@OPERATOR.implementation("torch.compile", baseline=True, compiled=True)
def _(**inputs):
    function = compiled(_separately)
    return lambda: function(**inputs)


def _cases():
    for dtype in (torch.float32, torch.bfloat16):
        for inputs, outputs in LAYERS:
            for rows in ROWS:
                if dtype is torch.float32 or math.prod((rows, inputs, outputs)) <= MOST_NAIVE:
                    shape = {"rows": rows, "inputs": inputs, "outputs": outputs}
                    quick = dtype is torch.float32 and (rows, inputs) in QUICK
                    yield Case(OPERATOR, shape, dtype, quick=quick)
                    if rows == 128:
                        yield Case(OPERATOR, shape, dtype, "training")


CASES = list(_cases())
