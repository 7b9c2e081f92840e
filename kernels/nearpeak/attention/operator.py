"""The torch operators of attention, and its full public function.

Backward recomputes the probabilities from lse: block by block in the C++ and Triton kernels, in memory that grows with
the length of the sequence; elsewhere by the reference's formula in plain PyTorch, which holds the scores of the whole
sequence.
"""

import math

import torch

from .. import backends, operators
from ..checks import check_dense_last, check_floating, check_same, check_same_kind
from . import reference

if backends.missing("triton") is None:
    from . import triton_attention as triton_kernels
else:
    triton_kernels = None

MAX_HEAD_DIM = 256
OPEN = (None, None)


def _shapes(query, key, value, window_left, window_right, scale, softcap):
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return operators.empty_laid_out_like(query, value.shape[-1]), lse


def _save_for_attention(ctx, inputs, output):
    query, key, value, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.set_materialize_grads(False)


def _attention_gradient(ctx, grad_out, grad_lse):
    query, key, value, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    gradients = torch.ops.nearpeak.attention_backward(grad_out, grad_lse, query, key, value, out, lse, *ctx.options)
    return *gradients, None, None, None, None


def _check(query, key, value):
    check_floating("query", query)
    check_same_kind("key", key, "query", query)
    check_same_kind("value", value, "query", query)
    query_shape, key_shape = query.shape, key.shape
    for name, shape in (("query", query_shape), ("key", key_shape)):
        if len(shape) != 4:
            raise ValueError(f"{name} must be (batch, heads, sequence, head_dim), not shape {tuple(shape)}")
    if value.shape != key_shape:
        raise ValueError(f"value must have key's shape {tuple(key_shape)}, not {tuple(value.shape)}")
    batch, heads, _, head_dim = query_shape
    key_batch, key_heads, _, key_dim = key_shape
    if key_batch != batch or key_dim != head_dim:
        raise ValueError(f"key must have query's batch {batch} and head_dim {head_dim}, not shape {tuple(key_shape)}")
    if (key_heads == 0 and heads > 0) or (key_heads > 0 and heads % key_heads):
        raise ValueError(f"key must have a number of heads that divides query's {heads}, not {key_heads}")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"query must have a head_dim of 1 to {MAX_HEAD_DIM}, not {head_dim}")
    if query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
        check_dense_last("query", query)
        check_dense_last("key", key)
        check_dense_last("value", value)


def _check_window(window):
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window must be a pair (left, right) of integers or None, not {window!r}")
    for side in window:
        if side is not None and not isinstance(side, (int, torch.SymInt)):
            raise ValueError(f"window must be a pair (left, right) of integers or None, not {window!r}")


def _check_softcap(softcap):
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        raise ValueError(f"softcap must be positive and finite, or None for no softcap, not {softcap!r}")


def _check_forward(query, key, value, window_left, window_right, scale, softcap):
    _check(query, key, value)
    _check_softcap(softcap)


def _check_backward(grad_out, grad_lse, query, key, value, out, lse, *options):
    _check_forward(query, key, value, *options)
    check_same("out", out, "query", query, "shape", "dtype", "device")
    check_same("grad_out", grad_out, "query", query, "shape", "dtype", "device")
    for name, tensor in (("lse", lse), ("grad_lse", grad_lse)):
        if tensor is not None and (tensor.shape != query.shape[:3] or tensor.device != query.device):
            raise ValueError(f"{name} must have query's shape without head_dim, and its device")


operators.define(
    "attention(Tensor query, Tensor key, Tensor value, SymInt? window_left, SymInt? window_right, float scale, "
    "float? softcap) -> (Tensor, Tensor)",
    check=_check_forward,
    reference=reference.attention,
    shapes=_shapes,
    triton=triton_kernels and triton_kernels.attention,
    backward=_attention_gradient,
    setup_context=_save_for_attention,
)
operators.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor lse, SymInt? window_left, SymInt? window_right, float scale, float? softcap) -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    reference=reference.attention_backward,
    shapes=lambda grad_out, grad_lse, query, key, value, *rest: tuple(
        operators.empty_laid_out_like(t) for t in (query, key, value)
    ),
    triton=triton_kernels and triton_kernels.attention_backward,
)

# Looked up once: each attribute of torch.ops costs 0.1 us a call.
_attention = torch.ops.nearpeak.attention.default
_attention_inference = torch.ops.nearpeak.attention_inference.default


def attention(query, key, value, *, causal=False, window=OPEN, scale=None, softcap=None, return_lse=False):
    """Attention: softmax(scale query key^T) value, without ever holding the scores of a whole sequence.

        scores = scale * query key^T;   scores = softcap * tanh(scores / softcap)
        out    = exp(scores - lse) value,   lse = log(sum(exp(scores)))

    Row i of query stands at position p = i + (key length - query length), so that the last query sees the last
    key, as a KV cache needs. A row that may look at no key gives zeros and lse = -inf.

    Args:
        query: (batch, heads, query length, head_dim), float32, bfloat16, float16 or float64; head_dim 1..256; any
            strides with a dense last dimension, and `out` is laid out in memory as query is.
        key, value: (batch, key heads, key length, head_dim), query's dtype. key heads must divide query's heads
            (grouped-query attention): query head h reads key head h // (heads / key heads).
        causal: only keys at positions <= p.
        window: (left, right), only keys at p - left .. p + right; None leaves a side open.
        scale: None means 1 / sqrt(head_dim).
        softcap: None for none.
        return_lse: also return lse.

    Returns:
        out, query's shape and dtype; or with `return_lse` the pair (out, lse), lse being the natural logarithm in
        float32 (float64 for float64), of shape (batch, heads, query length). Gradients flow through both.

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape, device, stride or option that does not fit.

    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; online softmax: Milakov and Gimelshein 2018,
    https://arxiv.org/abs/1805.02867; tiling: Dao 2023, https://arxiv.org/abs/2307.08691.

    >>> query, key = torch.randn(1, 8, 10, 64), torch.randn(1, 2, 100, 64)
    >>> out, lse = nearpeak.attention(query, key, key, causal=True, window=(64, None), return_lse=True)
    """
    if window is not OPEN:
        _check_window(window)
    if softcap is not None:
        _check_softcap(softcap)
    left, right = window
    if causal:
        right = 0 if right is None else min(right, 0)
    try:
        if scale is None:
            scale = 1.0 / math.sqrt(query.shape[-1])
        if backends.reference_serves(query, kernels=backends.WITHOUT_CUDA):
            _check(query, key, value)
            serve = reference.attention
        elif operators.wants_gradient(query, key, value):
            serve = _attention
        else:
            serve = _attention_inference
        out, lse = serve(query, key, value, left, right, scale, softcap)
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError):
        _check(query, key, value)
        raise
    return (out, lse) if return_lse else out
