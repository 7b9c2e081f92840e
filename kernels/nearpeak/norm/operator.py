"""The torch operators of RMSNorm and LayerNorm, and their public functions.

Backward needs a row's mean and mean square again, and finds them in passes over `hidden` that it makes anyway, or that
find it in the cache; so forward saves nothing but its own input, and one kernel serves training and inference.
"""

import torch

from .. import backends, operators
from ..checks import check_contiguous, check_floating, check_parameter, check_same
from . import reference

if backends.missing("triton") is None:
    from . import triton_norm as triton_kernels
else:
    triton_kernels = None


def _save_for_rms_norm(ctx, inputs, output):
    x, weight, ctx.eps, ctx.offset, _ = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_gradient(ctx, grad):
    x, weight = ctx.saved_tensors
    d_x, d_weight = _rms_norm_backward(grad, x, weight, None, ctx.eps, ctx.offset)
    return d_x, None if weight is None else d_weight, None, None, None


def _save_for_add_rms_norm(ctx, inputs, output):
    _, _, weight, ctx.eps, ctx.offset, _ = inputs
    ctx.set_materialize_grads(False)  # zeros for an output that nobody used would be read and added
    ctx.save_for_backward(output[1], weight)


def _add_rms_norm_gradient(ctx, grad, grad_hidden):
    hidden, weight = ctx.saved_tensors
    grad = torch.zeros_like(hidden) if grad is None else grad
    d_hidden, d_weight = _rms_norm_backward(grad, hidden, weight, grad_hidden, ctx.eps, ctx.offset)
    return d_hidden, d_hidden, None if weight is None else d_weight, None, None, None


def _save_for_layer_norm(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _layer_norm_gradient(ctx, grad):
    return *_layer_norm_gradients(ctx, grad, None), None


def _save_for_add_layer_norm(ctx, inputs, output):
    _, _, weight, bias, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight, bias)


def _add_layer_norm_gradient(ctx, grad, grad_hidden):
    grad = torch.zeros_like(grad_hidden) if grad is None else grad
    d_hidden, *d_parameters = _layer_norm_gradients(ctx, grad, grad_hidden)
    return d_hidden, d_hidden, *d_parameters, None


def _layer_norm_gradients(ctx, grad, grad_hidden):
    """Of hidden, weight and bias."""
    hidden, weight, bias = ctx.saved_tensors
    d_hidden, d_weight, d_bias = _layer_norm_backward(grad, hidden, weight, bias, grad_hidden, ctx.eps)
    return d_hidden, None if weight is None else d_weight, None if bias is None else d_bias


def _check(x, weight, residual=None, bias=None):
    check_floating("x", x)
    shape = x.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least one element, not shape {tuple(shape)}")
    check_parameter("weight", weight, x, "x")
    check_parameter("bias", bias, x, "x")
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        raise TypeError(f"bias must have weight's dtype, {weight.dtype}, not {bias.dtype}")
    if residual is not None:
        check_same("residual", residual, "x", x, "shape", "dtype", "device")


def _check_out(x, pair, out):
    """pair: whether out must be the pair (y, new_residual), not y alone."""
    names = ("out[0]", "out[1]") if pair else ("out",)
    outs = out if pair else (out,)
    if not isinstance(outs, tuple) or len(outs) != len(names):
        raise ValueError("out must be one tensor, or where new_residual is returned the pair (y, new_residual)")
    for name, tensor in zip(names, outs, strict=True):
        check_same(name, tensor, "x", x, "shape", "dtype", "device")
        check_contiguous(name, tensor)
    if pair and outs[0] is outs[1]:
        raise ValueError("out must be two different tensors: y and new_residual are both written")


def _check_into(x, weight, residual, eps, offset, cast_first, out, residual_out):
    _check(x, weight, residual)
    _check_out(x, residual is not None, out if residual is None else (out, residual_out))


def _check_layer_norm_into(x, weight, bias, residual, eps, out, residual_out):
    _check(x, weight, residual, bias)
    _check_out(x, residual_out is not None, out if residual_out is None else (out, residual_out))
    if residual is None and residual_out is not None:
        raise ValueError("residual_out must be None without a residual")


