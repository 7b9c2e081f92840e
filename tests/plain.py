"""The plain PyTorch layers that users have today: what a kernel's error is held against.

Each takes the arguments of the family's reference, computes in the inputs' own dtype, and gets its gradients from
autograd.
"""

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps, offset):
    """torch's layer, or with an offset Gemma's as Hugging Face's transformers writes it."""
    if offset == 0.0 and (weight is None or weight.dtype is x.dtype):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    wide = x if x.dtype is torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * (offset + weight.to(wide.dtype))).to(x.dtype)


def add_rms_norm(x, residual, weight, eps, offset):
    hidden = x + residual
    return rms_norm(hidden, weight, eps, offset), hidden


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(x, residual, weight, bias, eps):
    hidden = x + residual
    return layer_norm(hidden, weight, bias, eps), hidden


def layer_norm_of_sum(x, residual, weight, bias, eps):
    return layer_norm(x + residual, weight, bias, eps)


def rotary(query, key, cos, sin, interleaved):
    """Hugging Face's formula, x * cos + rotate_half(x) * sin, with tables of full width in the wider dtype."""
    return _rotate(query, cos, sin, interleaved), _rotate(key, cos, sin, interleaved)


def _rotate(x, cos, sin, interleaved):
    if interleaved:
        cos, sin = (table.repeat_interleave(2, dim=-1).unsqueeze(-3) for table in (cos, sin))
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        cos, sin = (torch.cat((table, table), dim=-1).unsqueeze(-3) for table in (cos, sin))
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat((-b, a), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def attention(query, key, value, mask, scale, softcap, terms=(), sinks=None, factors=None):
    """softmax(query key^T scale) value in eager operators; mask is True where a query may look at a key.

    terms: tensors that are added to the scores. sinks: the score per head of one more key, without a value.
    factors: by which dropout multiplies the weights.
    Returns out and lse. Rows without any key give zeros, which the eager layer would turn into NaN.
    """
    if key.shape[1]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for term in terms:
        scores = scores + term
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores, mask = torch.cat((scores, column), -1), F.pad(mask, (0, 1), value=True)
        value = F.pad(value, (0, 0, 0, 1))
    sees_a_key = mask.any(-1, keepdim=True)
    lse = torch.logsumexp(scores.to(lse_dtype(query.dtype)).masked_fill(~mask, float("-inf")), dim=-1)
    probabilities = torch.softmax(scores.masked_fill(~mask & sees_a_key, float("-inf")), dim=-1)
    weights = probabilities * sees_a_key
    if factors is not None:
        weights = weights * (factors if sinks is None else F.pad(factors, (0, 1)))
    return weights.to(value.dtype) @ value, lse


def fused_attention(query, key, value, mask, scale):
    """F.scaled_dot_product_attention, which transformers runs by default. Returns out; it has no lse to give."""
    if key.shape[1]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(query, key, value, None if mask.all() else mask, scale=scale)


def lse_dtype(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


def value_and_gradients(function, inputs, grads=None):
    """Outputs of function(*inputs) and the gradients of every input, flat.

    inputs may hold None, which has no gradient. grads: one gradient per output; None computes outputs only.
    Asserts that neither the inputs nor the gradients are written to.
    """
    before = [None if t is None else t.clone() for t in (*inputs, *(grads or ()))]
    leaves = [None if t is None else t.detach().requires_grad_(grads is not None) for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = () if grads is None else torch.autograd.grad(outputs, [t for t in leaves if t is not None], grads)
    for tensor, clone in zip((*inputs, *(grads or ())), before, strict=True):
        assert tensor is None or torch.equal(tensor.nan_to_num(), clone.nan_to_num()), "a caller's tensor was written"
    return *(t.detach() for t in outputs), *gradients


def doubled(tensors):
    """The same tensors in float64."""
    return tuple(None if t is None else t.double() for t in tensors)
