"""Plain PyTorch layers that have no function of PyTorch's own: what a kernel's error is held against.

Each computes in the inputs' own dtype, and gets its gradients from autograd.
"""

import torch
import torch.nn.functional as F


def rotary(query, key, cos, sin, interleaved):
    """Hugging Face's formula, x * cos + rotate_half(x) * sin, with tables of full width in the wider dtype.

    Narrower tables turn as many of the first elements of a head, as in GPT-NeoX and Phi.
    """
    return _rotate(query, cos, sin, interleaved), _rotate(key, cos, sin, interleaved)


def _rotate(x, cos, sin, interleaved):
    x, rest = x.tensor_split([2 * cos.shape[-1]], dim=-1)
    if interleaved:
        cos, sin = (table.repeat_interleave(2, dim=-1).unsqueeze(-3) for table in (cos, sin))
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        cos, sin = (torch.cat((table, table), dim=-1).unsqueeze(-3) for table in (cos, sin))
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat((-b, a), dim=-1)
    return torch.cat(((x * cos + turned * sin).to(x.dtype), rest), dim=-1)


def attention(query, key, value, mask, scale, softcap, terms=(), sinks=None, factors=None, modify=None):
    """softmax(query key^T scale) value in eager operators; mask is True where a query may look at a key.

    modify: what becomes of the scaled scores. terms: tensors that are added to them. sinks: the score per head of one
    more key, without a value.
    factors: by which dropout multiplies the weights.
    Returns out and lse. Rows without any key give zeros, which the eager layer would turn into NaN.
    """
    if key.shape[1]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if modify is not None:
        scores = modify(scores)
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


def lse_dtype(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32
