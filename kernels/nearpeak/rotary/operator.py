"""The torch operators of rotary position embedding, and its public function."""

import torch

from .. import backends, operators
from ..checks import check_dense_last, check_floating, check_same_kind
from . import reference

if backends.missing("triton") is None:
    from . import triton_rotary as triton_kernels
else:
    triton_kernels = None


def _save_for_rotary(ctx, inputs, output):
    _, _, cos, sin, ctx.interleaved, ctx.inverse, ctx.rotary_dim = inputs
    ctx.save_for_backward(cos, sin)


def _rotary_gradient(ctx, grad_query, grad_key):
    cos, sin = ctx.saved_tensors
    d_query, d_key = torch.ops.nearpeak.apply_rotary(
        _dense_last(grad_query), _dense_last(grad_key), cos, sin, ctx.interleaved, not ctx.inverse, ctx.rotary_dim
    )
    return d_query, d_key, None, None, None, None, None


def _dense_last(grad):
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _check_heads(query, key):
    check_floating("query", query)
    check_same_kind("key", key, "query", query)
    query_shape, key_shape = query.shape, key.shape
    for name, shape in (("query", query_shape), ("key", key_shape)):
        if len(shape) != 4:
            raise ValueError(f"{name} must be (batch, heads, sequence, head_dim), not shape {tuple(shape)}")
    batch, _, sequence, head_dim = query_shape
    if key_shape[0] != batch or key_shape[2] != sequence or key_shape[3] != head_dim:
        raise ValueError(
            f"key must have query's batch, sequence and head_dim, {(batch, sequence, head_dim)}, "
            f"not shape {tuple(key_shape)}"
        )
    if query.stride(3) != 1 or key.stride(3) != 1:
        check_dense_last("query", query)
        check_dense_last("key", key)


def _check_rotary_dim(rotary_dim, query):
    head_dim = query.shape[3]
    if isinstance(rotary_dim, bool) or not isinstance(rotary_dim, (int, torch.SymInt)):
        raise TypeError(f"rotary_dim must be an int or None, not {type(rotary_dim).__name__}")
    if 2 <= rotary_dim <= head_dim and rotary_dim % 2 == 0:
        return
    if rotary_dim == head_dim:
        raise ValueError(f"query must have an even head_dim of at least 2, or a smaller rotary_dim, not {head_dim}")
    raise ValueError(f"rotary_dim must be even, at least 2 and at most head_dim = {head_dim}, not {rotary_dim}")


