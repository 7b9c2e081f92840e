"""Linear layers of Gemma 3 270M, MiniLM, BERT-base and Llama 3 8B, from one token to many; forward and backward.

Float32 of many rows is served by torch's own function behind nearpeak's, so its ratio there is what the door costs.
Where the processor has no units for a 16-bit type, torch's own product of it is a naive loop; "float32" is what its
users do instead, which takes twice the memory.
"""

import math

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak.linear import reference

from .cases import Case, Operator, Work

GEMMA = [(640, 1024), (640, 2048), (2048, 640), (640, 262144)]
MINILM = [(384, 384), (384, 1536), (1536, 384)]
BERT = [(768, 768), (768, 3072), (3072, 768)]
LLAMA = [(4096, 1024), (4096, 4096), (4096, 14336), (14336, 4096)]
ROWS = [1, 4, 16, 128, 512]
BACKWARD_SHAPES = [(640, 2048), (768, 3072)]
BACKWARD_ROWS = [32, 512]

# (rows, in_features, out_features)
QUICK = {
    ("forward", torch.float32): [
        (1, 384, 384), (1, 640, 2048), (16, 640, 2048), (128, 384, 1536), (512, 768, 3072), (1, 4096, 14336),
        (1, 640, 262144),
    ],
    ("forward", torch.bfloat16): [(1, 640, 2048), (4, 768, 3072), (128, 640, 2048), (1, 4096, 14336)],
    ("backward", torch.float32): [(32, 640, 2048)],
}  # fmt: skip

# Multiply-adds of a case in 16 bits at most: the naive loop takes seconds for these.
MOST_NAIVE = 2**30


def _operator(narrow):
    """The layer; in 16 bits it is held against the same layer widened to float32 too."""
    operator = Operator(
        name="linear",
        shape="{rows}x{inputs}x{outputs}",
        inputs=lambda random, rows, inputs, outputs: {
            "x": random(rows, inputs),
            "weight": random(outputs, inputs),
            "bias": random(outputs),
        },
        reference=reference.linear,
        plain=F.linear,
        work={
            "forward": lambda rows, inputs, outputs: Work(
                2 * rows * inputs * outputs, (rows + outputs) * inputs + outputs, rows * outputs
            ),
            "backward": lambda rows, inputs, outputs: Work(
                4 * rows * inputs * outputs,
                rows * outputs + (rows + outputs) * inputs,
                (rows + outputs) * inputs + outputs,
            ),
        },
        kernels={"forward": "linear_inference", "backward": "linear_weight_gradient"},
        differentiable=("x", "weight", "bias"),
    )

    @operator.implementation("nearpeak")
    def _(x, weight, bias):
        return lambda: nearpeak.linear(x, weight, bias)

    @operator.implementation("F.linear", baseline=True)
    def _(x, weight, bias):
        return lambda: F.linear(x, weight, bias)

    if narrow:

        @operator.implementation("float32", baseline=True, same_result=False)
        def _(x, weight, bias):
            wide = [t.float() for t in (x, weight, bias)]
            return lambda: F.linear(*wide)

    return operator


SINGLE, NARROW = _operator(narrow=False), _operator(narrow=True)


def _cases():
    shapes = [("forward", rows, *sizes) for sizes in (*GEMMA, *MINILM, *BERT, *LLAMA) for rows in ROWS]
    shapes += [("backward", rows, *sizes) for sizes in BACKWARD_SHAPES for rows in BACKWARD_ROWS]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for direction, *shape in shapes:
            if dtype is torch.float32 or math.prod(shape) <= MOST_NAIVE:
                yield _case(dtype, direction, tuple(shape))


def _case(dtype, direction, shape):
    parameters = dict(zip(("rows", "inputs", "outputs"), shape, strict=True))
    operator = SINGLE if dtype is torch.float32 else NARROW
    return Case(operator, parameters, dtype, direction, quick=shape in QUICK.get((direction, dtype), ()))


CASES = list(_cases())
