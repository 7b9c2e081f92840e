"""LayerNorm: alone, with the residual addition before it (pre-norm and post-norm), into reused outputs; also backward.

The shapes are RMSNorm's (norm.py), of whose suite these cases are a part.
"""

import itertools

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak.norm import reference

from .cases import Case, Operator, Work, compiled
from .norm import BACKWARD_SHAPES, DTYPES, SHAPES, is_quick

EPS = 1e-5


def plain(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def plain_pre(x, residual, weight, bias):
    hidden = x + residual
    return plain(hidden, weight, bias), hidden


def plain_post(x, residual, weight, bias):
    return plain(x + residual, weight, bias)


def _inputs(random, rows, width):
    return {"x": random(rows, width), "weight": random(width), "bias": random(width)}


def _inputs_and_residual(random, rows, width):
    return {"x": random(rows, width), "residual": random(rows, width), "weight": random(width), "bias": random(width)}


layer_norm = Operator(
    name="layer_norm",
    shape="{rows}x{width}",
    inputs=_inputs,
    reference=lambda x, weight, bias: reference.layer_norm(x, weight, bias, EPS),
    plain=plain,
    work={
        "forward": lambda rows, width: Work(8 * rows * width, (rows + 2) * width, rows * width),
        "backward": lambda rows, width: Work(16 * rows * width, (2 * rows + 1) * width, (rows + 2) * width),
    },
    kernels={"forward": "layer_norm_inference", "backward": "layer_norm_backward"},
    differentiable=("x", "weight", "bias"),
)


@layer_norm.implementation("nearpeak")
def _(x, weight, bias):
    return lambda: nearpeak.layer_norm(x, weight, bias, EPS)


@layer_norm.implementation("F.layer_norm", baseline=True)
def _(x, weight, bias):
    return lambda: plain(x, weight, bias)


@layer_norm.implementation("torch.compile", baseline=True, compiled=True)
def _(x, weight, bias):
    function = compiled(plain)
    return lambda: function(x, weight, bias)


layer_norm_out = Operator(
    name="layer_norm_out",
    shape="{rows}x{width}",
    inputs=_inputs,
    reference=layer_norm.reference,
    plain=plain,
    work={"forward": layer_norm.work["forward"]},
    kernels={"forward": "layer_norm_out"},
)


@layer_norm_out.implementation("nearpeak")
def _(x, weight, bias):
    out = torch.empty_like(x)
    return lambda: nearpeak.layer_norm(x, weight, bias, EPS, out=out)


@layer_norm_out.implementation("F.layer_norm", baseline=True)
def _(x, weight, bias):
    # PyTorch's layer takes no out: its output is fresh each time, which is what its users get.
    return lambda: plain(x, weight, bias)


@layer_norm_out.implementation("torch.compile", baseline=True, compiled=True)
def _(x, weight, bias):
    out = torch.empty_like(x)
    function = compiled(lambda x, weight, bias, out: out.copy_(plain(x, weight, bias)))
    return lambda: function(x, weight, bias, out)


add_layer_norm = Operator(
    name="add_layer_norm",
    shape="{rows}x{width}",
    inputs=_inputs_and_residual,
    reference=lambda x, residual, weight, bias: reference.add_layer_norm(x, residual, weight, bias, EPS),
    plain=plain_pre,
    work={
        "forward": lambda rows, width: Work(9 * rows * width, (2 * rows + 2) * width, 2 * rows * width),
        "backward": lambda rows, width: Work(17 * rows * width, (3 * rows + 1) * width, (rows + 2) * width),
    },
    kernels={"forward": "add_layer_norm_inference", "backward": "layer_norm_backward"},
    differentiable=("x", "residual", "weight", "bias"),
)


@add_layer_norm.implementation("nearpeak")
def _(x, residual, weight, bias):
    return lambda: nearpeak.layer_norm(x, weight, bias, EPS, residual=residual)


@add_layer_norm.implementation("F.layer_norm", baseline=True)
def _(x, residual, weight, bias):
    return lambda: plain_pre(x, residual, weight, bias)


@add_layer_norm.implementation("torch.compile", baseline=True, compiled=True)
def _(x, residual, weight, bias):
    function = compiled(plain_pre)
    return lambda: function(x, residual, weight, bias)


post_layer_norm = Operator(
    name="post_layer_norm",
    shape="{rows}x{width}",
    inputs=_inputs_and_residual,
    reference=lambda x, residual, weight, bias: reference.layer_norm_of_sum(x, residual, weight, bias, EPS),
    plain=plain_post,
    work={"forward": lambda rows, width: Work(9 * rows * width, (2 * rows + 2) * width, rows * width)},
    kernels={"forward": "layer_norm_of_sum", "backward": "layer_norm_backward"},
    differentiable=("x", "residual", "weight", "bias"),
)


@post_layer_norm.implementation("nearpeak")
def _(x, residual, weight, bias):
    return lambda: nearpeak.layer_norm(x, weight, bias, EPS, residual=residual, return_residual=False)


@post_layer_norm.implementation("F.layer_norm", baseline=True)
def _(x, residual, weight, bias):
    return lambda: plain_post(x, residual, weight, bias)


@post_layer_norm.implementation("torch.compile", baseline=True, compiled=True)
def _(x, residual, weight, bias):
    function = compiled(plain_post)
    return lambda: function(x, residual, weight, bias)


def _cases():
    for operator in (layer_norm, layer_norm_out, add_layer_norm, post_layer_norm):
        for dtype, (rows, width) in itertools.product(DTYPES, SHAPES):
            quick = is_quick("forward", dtype, (rows, width)) and not (operator is layer_norm_out and rows == 16)
            yield Case(operator, {"rows": rows, "width": width}, dtype, quick=quick)
    for operator in (layer_norm, add_layer_norm):
        for dtype, (rows, width) in itertools.product(DTYPES, BACKWARD_SHAPES):
            quick = is_quick("backward", dtype, (rows, width))
            yield Case(operator, {"rows": rows, "width": width}, dtype, "backward", quick=quick)


CASES = list(_cases())