def _check_backward(grad, hidden, weight, grad_hidden, bias=None):
    _check(hidden, weight, bias=bias)
    check_same("grad", grad, "hidden", hidden, "shape", "dtype", "device")
    if grad_hidden is not None:
        check_same("grad_hidden", grad_hidden, "hidden", hidden, "shape", "dtype", "device")


def _empty_pair(x):
    return operators.empty_laid_out_like(x), operators.empty_laid_out_like(x)


def empty_gradient(parameter, hidden):
    return hidden.new_empty(0) if parameter is None else torch.empty_like(parameter)


operators.define(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset, bool cast_first) -> Tensor",
    check=lambda x, weight, eps, offset, cast_first: _check(x, weight),
    reference=reference.rms_norm,
    shapes=lambda x, weight, eps, offset, cast_first: operators.empty_laid_out_like(x),
    triton=triton_kernels and triton_kernels.rms_norm,
    cuda=True,
    backward=_rms_norm_gradient,
    setup_context=_save_for_rms_norm,
)
operators.define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, bool cast_first) "
    "-> (Tensor, Tensor)",
    check=lambda x, residual, weight, eps, offset, cast_first: _check(x, weight, residual),
    reference=reference.add_rms_norm,
    shapes=lambda x, residual, weight, eps, offset, cast_first: _empty_pair(x),
    triton=triton_kernels and triton_kernels.add_rms_norm,
    cuda=True,
    backward=_add_rms_norm_gradient,
    setup_context=_save_for_add_rms_norm,
)
operators.define(
    "rms_norm_out(Tensor x, Tensor? weight, Tensor? residual, float eps, float offset, bool cast_first, "
    "Tensor(a!) out, Tensor(b!)? residual_out) -> ()",
    check=_check_into,
    reference=reference.rms_norm_out,
    shapes=lambda x, weight, residual, eps, offset, cast_first, out, residual_out: None,
    triton=triton_kernels and triton_kernels.rms_norm_out,
    cuda=True,
)
operators.define(
    "rms_norm_backward(Tensor grad, Tensor hidden, Tensor? weight, Tensor? grad_hidden, float eps, float offset) "
    "-> (Tensor, Tensor)",
    check=lambda grad, hidden, weight, grad_hidden, eps, offset: _check_backward(grad, hidden, weight, grad_hidden),
    reference=reference.rms_norm_backward,
    shapes=lambda grad, hidden, weight, grad_hidden, eps, offset: (
        operators.empty_laid_out_like(hidden),
        empty_gradient(weight, hidden),
    ),
    triton=triton_kernels and triton_kernels.rms_norm_backward,
    cuda=True,
)
operators.define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    check=lambda x, weight, bias, eps: _check(x, weight, None, bias),
    reference=reference.layer_norm,
    shapes=lambda x, weight, bias, eps: operators.empty_laid_out_like(x),
    triton=triton_kernels and triton_kernels.layer_norm,
    backward=_layer_norm_gradient,
    setup_context=_save_for_layer_norm,
)
operators.define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    check=lambda x, residual, weight, bias, eps: _check(x, weight, residual, bias),
    reference=reference.add_layer_norm,
    shapes=lambda x, residual, weight, bias, eps: _empty_pair(x),
    triton=triton_kernels and triton_kernels.add_layer_norm,
    backward=_add_layer_norm_gradient,
    setup_context=_save_for_add_layer_norm,
)
# add_layer_norm's first output, for inference: the sum is not written. Gradients would need it.
operators.define(
    "layer_norm_of_sum(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    check=lambda x, residual, weight, bias, eps: _check(x, weight, residual, bias),
    reference=reference.layer_norm_of_sum,
    shapes=lambda x, residual, weight, bias, eps: operators.empty_laid_out_like(x),
    triton=triton_kernels and triton_kernels.layer_norm_of_sum,
)
operators.define(
    "layer_norm_out(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
    "Tensor(a!) out, Tensor(b!)? residual_out) -> ()",
    check=_check_layer_norm_into,
    reference=reference.layer_norm_out,
    shapes=lambda x, weight, bias, residual, eps, out, residual_out: None,
    triton=triton_kernels and triton_kernels.layer_norm_out,
)
operators.define(
    "layer_norm_backward(Tensor grad, Tensor hidden, Tensor? weight, Tensor? bias, Tensor? grad_hidden, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    check=lambda grad, hidden, weight, bias, grad_hidden, eps: _check_backward(grad, hidden, weight, grad_hidden, bias),
    reference=reference.layer_norm_backward,
    shapes=lambda grad, hidden, weight, bias, grad_hidden, eps: (
        operators.empty_laid_out_like(hidden),
        empty_gradient(weight, hidden),
        empty_gradient(bias, hidden),
    ),
    triton=triton_kernels and triton_kernels.layer_norm_backward,
)

