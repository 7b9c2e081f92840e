"""The definition of attention.

    scores = scale * query key^T                    (query head h reads key head h // (query heads / key heads))
    scores = softcap * tanh(scores / softcap)       (with a softcap)
    scores = -inf where the mask forbids            (bottom-right causal, sliding window)
    lse    = log(sum(exp(scores)))
    out    = exp(scores - lse) value

Row i of query stands at position p = i + (key length - query length), so that the last query sees the last key;
it may look at keys p - window_left .. p + window_right (causal: window_right = 0). A row that may look at no key
gives zeros and lse = -inf. Arithmetic in float32 (float64 for float64), rounded once at the end.
Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1; GQA: https://arxiv.org/abs/2305.13245.
"""

import torch

from ..operators import empty_laid_out_like, widened, without_autocast


def allowed(query_length, key_length, window_left, window_right, device):
    """The (query_length, key_length) mask: True where a query may look at a key."""
    distance = torch.arange(key_length, device=device) - (
        torch.arange(query_length, device=device)[:, None] + (key_length - query_length)
    )
    mask = torch.ones_like(distance, dtype=torch.bool)
    if window_left is not None:
        mask &= distance >= -window_left
    if window_right is not None:
        mask &= distance <= window_right
    return mask


def _scaled_products(query, key, scale):
    """(batch, key heads, group, query length, key length)"""
    return scale * torch.einsum("bhgqd,bhgkd->bhgqk", query, key)


def _scores(products, window_left, window_right, softcap):
    """The products capped and masked."""
    scores = products if softcap is None else softcap * torch.tanh(products / softcap)
    mask = allowed(*products.shape[-2:], window_left, window_right, products.device)
    return scores.masked_fill(~mask, float("-inf"))


def _probabilities(scores):
    """exp(scores - lse), zeros where a row may look at no key; as softmax, which errs 1.3 times less in float32."""
    no_key = (scores == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(no_key, 0.0), dim=-1).masked_fill(no_key, 0.0)


def _grouped(tensor, key_heads):
    """(batch, heads, ...) as (batch, key heads, group, ...)."""
    return tensor.unflatten(1, (key_heads, tensor.shape[1] // max(1, key_heads)))


def _shared(tensor, group):
    """(batch, key heads, ...) for each head of the group, so that its gradient is summed over queries first.

    One sum over queries and group is so long that float32 shows it.
    """
    return tensor.unsqueeze(2).expand(-1, -1, group, -1, -1)


def attention(query, key, value, window_left, window_right, scale, softcap):
    q = _grouped(widened(query), key.shape[1])
    k, v = (_shared(widened(tensor), q.shape[2]) for tensor in (key, value))
    with without_autocast(query.device):
        scores = _scores(_scaled_products(q, k, scale), window_left, window_right, softcap)
        lse = torch.logsumexp(scores, dim=-1)
        out = torch.einsum("bhgqk,bhgkd->bhgqd", _probabilities(scores), v).flatten(1, 2)
    return empty_laid_out_like(query, value.shape[-1]).copy_(out), lse.flatten(1, 2)


def attention_backward(grad_out, grad_lse, query, key, value, out, lse, window_left, window_right, scale, softcap):
    """Gradients of `attention`, recomputing the probabilities.

        P   = exp(scores - lse)                            dV = P^T dOut
        dP  = dOut V^T                                     dS = P (dP - rowsum(P dP) + dlse)
        dS  = dS (1 - tanh(scores / softcap)^2)            dQ = scale dS K,  dK = scale dS^T Q

    `out` and `lse` are there for kernels, which never hold a whole row of P: rowsum(P dP) is rowsum(dOut out).
    """
    heads = key.shape[1]
    q = _grouped(widened(query), heads)
    k, v = (_shared(widened(tensor), q.shape[2]) for tensor in (key, value))
    d_out = _grouped(widened(grad_out), heads)
    with without_autocast(query.device):
        products = _scaled_products(q, k, scale)
        probabilities = _probabilities(_scores(products, window_left, window_right, softcap))
        # Summed over queries first: see _shared.
        d_value = torch.einsum("bhgqk,bhgqd->bhgkd", probabilities, d_out).sum(2)
        d_scores = torch.einsum("bhgqd,bhgkd->bhgqk", d_out, v)
        d_scores = d_scores - (probabilities * d_scores).sum(-1, keepdim=True)
        if grad_lse is not None:
            d_scores = d_scores + _grouped(grad_lse, heads)[..., None]
        d_scores = probabilities * d_scores
        if softcap is not None:
            d_scores = d_scores * (1 - torch.tanh(products / softcap).square())
        d_query = scale * torch.einsum("bhgqk,bhgkd->bhgqd", d_scores, k).flatten(1, 2)
        d_key = scale * torch.einsum("bhgqk,bhgqd->bhgkd", d_scores, q).sum(2)
    gradients = ((query, d_query), (key, d_key), (value, d_value))
    return tuple(empty_laid_out_like(tensor).copy_(gradient) for tensor, gradient in gradients)
