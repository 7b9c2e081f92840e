"""The torch operators of the feed-forward activations, and their public functions.

Nothing is saved for backward but the inputs: f(x) is computed again there, which costs less than reading it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import backends, operators
from ..activations import KINDS
from ..checks import check_floating, check_same
from . import reference

if backends.missing("triton") is None:
    from . import triton_feedforward as triton_kernels
else:
    triton_kernels = None


def _check(x, kind):
    check_floating("x", x)
    if not x.dim():
        raise ValueError("x must have at least one dimension")


def _check_gated(gate, up, kind):
    check_floating("gate", gate)
    if not gate.dim():
        raise ValueError("gate must have at least one dimension")
    check_same("up", up, "gate", gate, "shape", "dtype", "device")


def _check_packed(packed, kind, up_first):
    check_floating("gate", packed)
    if not packed.dim() or packed.shape[-1] % 2:
        raise ValueError(
            "gate must hold gate and up side by side where up is not given: "
            f"an even last dimension, not shape {tuple(packed.shape)}"
        )


def _check_grad(grad, like):
    check_same("grad", grad, "the output", like, "shape", "dtype", "device")


def _check_backward(grad, x, kind):
    _check(x, kind)
    _check_grad(grad, x)


def _check_gated_backward(grad, gate, up, kind):
    _check_gated(gate, up, kind)
    _check_grad(grad, gate)


def _check_packed_backward(grad, packed, kind, up_first):
    _check_packed(packed, kind, up_first)
    _check_grad(grad, reference.halves(packed, up_first)[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(each for each in inputs if isinstance(each, torch.Tensor)))
    ctx.options = [each for each in inputs if not isinstance(each, torch.Tensor)]


def _gradient(ctx, grad):
    return torch.ops.nearpeak.activation_backward(grad, *ctx.saved_tensors, *ctx.options), None


def _gated_gradient(ctx, grad):
    return *torch.ops.nearpeak.gated_activation_backward(grad, *ctx.saved_tensors, *ctx.options), None


def _packed_gradient(ctx, grad):
    return torch.ops.nearpeak.packed_gated_activation_backward(grad, *ctx.saved_tensors, *ctx.options), None, None


operators.define(
    "activation(Tensor x, int kind) -> Tensor",
    check=_check,
    reference=reference.activation,
    shapes=lambda x, kind: operators.empty_laid_out_like(x),
    triton=triton_kernels and triton_kernels.activation,
    backward=_gradient,
    setup_context=_save,
)
operators.define(
    "activation_backward(Tensor grad, Tensor x, int kind) -> Tensor",
    check=_check_backward,
    reference=reference.activation_backward,
    shapes=lambda grad, x, kind: operators.empty_laid_out_like(x),
    triton=triton_kernels and triton_kernels.activation_backward,
)
operators.define(
    "gated_activation(Tensor gate, Tensor up, int kind) -> Tensor",
    check=_check_gated,
    reference=reference.gated_activation,
    shapes=lambda gate, up, kind: operators.empty_laid_out_like(gate),
    triton=triton_kernels and triton_kernels.gated_activation,
    backward=_gated_gradient,
    setup_context=_save,
)
operators.define(
    "gated_activation_backward(Tensor grad, Tensor gate, Tensor up, int kind) -> (Tensor, Tensor)",
    check=_check_gated_backward,
    reference=reference.gated_activation_backward,
    shapes=lambda grad, gate, up, kind: tuple(operators.empty_laid_out_like(gate) for _ in range(2)),
    triton=triton_kernels and triton_kernels.gated_activation_backward,
)
operators.define(
    "packed_gated_activation(Tensor packed, int kind, bool up_first) -> Tensor",
    check=_check_packed,
    reference=reference.packed_gated_activation,
    shapes=lambda packed, kind, up_first: operators.empty_laid_out_like(packed, packed.shape[-1] // 2),
    triton=triton_kernels and triton_kernels.packed_gated_activation,
    backward=_packed_gradient,
    setup_context=_save,
)
operators.define(
    "packed_gated_activation_backward(Tensor grad, Tensor packed, int kind, bool up_first) -> Tensor",
    check=_check_packed_backward,
    reference=reference.packed_gated_activation_backward,
    shapes=lambda grad, packed, kind, up_first: operators.empty_laid_out_like(packed),
    triton=triton_kernels and triton_kernels.packed_gated_activation_backward,
)

GELUS = {"none": KINDS["gelu"], "tanh": KINDS["gelu_tanh"], "sigmoid": KINDS["quick_gelu"]}


class Form(NamedTuple):
    """One way to call an activation; its operators are looked up once, at 0.1 us an attribute of torch.ops."""

    check: Callable
    reference: Callable
    recorded: torch._ops.OpOverload  # with a gradient formula
    inference: torch._ops.OpOverload

    def serve(self, *arguments):
        try:
            first, second, *_ = arguments
            if backends.reference_serves(first, kernels=backends.WITHOUT_CUDA):
                self.check(*arguments)
                return self.reference(*arguments)
            recorded = operators.wants_gradient(first, second if isinstance(second, torch.Tensor) else None)
            return (self.recorded if recorded else self.inference)(*arguments)
        except (AttributeError, RuntimeError, TypeError):
            self.check(*arguments)
            raise


ALONE, GATED, PACKED = (
    Form(
        check,
        getattr(reference, name),
        getattr(torch.ops.nearpeak, name).default,
        getattr(torch.ops.nearpeak, f"{name}_inference").default,
    )
    for check, name in (
        (_check, "activation"),
        (_check_gated, "gated_activation"),
        (_check_packed, "packed_gated_activation"),
    )
)


def activation(x, name):
    """A feed-forward activation, y = f(x), elementwise.

    Args:
        x: any shape of at least one dimension, float32, bfloat16, float16 or float64.
        name: "relu", "gelu" (exact), "gelu_tanh", "quick_gelu", "silu" or "relu_squared"; their formulas and sources
            are in activations.py.

    Returns:
        y, in x's shape and dtype.

    Raises:
        TypeError: a dtype that is not served. ValueError: a name or shape that is not.

    >>> y = nearpeak.activation(torch.randn(4, 640), "gelu")
    """
    if name not in KINDS:
        raise ValueError(f"name must be one of {', '.join(KINDS)}, not {name!r}")
    return ALONE.serve(x, KINDS[name])


def _gate(gate, up, kind, up_first):
    if up is None:
        return PACKED.serve(gate, kind, up_first)
    if up_first:
        raise ValueError("up_first tells how gate and up are packed: leave it out where up is given")
    return GATED.serve(gate, up, kind)


def swiglu(gate, up=None, *, up_first=False):
    """SwiGLU without its linear layers: y = silu(gate) * up, silu(x) = x sigmoid(x).

    Args:
        gate: (..., width), float32, bfloat16, float16 or float64; any strides (a dense last dimension is read without
            a copy). Without `up`, (..., 2 * width): gate and up side by side, as one packed linear layer gives them.
        up: gate's shape and dtype, or None.
        up_first: of a packed tensor, the first half is up and the second is gate.

    Returns:
        y, (..., width), in gate's dtype. Backward keeps the inputs and nothing else.

    Raises:
        TypeError: a dtype that is not served. ValueError: shapes or options that do not fit.

    Shazeer 2020, https://arxiv.org/abs/2002.05202.

    >>> y = nearpeak.swiglu(torch.randn(4, 640), torch.randn(4, 640))
    >>> y = nearpeak.swiglu(torch.randn(4, 1280))
    """
    return _gate(gate, up, KINDS["silu"], up_first)


def geglu(gate, up=None, approximate="none", *, up_first=False):
    """GeGLU without its linear layers: y = gelu(gate) * up.

    approximate: "none" is exact, "tanh" as in Gemma, "sigmoid" is quick GELU, x sigmoid(1.702 x). Else as `swiglu`.

    >>> y = nearpeak.geglu(torch.randn(4, 640), torch.randn(4, 640), approximate="tanh")
    """
    if approximate not in GELUS:
        raise ValueError(f"approximate must be one of {', '.join(GELUS)}, not {approximate!r}")
    return _gate(gate, up, GELUS[approximate], up_first)


def reglu(gate, up=None, *, up_first=False):
    """ReGLU without its linear layers: y = max(gate, 0) * up. Else as `swiglu`.

    >>> y = nearpeak.reglu(torch.randn(4, 640), torch.randn(4, 640))
    """
    return _gate(gate, up, KINDS["relu"], up_first)