# Looked up once: each attribute of torch.ops costs 0.1 us a call.
_rms_norm = torch.ops.nearpeak.rms_norm.default
_rms_norm_inference = torch.ops.nearpeak.rms_norm_inference.default
_add_rms_norm = torch.ops.nearpeak.add_rms_norm.default
_add_rms_norm_inference = torch.ops.nearpeak.add_rms_norm_inference.default
_rms_norm_backward = torch.ops.nearpeak.rms_norm_backward.default
_rms_norm_out = torch.ops.nearpeak.rms_norm_out.default
_layer_norm = torch.ops.nearpeak.layer_norm.default
_layer_norm_inference = torch.ops.nearpeak.layer_norm_inference.default
_add_layer_norm = torch.ops.nearpeak.add_layer_norm.default
_add_layer_norm_inference = torch.ops.nearpeak.add_layer_norm_inference.default
_layer_norm_of_sum = torch.ops.nearpeak.layer_norm_of_sum.default
_layer_norm_backward = torch.ops.nearpeak.layer_norm_backward.default
_layer_norm_out = torch.ops.nearpeak.layer_norm_out.default


def rms_norm(x, weight=None, eps=1e-6, *, residual=None, offset=0.0, cast_first=False, out=None):
    """Root mean square normalisation over the last dimension, with an optional fused residual addition.

        hidden = x + residual                                  (hidden = x without a residual)
        y      = hidden / sqrt(mean(hidden^2) + eps) * (offset + weight)

    Args:
        x: (..., width), float32, bfloat16, float16 or float64.
        weight: (width,), in x's dtype or float32; None for no weight.
        eps: added to the mean square.
        residual: x's shape and dtype; added to x first, and the sum is returned too.
        offset: added to the weight; 1.0 is Gemma's form. Has no effect without a weight.
        cast_first: round the normalised value to x's dtype before it meets the weight, as Hugging Face's Llama modules
            do, for their very numbers in bfloat16 and float16. Rounding once, at the end, is never less exact (on
            average it errs three quarters as much). Gradients are the same. Has no effect without a weight.
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
        return _rms_norm_into(out, x, weight, residual, eps, offset, cast_first)
    try:
        if backends.reference_serves(x):
            _check(x, weight, residual)
            if residual is None:
                return reference.rms_norm(x, weight, eps, offset, cast_first)
            return reference.add_rms_norm(x, residual, weight, eps, offset, cast_first)
        recorded = operators.wants_gradient(x, weight, residual)
        if residual is None:
            return (_rms_norm if recorded else _rms_norm_inference)(x, weight, eps, offset, cast_first)
        serve = _add_rms_norm if recorded else _add_rms_norm_inference
        return serve(x, residual, weight, eps, offset, cast_first)
    except (AttributeError, RuntimeError, TypeError):
        _check(x, weight, residual)
        raise


def _rms_norm_into(out, x, weight, residual, eps, offset, cast_first):
    pair = residual is not None
    try:
        y, new_residual = _destinations(out, pair, x, weight, residual)
        serve = _rms_norm_out
        if backends.reference_serves(x):
            _check_into(x, weight, residual, eps, offset, cast_first, y, new_residual)
            serve = reference.rms_norm_out
        serve(x, weight, residual, eps, offset, cast_first, y, new_residual)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        _check(x, weight, residual)
        _check_out(x, pair, out)
        raise
    operators.mark_written(y, new_residual)
    return out


def layer_norm(x, weight=None, bias=None, eps=1e-5, *, residual=None, return_residual=True, out=None):
    """Layer normalisation over the last dimension, with an optional fused residual addition.

        hidden = x + residual                                  (hidden = x without a residual)
        y      = (hidden - mean(hidden)) / sqrt(variance(hidden) + eps) * weight + bias

    Args:
        x: (..., width), float32, bfloat16, float16 or float64.
        weight: (width,), in x's dtype or float32; None for no weight.
        bias: (width,), in weight's dtype (without a weight, as weight); None for no bias.
        eps: added to the variance, which is the mean squared distance from the mean.
        residual: x's shape and dtype; added to x first.
        return_residual: whether the sum is returned too, for layers that normalise first (pre-norm). False is for those
            that normalise last, LayerNorm(x + sublayer(x)), and spares the sum's memory where no gradients are
            recorded. Has no effect without a residual.
        out: written instead of a new tensor (gradients are not recorded): one tensor like x, or where the sum is
            returned the pair (y, new_residual). It may be x or residual itself.

    Returns:
        y, in x's shape and dtype; with a residual, unless return_residual is False, the pair (y, new_residual).

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape, device or stride that does not fit.

    Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450. CUDA C++ kernels exist for RMSNorm only.

    >>> x, weight, bias = torch.randn(4, 768), torch.ones(768), torch.zeros(768)
    >>> y = nearpeak.layer_norm(x, weight, bias)
    >>> y, residual = nearpeak.layer_norm(x, weight, bias, residual=torch.randn(4, 768))
    >>> y = nearpeak.layer_norm(x, weight, bias, residual=torch.randn(4, 768), return_residual=False)
    """
    if out is not None:
        return _layer_norm_into(out, x, weight, bias, residual, return_residual, eps)
    try:
        if backends.reference_serves(x, kernels=backends.WITHOUT_CUDA):
            _check(x, weight, residual, bias)
            if residual is None:
                return reference.layer_norm(x, weight, bias, eps)
            pair = reference.add_layer_norm(x, residual, weight, bias, eps)
            return pair if return_residual else pair[0]
        if residual is None:
            recorded = operators.wants_gradient(x, weight, bias)
            return (_layer_norm if recorded else _layer_norm_inference)(x, weight, bias, eps)
        recorded = operators.wants_gradient(x, weight, bias, residual)
        if not (return_residual or recorded):
            return _layer_norm_of_sum(x, residual, weight, bias, eps)
        pair = (_add_layer_norm if recorded else _add_layer_norm_inference)(x, residual, weight, bias, eps)
        return pair if return_residual else pair[0]
    except (AttributeError, RuntimeError, TypeError):
        _check(x, weight, residual, bias)
        raise


def _layer_norm_into(out, x, weight, bias, residual, return_residual, eps):
    pair = residual is not None and return_residual
    try:
        y, new_residual = _destinations(out, pair, x, weight, bias, residual)
        serve = _layer_norm_out
        if backends.reference_serves(x, kernels=backends.WITHOUT_CUDA):
            _check_layer_norm_into(x, weight, bias, residual, eps, y, new_residual)
            serve = reference.layer_norm_out
        serve(x, weight, bias, residual, eps, y, new_residual)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        _check(x, weight, residual, bias)
        _check_out(x, pair, out)
        raise
    operators.mark_written(y, new_residual)
    return out


def _destinations(out, pair, *inputs):
    """What `out` holds: y and, of a pair, new_residual."""
    if operators.wants_gradient(*inputs):
        raise ValueError("out cannot be given where gradients are recorded: leave it out, or use torch.no_grad()")
    if not pair:
        return out, None
    if not isinstance(out, tuple) or out[0] is out[1]:  # what the kernel cannot see
        raise ValueError("out must be a pair of different tensors")
    return out
