"""Feed-forward activations: SwiGLU of Llama's width, GeGLU of Gemma's, GELU of BERT's; forward and backward."""

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak.feedforward import reference

from .cases import Case, Operator, Work, compiled

LLAMA, GEMMA, BERT = 14336, 2048, 3072
ROWS = [1, 16, 512]


def _operator(name, kind, ours, eager, gated, kernel):
    """An operator over (rows, width); gated ones read a second input."""
    inputs_read = 2 if gated else 1
    plain_kernel = reference.gated_activation if gated else reference.activation
    number = reference.NAMES.index(kind)
    names = ("gate", "up") if gated else ("x",)
    operator = Operator(
        name=name,
        shape="{rows}x{width}",
        inputs=lambda random, rows, width: {each: random(rows, width) for each in names},
        reference=lambda **inputs: plain_kernel(*inputs.values(), number),
        plain=lambda **inputs: eager(*inputs.values()),
        work={
            # An exponential or its like costs some ten operations.
            "forward": lambda rows, width: Work(12 * rows * width, inputs_read * rows * width, rows * width),
            "backward": lambda rows, width: Work(
                20 * rows * width, (inputs_read + 1) * rows * width, inputs_read * rows * width
            ),
        },
        kernels={"forward": f"{kernel}_inference", "backward": f"{kernel}_backward"},
        differentiable=names,
    )

    @operator.implementation("nearpeak")
    def _(**inputs):
        arguments = tuple(inputs.values())
        return lambda: ours(*arguments)

    @operator.implementation("eager", baseline=True)
    def _(**inputs):
        arguments = tuple(inputs.values())
        return lambda: eager(*arguments)

    @operator.implementation("torch.compile", baseline=True, compiled=True)
    def _(**inputs):
        arguments, function = tuple(inputs.values()), compiled(eager)
        return lambda: function(*arguments)

    return operator


OPERATORS = {
    "swiglu": _operator(
        "swiglu", "silu", nearpeak.swiglu, lambda gate, up: F.silu(gate) * up, True, "gated_activation"
    ),
    "geglu_tanh": _operator(
        "geglu_tanh",
        "gelu_tanh",
        lambda gate, up: nearpeak.geglu(gate, up, "tanh"),
        lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        True,
        "gated_activation",
    ),
    "gelu": _operator("gelu", "gelu", lambda x: nearpeak.activation(x, "gelu"), F.gelu, False, "activation"),
    # No case of the suite has these: gelu_tanh and relu are those of GPT-2's and T5's shapes, all are checked.
    "gelu_tanh": _operator(
        "gelu_tanh",
        "gelu_tanh",
        lambda x: nearpeak.activation(x, "gelu_tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
        False,
        "activation",
    ),
    "relu": _operator("relu", "relu", lambda x: nearpeak.activation(x, "relu"), F.relu, False, "activation"),
    "silu": _operator("silu", "silu", lambda x: nearpeak.activation(x, "silu"), F.silu, False, "activation"),
    "quick_gelu": _operator(
        "quick_gelu",
        "quick_gelu",
        lambda x: nearpeak.activation(x, "quick_gelu"),
        lambda x: x * torch.sigmoid(1.702 * x),
        False,
        "activation",
    ),
    "relu_squared": _operator(
        "relu_squared",
        "relu_squared",
        lambda x: nearpeak.activation(x, "relu_squared"),
        lambda x: F.relu(x).square(),
        False,
        "activation",
    ),
    "geglu": _operator("geglu", "gelu", nearpeak.geglu, lambda gate, up: F.gelu(gate) * up, True, "gated_activation"),
    "reglu": _operator("reglu", "relu", nearpeak.reglu, lambda gate, up: F.relu(gate) * up, True, "gated_activation"),
}
WIDTHS = {"swiglu": LLAMA, "geglu_tanh": GEMMA, "gelu": BERT}


def _cases():
    for name, width in WIDTHS.items():
        operator = OPERATORS[name]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows in ROWS:
                quick = (rows, dtype) in ((1, torch.float32), (512, torch.float32), (512, torch.bfloat16))
                yield Case(operator, {"rows": rows, "width": width}, dtype, quick=quick)
            quick = width == LLAMA and dtype is torch.float32
            yield Case(operator, {"rows": 512, "width": width}, dtype, "backward", quick=quick)


CASES = list(_cases())
