"""The torch operators of RMSNorm, and its public function.

Backward needs the row's mean square again, and finds it in the same pass in which it reads `hidden` anyway; so
forward saves nothing but its own input, and one operator serves training and inference.
"""

import torch

from .. import backends, operators
from ..checks import check_contiguous, check_floating, check_same
from . import reference

if backends.missing("triton") is None:
    from . import triton_rms_norm as triton_kernels
else:
    triton_kernels = None


def _save_for_rms_norm(ctx, inputs, output):
    x, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_gradient(ctx, grad):
    x, weight = ctx.saved_tensors
    d_x, d_weight = torch.ops.nearpeak.rms_norm_backward(grad, x, weight, None, ctx.eps, ctx.offset)
    return d_x, None if weight is None else d_weight, None, None


def _save_for_add_rms_norm(ctx, inputs, output):
    _, _, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight)


def _add_rms_norm_gradient(ctx, grad, grad_hidden):
    hidden, weight = ctx.saved_tensors
    d_hidden, d_weight = torch.ops.nearpeak.rms_norm_backward(grad, hidden, weight, grad_hidden, ctx.eps, ctx.offset)
    return d_hidden, d_hidden, None if weight is None else d_weight, None, None


def _check(x, weight, residual=None):
    check_floating("x", x)
    shape = x.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least one element, not shape {tuple(shape)}")
    if weight is not None:
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"weight must be a torch.Tensor or None, not {type(weight).__name__}")
        if weight.device != x.device:
            raise ValueError(f"weight must be on x's device {x.device}, not on {weight.device}")
        if weight.shape != shape[-1:]:
            raise ValueError(f"weight must have shape {tuple(shape[-1:])}, x's last, not {tuple(weight.shape)}")
        if weight.dtype is not x.dtype and weight.dtype is not torch.float32:
            raise TypeError(f"weight must be {x.dtype} as x, or float32, not {weight.dtype}")
    if residual is not None:
        check_same("residual", residual, "x", x, "shape", "dtype", "device")


def _check_out(x, residual, out):
    names = ("out",) if residual is None else ("out[0]", "out[1]")
    outs = (out,) if residual is None else out
    if not isinstance(outs, tuple) or len(outs) != len(names):
        raise ValueError("out must be one tensor, or with a residual the pair (y, new_residual)")
    for name, tensor in zip(names, outs, strict=True):
        check_same(name, tensor, "x", x, "shape", "dtype", "device")
        check_contiguous(name, tensor)
    if residual is not None and outs[0] is outs[1]:
        raise ValueError("out must be two different tensors: y and new_residual are both written")


def _check_into(x, weight, residual, eps, offset, out, residual_out):
    _check(x, weight, residual)
    _check_out(x, residual, out if residual is None else (out, residual_out))


def _check_backward(grad, hidden, weight, grad_hidden, eps, offset):
    _check(hidden, weight)
    check_same("grad", grad, "hidden", hidden, "shape", "dtype", "device")
    if grad_hidden is not None:
        check_same("grad_hidden", grad_hidden, "hidden", hidden, "shape", "dtype", "device")