def _check_tables(cos, sin, query, rotary_dim):
    check_floating("cos", cos)
    check_same_kind("sin", sin, "cos", cos)
    if cos.device != query.device:
        raise ValueError(f"cos and sin must be on query's device {query.device}, not on {cos.device}")
    if cos.dtype is not query.dtype and cos.dtype is not torch.float32:
        raise TypeError(f"cos and sin must be {query.dtype} as query, or float32, not {cos.dtype}")
    shape = cos.shape
    if sin.shape != shape:
        raise ValueError(f"sin must have cos's shape, {tuple(shape)}, not {tuple(sin.shape)}")
    batch, _, sequence, _ = query.shape
    if not 2 <= len(shape) <= 3 or shape[-2] != sequence or (len(shape) == 3 and shape[0] not in (1, batch)):
        raise ValueError(
            f"cos and sin must be (sequence, width) or (batch or 1, sequence, width) with sequence {sequence}, "
            f"not shape {tuple(shape)}"
        )
    if shape[-1] not in (rotary_dim // 2, rotary_dim):
        name = "head_dim" if rotary_dim == query.shape[3] else "rotary_dim"
        raise ValueError(f"cos and sin must be {name} / 2 = {rotary_dim // 2} or {name} wide, not {shape[-1]}")
    if cos.stride(-1) != 1 or sin.stride(-1) != 1:
        check_dense_last("cos", cos)
        check_dense_last("sin", sin)


def _check(query, key, cos, sin, interleaved, inverse, rotary_dim):
    _check_heads(query, key)
    _check_rotary_dim(rotary_dim, query)
    _check_tables(cos, sin, query, rotary_dim)


def _check_written(query, key, cos, sin, interleaved, inverse, rotary_dim):
    _check(query, key, cos, sin, interleaved, inverse, rotary_dim)
    for name, tensor in (("query", query), ("key", key)):
        if 0 in [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]:
            raise ValueError(f"{name} must not be expanded where inplace is given: call {name}.contiguous() first")
    if key is query:
        raise ValueError("key must be another tensor than query where inplace is given: it would be turned twice")


operators.define(
    "apply_rotary(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved, bool inverse, "
    "SymInt rotary_dim) -> (Tensor, Tensor)",
    check=_check,
    reference=reference.apply_rotary,
    shapes=lambda query, key, cos, sin, interleaved, inverse, rotary_dim: (
        operators.empty_laid_out_like(query),
        operators.empty_laid_out_like(key),
    ),
    triton=triton_kernels and triton_kernels.apply_rotary,
    cuda=True,
    backward=_rotary_gradient,
    setup_context=_save_for_rotary,
)
operators.define(
    "apply_rotary_(Tensor(a!) query, Tensor(b!) key, Tensor cos, Tensor sin, bool interleaved, bool inverse, "
    "SymInt rotary_dim) -> ()",
    check=_check_written,
    reference=reference.apply_rotary_,
    shapes=lambda query, key, cos, sin, interleaved, inverse, rotary_dim: None,
    triton=triton_kernels and triton_kernels.apply_rotary_,
    cuda=True,
)

# Looked up once: each attribute of torch.ops costs 0.1 us a call.
_apply_rotary = torch.ops.nearpeak.apply_rotary.default
_apply_rotary_inference = torch.ops.nearpeak.apply_rotary_inference.default
_apply_rotary_ = torch.ops.nearpeak.apply_rotary_.default


def apply_rotary(query, key, cos, sin, *, interleaved=False, rotary_dim=None, inplace=False):
    """Rotary position embedding of query and key in one pass.

        a' = a cos - b sin,   b' = b cos + a sin

    for each pair (a, b) = (x[i], x[i + rotary_dim / 2]), or with `interleaved` (x[2i], x[2i + 1]), of the first
    rotary_dim elements of each head; the others stay what they are.

    Args:
        query: (batch, query heads, sequence, head_dim), float32, bfloat16, float16 or float64; any strides with a
            dense last dimension, and the results are laid out in memory as query and key are.
        key: (batch, key heads, sequence, head_dim), query's dtype.
        cos, sin: (sequence, rotary_dim / 2) or (batch or 1, sequence, rotary_dim / 2), float32 or query's dtype. Tables
            of full width rotary_dim, as Hugging Face makes them, are taken to repeat themselves, and one half is read.
        interleaved: which elements make a pair, see above.
        rotary_dim: how many elements of each head turn: all of them (None), or the first ones, as in GPT-NeoX and Phi.
        inplace: write into query and key, and return them. Refused where autograd records the call.

    Returns:
        (query', key').

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape, device or stride that does not fit, or `inplace`
        where gradients are recorded.

    Su et al. 2021, https://arxiv.org/abs/2104.09864.

    >>> angles = torch.outer(torch.arange(10.0), 1e4 ** -(torch.arange(0, 64, 2) / 64))
    >>> query, key = torch.randn(1, 8, 10, 64), torch.randn(1, 2, 10, 64)
    >>> query, key = nearpeak.apply_rotary(query, key, angles.cos(), angles.sin())
    >>> query, key = nearpeak.apply_rotary(query, key, angles[:, :16].cos(), angles[:, :16].sin(), rotary_dim=32)
    """
    check = _check_written if inplace else _check
    try:
        by_reference = backends.reference_serves(query)
        rotary_dim = query.shape[-1] if rotary_dim is None else rotary_dim
        recorded = operators.wants_gradient(query, key, cos, sin)
        if recorded and inplace:
            raise ValueError(
                "inplace cannot be used where gradients are recorded: leave it out, or use torch.no_grad()"
            )
        if recorded and not by_reference and operators.wants_gradient(cos, sin):
            by_reference = True
            backends.because("cos or sin wants a gradient, which no kernel computes: the reference serves it")
        if interleaved and cos.shape[-1] == rotary_dim:
            cos, sin = cos[..., 0::2].contiguous(), sin[..., 0::2].contiguous()
        if by_reference:
            check(query, key, cos, sin, interleaved, False, rotary_dim)
            serve = reference.apply_rotary_ if inplace else reference.apply_rotary
        elif inplace:
            serve = _apply_rotary_
        else:
            serve = _apply_rotary if recorded else _apply_rotary_inference
        turned = serve(query, key, cos, sin, interleaved, False, rotary_dim)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        check(query, key, cos, sin, interleaved, False, rotary_dim)
        raise
    if not inplace:
        return turned
    operators.mark_written(query, key)
    return query, key
