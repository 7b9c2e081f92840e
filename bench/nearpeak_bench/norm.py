"""RMSNorm: fresh output, reused output, fused residual addition; forward and backward. LayerNorm: see layer_norm.py.

The width-4096 rows are bound by memory; the small ones, a single token of a small model, by the call itself.
"""

import itertools

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak.norm import reference

from .cases import Case, Operator, Work, compiled

EPS = 1e-6
SHAPES = [(2048, 4096), (1, 64), (1, 640), (16, 768), (1, 4096), (512, 640), (128, 8192), (64, 16384)]
BACKWARD_SHAPES = [(2048, 4096), (16, 768)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What quick runs measure: memory's limit, and a small model's rows. A single call has its own suite, overhead.
QUICK = {
    ("forward", torch.float32): [(2048, 4096), (16, 768)],
    ("forward", torch.bfloat16): [(2048, 4096)],
    ("backward", torch.float32): [(2048, 4096)],
}


def is_quick(direction, dtype, shape):
    return shape in QUICK.get((direction, dtype), ())


def eager(x, weight):
    """The layer as Hugging Face's Llama writes it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def plain(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def plain_add(x, residual, weight):
    hidden = x + residual
    return plain(hidden, weight), hidden


rms_norm = Operator(
    name="rms_norm",
    shape="{rows}x{width}",
    inputs=lambda random, rows, width: {"x": random(rows, width), "weight": random(width)},
    reference=lambda x, weight: reference.rms_norm(x, weight, EPS, 0.0, False),
    plain=plain,
    work={
        "forward": lambda rows, width: Work(4 * rows * width, (rows + 1) * width, rows * width),
        "backward": lambda rows, width: Work(11 * rows * width, (2 * rows + 1) * width, (rows + 1) * width),
    },
    kernels={"forward": "rms_norm_inference", "backward": "rms_norm_backward"},
    differentiable=("x", "weight"),
)


@rms_norm.implementation("nearpeak")
def _(x, weight):
    return lambda: nearpeak.rms_norm(x, weight, EPS)


@rms_norm.implementation("eager", baseline=True)
def _(x, weight):
    return lambda: eager(x, weight)


@rms_norm.implementation("F.rms_norm", baseline=True)
def _(x, weight):
    return lambda: plain(x, weight)


@rms_norm.implementation("torch.compile", baseline=True, compiled=True)
def _(x, weight):
    function = compiled(plain)
    return lambda: function(x, weight)


rms_norm_out = Operator(
    name="rms_norm_out",
    shape="{rows}x{width}",
    inputs=rms_norm.inputs,
    reference=rms_norm.reference,
    plain=plain,
    work={"forward": rms_norm.work["forward"]},
    kernels={"forward": "rms_norm_out"},
)


@rms_norm_out.implementation("nearpeak")
def _(x, weight):
    out = torch.empty_like(x)
    return lambda: nearpeak.rms_norm(x, weight, EPS, out=out)


@rms_norm_out.implementation("F.rms_norm", baseline=True)
def _(x, weight):
    # PyTorch's layer takes no out: its output is fresh each time, which is what its users get.
    return lambda: plain(x, weight)


@rms_norm_out.implementation("torch.compile", baseline=True, compiled=True)
def _(x, weight):
    out = torch.empty_like(x)
    function = compiled(lambda x, weight, out: out.copy_(plain(x, weight)))
    return lambda: function(x, weight, out)


add_rms_norm = Operator(
    name="add_rms_norm",
    shape="{rows}x{width}",
    inputs=lambda random, rows, width: {
        "x": random(rows, width),
        "residual": random(rows, width),
        "weight": random(width),
    },
    reference=lambda x, residual, weight: reference.add_rms_norm(x, residual, weight, EPS, 0.0, False),
    plain=plain_add,
    work={
        "forward": lambda rows, width: Work(5 * rows * width, (2 * rows + 1) * width, 2 * rows * width),
        "backward": lambda rows, width: Work(12 * rows * width, (3 * rows + 1) * width, (rows + 1) * width),
    },
    kernels={"forward": "add_rms_norm_inference", "backward": "rms_norm_backward"},
    differentiable=("x", "residual", "weight"),
)


@add_rms_norm.implementation("nearpeak")
def _(x, residual, weight):
    return lambda: nearpeak.rms_norm(x, weight, EPS, residual=residual)


@add_rms_norm.implementation("two calls", baseline=True)
def _(x, residual, weight):
    def call():
        hidden = x + residual
        return nearpeak.rms_norm(hidden, weight, EPS), hidden

    return call


@add_rms_norm.implementation("eager", baseline=True)
def _(x, residual, weight):
    def call():
        hidden = x + residual
        return eager(hidden, weight), hidden

    return call


@add_rms_norm.implementation("F.rms_norm", baseline=True)
def _(x, residual, weight):
    return lambda: plain_add(x, residual, weight)


@add_rms_norm.implementation("torch.compile", baseline=True, compiled=True)
def _(x, residual, weight):
    function = compiled(plain_add)
    return lambda: function(x, residual, weight)


add_rms_norm_out = Operator(
    name="add_rms_norm_out",
    shape="{rows}x{width}",
    inputs=add_rms_norm.inputs,
    reference=add_rms_norm.reference,
    plain=plain_add,
    work={"forward": add_rms_norm.work["forward"]},
    kernels={"forward": "rms_norm_out"},
)


@add_rms_norm_out.implementation("nearpeak")
def _(x, residual, weight):
    out = torch.empty_like(x), torch.empty_like(x)
    return lambda: nearpeak.rms_norm(x, weight, EPS, residual=residual, out=out)


@add_rms_norm_out.implementation("two calls", baseline=True)
def _(x, residual, weight):
    y, hidden = torch.empty_like(x), torch.empty_like(x)

    def call():
        torch.add(x, residual, out=hidden)
        return nearpeak.rms_norm(hidden, weight, EPS, out=y), hidden

    return call


def _cases():
    for operator in (rms_norm, rms_norm_out, add_rms_norm, add_rms_norm_out):
        for dtype, (rows, width) in itertools.product(DTYPES, SHAPES):
            reused = operator in (rms_norm_out, add_rms_norm_out)
            quick = is_quick("forward", dtype, (rows, width)) and not (reused and rows == 16)
            yield Case(operator, {"rows": rows, "width": width}, dtype, quick=quick)
    for operator in (rms_norm, add_rms_norm):
        for dtype, (rows, width) in itertools.product(DTYPES, BACKWARD_SHAPES):
            quick = is_quick("backward", dtype, (rows, width))
            yield Case(operator, {"rows": rows, "width": width}, dtype, "backward", quick=quick)


CASES = list(_cases())