operators.define(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> Tensor",
    check=lambda x, weight, eps, offset: _check(x, weight),
    reference=reference.rms_norm,
    shapes=lambda x, weight, eps, offset: operators.empty_laid_out_like(x),
    triton=triton_kernels and triton_kernels.rms_norm,
    cuda=True,
    backward=_rms_norm_gradient,
    setup_context=_save_for_rms_norm,
)
operators.define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)",
    check=lambda x, residual, weight, eps, offset: _check(x, weight, residual),
    reference=reference.add_rms_norm,
    shapes=lambda x, residual, weight, eps, offset: (
        operators.empty_laid_out_like(x),
        operators.empty_laid_out_like(x),
    ),
    triton=triton_kernels and triton_kernels.add_rms_norm,
    cuda=True,
    backward=_add_rms_norm_gradient,
    setup_context=_save_for_add_rms_norm,
)
operators.define(
    "rms_norm_out(Tensor x, Tensor? weight, Tensor? residual, float eps, float offset, "
    "Tensor(a!) out, Tensor(b!)? residual_out) -> ()",
    check=_check_into,
    reference=reference.rms_norm_out,
    shapes=lambda x, weight, residual, eps, offset, out, residual_out: None,
    triton=triton_kernels and triton_kernels.rms_norm_out,
    cuda=True,
)
operators.define(
    "rms_norm_backward(Tensor grad, Tensor hidden, Tensor? weight, Tensor? grad_hidden, float eps, float offset) "
    "-> (Tensor, Tensor)",
    check=_check_backward,
    reference=reference.rms_norm_backward,
    shapes=lambda grad, hidden, weight, grad_hidden, eps, offset: (
        operators.empty_laid_out_like(hidden),
        hidden.new_empty(0) if weight is None else torch.empty_like(weight),
    ),
    triton=triton_kernels and triton_kernels.rms_norm_backward,
    cuda=True,
)

# Looked up once: each attribute of torch.ops costs 0.1 us a call.
_rms_norm = torch.ops.nearpeak.rms_norm.default
_rms_norm_inference = torch.ops.nearpeak.rms_norm_inference.default
_add_rms_norm = torch.ops.nearpeak.add_rms_norm.default
_add_rms_norm_inference = torch.ops.nearpeak.add_rms_norm_inference.default
_rms_norm_out = torch.ops.nearpeak.rms_norm_out.default


def rms_norm(x, weight=None, eps=1e-6, *, residual=None, offset=0.0, out=None):
    """Root mean square normalisation over the last dimension, with an optional fused residual addition.

        hidden = x + residual                                  (hidden = x without a residual)
        y      = hidden / sqrt(mean(hidden^2) + eps) * (offset + weight)

    Args:
        x: (..., width), float32, bfloat16, float16 or float64.
        weight: (width,), in x's dtype or float32; None for no weight.
        eps: added to the mean square.
        residual: x's shape and dtype; added to x first, and the sum is returned too.
        offset: added to the weight; 1.0 is Gemma's form. Has no effect without a weight.
        out: written instead of a new tensor (gradients are not recorded): one tensor like x, or with a residual
            the pair (y, new_residual). It may be x or residual itself.

    Returns:
        y, in x's shape and dtype; with a residual the pair (y, new_residual).

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape, device or stride that does not fit.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.

    >>> x, weight = torch.randn(4, 640), torch.zeros(640)
    >>> y = nearpeak.rms_norm(x, weight, eps=1e-6, offset=1.0)
    >>> y, residual = nearpeak.rms_norm(x, weight, residual=torch.randn(4, 640))
    """
    if out is not None:
        return _rms_norm_into(out, x, weight, residual, eps, offset)
    try:
        if backends.reference_serves(x):
            _check(x, weight, residual)
            if residual is None:
                return reference.rms_norm(x, weight, eps, offset)
            return reference.add_rms_norm(x, residual, weight, eps, offset)
        recorded = operators.wants_gradient(x, weight, residual)
        if residual is None:
            return (_rms_norm if recorded else _rms_norm_inference)(x, weight, eps, offset)
        return (_add_rms_norm if recorded else _add_rms_norm_inference)(x, residual, weight, eps, offset)
    except (AttributeError, RuntimeError, TypeError):
        _check(x, weight, residual)
        raise


def _rms_norm_into(out, x, weight, residual, eps, offset):
    _check(x, weight, residual)
    _check_out(x, residual, out)
    if operators.wants_gradient(x, weight, residual):
        raise ValueError("out cannot be given where gradients are recorded: leave it out, or use torch.no_grad()")
    y, new_residual = (out, None) if residual is None else out
    serve = reference.rms_norm_out if backends.reference_serves(x) else _rms_norm_out
    serve(x, weight, residual, eps, offset, y, new_residual)
    operators.mark_written(y, new_residual)
    return out
