"""The torch operators of QK-norm, RMSNorm of query and key over head_dim, and its public function."""

import torch

from .. import backends, operators
from ..checks import check_floating, check_parameter, check_same, check_same_kind
from . import reference
from .operator import empty_gradient

if backends.missing("triton") is None:
    from . import triton_qk_norm as triton_kernels
else:
    triton_kernels = None


def _save_for_qk_norm(ctx, inputs, output):
    *tensors, ctx.eps, ctx.offset, _ = inputs
    ctx.save_for_backward(*tensors)


def _qk_norm_gradient(ctx, grad_query, grad_key):
    query, key, query_weight, key_weight = ctx.saved_tensors
    d_query, d_key, d_query_weight, d_key_weight = torch.ops.nearpeak.qk_norm_backward(
        grad_query, grad_key, query, key, query_weight, key_weight, ctx.eps, ctx.offset
    )
    d_query_weight = None if query_weight is None else d_query_weight
    return d_query, d_key, d_query_weight, None if key_weight is None else d_key_weight, None, None, None


def _check(query, key, query_weight, key_weight):
    check_floating("query", query)
    check_same_kind("key", key, "query", query)
    for name, x in (("query", query), ("key", key)):
        if x.dim() != 4 or x.shape[3] == 0:
            raise ValueError(
                f"{name} must be (batch, heads, sequence, head_dim) or (batch, sequence, heads, head_dim), "
                f"not of shape {tuple(x.shape)}"
            )
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key must have query's head_dim, {query.shape[3]}, not {key.shape[3]}")
    check_parameter("query_weight", query_weight, query, "query")
    check_parameter("key_weight", key_weight, key, "key")


def _check_backward(grad_query, grad_key, query, key, query_weight, key_weight):
    _check(query, key, query_weight, key_weight)
    check_same("grad_query", grad_query, "query", query, "shape", "dtype", "device")
    check_same("grad_key", grad_key, "key", key, "shape", "dtype", "device")


operators.define(
    "qk_norm(Tensor query, Tensor key, Tensor? query_weight, Tensor? key_weight, float eps, float offset, "
    "bool cast_first) -> (Tensor, Tensor)",
    check=lambda query, key, query_weight, key_weight, *formula: _check(query, key, query_weight, key_weight),
    reference=reference.qk_norm,
    shapes=lambda query, key, *others: (operators.empty_laid_out_like(query), operators.empty_laid_out_like(key)),
    triton=triton_kernels and triton_kernels.qk_norm,
    backward=_qk_norm_gradient,
    setup_context=_save_for_qk_norm,
)
operators.define(
    "qk_norm_backward(Tensor grad_query, Tensor grad_key, Tensor query, Tensor key, Tensor? query_weight, "
    "Tensor? key_weight, float eps, float offset) -> (Tensor, Tensor, Tensor, Tensor)",
    check=lambda *arguments: _check_backward(*arguments[:6]),
    reference=reference.qk_norm_backward,
    shapes=lambda grad_query, grad_key, query, key, query_weight, key_weight, *formula: (
        operators.empty_laid_out_like(query),
        operators.empty_laid_out_like(key),
        empty_gradient(query_weight, query),
        empty_gradient(key_weight, key),
    ),
    triton=triton_kernels and triton_kernels.qk_norm_backward,
)

# Looked up once: each attribute of torch.ops costs 0.1 us a call.
_qk_norm = torch.ops.nearpeak.qk_norm.default
_qk_norm_inference = torch.ops.nearpeak.qk_norm_inference.default


def qk_norm(query, key, query_weight=None, key_weight=None, eps=1e-6, *, offset=0.0, cast_first=False):
    """RMSNorm of query and key over head_dim in one call (QK-norm).

        y = x / sqrt(mean(x^2) + eps) * (offset + weight)          for x = query and x = key, mean over head_dim

    Args:
        query: (batch, heads, sequence, head_dim) or (batch, sequence, heads, head_dim), float32, bfloat16, float16 or
            float64. Slices of a packed projection and transposed heads are read where they lie; the results are laid
            out in memory as query and key are.
        key: the same with its own number of heads (and, if so be, its own length), query's dtype.
        query_weight, key_weight: (head_dim,), in query's dtype or float32; None for no weight.
        eps: added to the mean square.
        offset: added to the weights; 1.0 is Gemma 3's form. Has no effect without a weight.
        cast_first: round the normalised values to query's dtype before they meet the weights, as Hugging Face's Qwen 3
            does; see `rms_norm`.

    Returns:
        (query', key').

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape or device that does not fit.

    Henry et al. 2020, https://arxiv.org/abs/2010.04245; Dehghani et al. 2023, https://arxiv.org/abs/2302.05442. CUDA
    C++ kernels exist for `rms_norm` only.

    >>> packed = torch.randn(2, 10, 8 + 2 + 2, 64)  # query, key and value heads of one projection
    >>> query, key = packed[:, :, :8], packed[:, :, 8:10]
    >>> query, key = nearpeak.qk_norm(query, key, torch.ones(64), torch.ones(64))
    """
    try:
        if backends.reference_serves(query, kernels=backends.WITHOUT_CUDA):
            _check(query, key, query_weight, key_weight)
            return reference.qk_norm(query, key, query_weight, key_weight, eps, offset, cast_first)
        recorded = operators.wants_gradient(query, key, query_weight, key_weight)
        serve = _qk_norm if recorded else _qk_norm_inference
        return serve(query, key, query_weight, key_weight, eps, offset, cast_first)
    except (AttributeError, RuntimeError, TypeError):
        _check(query, key, query_weight, key_weight)
        raise
