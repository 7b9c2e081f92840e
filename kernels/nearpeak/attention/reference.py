"""The definition of attention.

    scores = scale * query key^T                    (query head h reads key head h // (query heads / key heads))
    scores = softcap * tanh(scores / softcap)       (with a softcap)
    scores = score_mod(scores, ...)                 (with one: score_mod.py)
    scores = scores + bias                          (with an additive bias)
    scores = scores - slope |p - k|                 (with ALiBi: a slope per head, p and k the positions)
    scores = -inf where a mask forbids              (bottom-right causal, sliding window, boolean mask)
    lse    = log(exp(sink) + sum(exp(scores)))      (a learned sink per head; without, the sum alone)
    out    = (exp(scores - lse) kept / (1 - p)) value    (with dropout: kept is 0 or 1; lse is without)

Row i of query stands at position p = i + (key length - query length), so that the last query sees the last key;
it may look at keys p - window_left .. p + window_right (causal: window_right = 0). A row that may look at no key
gives zeros and lse = -inf (its sink, if there is one). Arithmetic in float32 (float64 for float64), rounded once at the
end. Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1; GQA: https://arxiv.org/abs/2305.13245; ALiBi:
https://arxiv.org/abs/2108.12409; sinks: https://arxiv.org/abs/2309.17453.
"""

import torch

from .. import dropout
from ..operators import empty_laid_out_like, widened, without_autocast
from . import block_mask
from .score_program import run as run_score_program


def distances(query_length, key_length, device):
    """(query_length, key_length): how far each key lies behind (negative) or ahead of each query's position."""
    positions = torch.arange(query_length, device=device)[:, None] + (key_length - query_length)
    return torch.arange(key_length, device=device) - positions


def allowed(query_length, key_length, window_left, window_right, device):
    """The (query_length, key_length) mask: True where a query may look at a key."""
    distance = distances(query_length, key_length, device)
    mask = torch.ones_like(distance, dtype=torch.bool)
    if window_left is not None:
        mask &= distance >= -window_left
    if window_right is not None:
        mask &= distance <= window_right
    return mask


def _scaled_products(query, key, scale):
    """(batch, key heads, group, query length, key length)"""
    return scale * torch.einsum("bhgqd,bhgkd->bhgqk", query, key)


def _scores(products, window_left, window_right, softcap, mask, bias, alibi_slopes, modify):
    """The products capped, modified, biased and masked."""
    lengths, device = products.shape[-2:], products.device
    scores = products if softcap is None else softcap * torch.tanh(products / softcap)
    if modify is not None:
        scores = modify(scores)
    if bias is not None:
        scores = scores + _of_pairs(bias, scores).to(scores.dtype)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype).reshape(-1, *products.shape[1:3], 1, 1)
        scores = scores - slopes * distances(*lengths, device).abs()
    forbidden = ~allowed(*lengths, window_left, window_right, device)
    if mask is not None:
        forbidden = forbidden | ~_of_pairs(mask, scores)
    return scores.masked_fill(forbidden, float("-inf"))


def _modifier(program, tensors, first):
    """What a score program makes of scores; with `derivative` of their derivative too."""
    if program is None:
        return None
    return lambda scores, derivative=False: run_score_program(program, tensors or (), scores, first, derivative)


def _softmax(scores, sinks):
    """exp(scores - lse), zeros where a row may look at no key, and lse. torch's softmax errs 1.3 times less."""
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
        probabilities, lse = _softmax(torch.cat((scores, column), dim=-1), None)
        return probabilities[..., :-1], lse
    no_key = (scores == float("-inf")).all(-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(no_key, 0.0), dim=-1).masked_fill(no_key, 0.0)
    return probabilities, torch.logsumexp(scores, dim=-1)


def _dropped(weights, dropout_seed, dropout_p, first):
    """The weights, (batch, key heads, group, query length, key length), that dropout keeps, scaled; zeros elsewhere."""
    if dropout_p == 0.0:
        return weights
    kept = dropout.kept(dropout_seed, dropout_p, weights.flatten(1, 2).shape, first)
    return weights.where(_grouped(kept, weights.shape[1]), 0.0) / (1.0 - dropout_p)


def _grouped(tensor, key_heads):
    """(batch, heads, ...) as (batch, key heads, group, ...)."""
    return tensor.unflatten(1, (key_heads, tensor.shape[1] // max(1, key_heads)))


def _of_pairs(tensor, scores):
    """A mask or bias that broadcasts against (batch, heads, query length, key length), to broadcast against scores."""
    return tensor.unsqueeze(2) if tensor.shape[1] == 1 else _grouped(tensor, scores.shape[1])


def _shared(tensor, group):
    """(batch, key heads, ...) for each head of the group, so that its gradient is summed over queries first.

    One sum over queries and group is so long that float32 shows it.
    """
    return tensor.unsqueeze(2).expand(-1, -1, group, -1, -1)


def sequences(query, key, query_starts, key_starts, key_ends):
    """(batch, queries, keys) of each sequence, the last two slices; none where nothing bounds them.

    Raises ValueError where the bounds do not fit.
    """
    if query_starts is None and key_starts is None and key_ends is None:
        return []
    packed = query_starts is not None
    starts = query_starts.tolist() if packed else None
    count = len(starts) - 1 if packed else query.shape[0]
    begins = [0] * count if key_starts is None else key_starts.tolist()
    whole = begins[1:] if packed else [key.shape[2]] * count
    ends = whole if key_ends is None else key_ends.tolist()
    if packed and (
        query.shape[0] != 1 or not starts or starts[0] != 0 or starts[-1] != query.shape[2] or starts != sorted(starts)
    ):
        raise ValueError(
            f"query_starts must rise from 0 to query's length {query.shape[2]} in a batch of 1, not {query_starts}"
        )
    if len(begins) != count + packed or len(ends) != count:
        raise ValueError(
            f"key_starts and key_ends must fit {count} sequences, not {len(begins)} and {len(ends)} numbers"
        )
    if not all(0 <= begin <= end <= key.shape[2] for begin, end in zip(begins, ends, strict=False)):
        raise ValueError(f"key_starts and key_ends must lie within 0..{key.shape[2]}, starts before ends")
    parts = []
    for index in range(count):
        queries = slice(starts[index], starts[index + 1]) if packed else slice(None)
        parts.append((0 if packed else index, queries, slice(begins[index], ends[index])))
    return parts


def _rows(tensor, batch, rows):
    """Of a tensor (batch, heads, length, ...), the rows of one sequence."""
    return None if tensor is None else tensor[batch : batch + 1, :, rows]


def _pairs(tensor, batch, queries, keys):
    """Of a mask or bias, whose sizes of 1 broadcast, the part of one sequence."""
    if tensor is None:
        return None
    tensor = tensor[batch : batch + 1] if tensor.shape[0] > 1 else tensor
    return tensor[..., keys] if tensor.shape[2] == 1 else tensor[:, :, queries, keys]


def _terms_of(sequence, mask, bias, alibi_slopes, sinks):
    """The terms of the scores of one sequence."""
    batch = sequence[0]
    if alibi_slopes is not None and alibi_slopes.dim() == 2:
        alibi_slopes = alibi_slopes[batch : batch + 1]
    return _pairs(mask, *sequence), _pairs(bias, *sequence), alibi_slopes, sinks


def _first(batch, queries, keys):
    """Where a sequence begins: its batch entry, row and key."""
    return batch, queries.start or 0, keys.start


def _attention_of_sequences(parts, packed, query, key, value, options, terms, others):
    results = [
        attention(
            _rows(query, batch, queries), _rows(key, batch, keys), _rows(value, batch, keys),
            *options, *_terms_of((batch, queries, keys), *terms), **others, first=_first(batch, queries, keys),
        )
        for batch, queries, keys in parts
    ]  # fmt: skip
    out, lse = (torch.cat(each, 2 if packed else 0) for each in zip(*results, strict=True))
    return empty_laid_out_like(query, value.shape[-1]).copy_(out), lse


def attention(
    query, key, value, window_left, window_right, scale, softcap,
    mask=None, bias=None, alibi_slopes=None, sinks=None, query_starts=None, key_starts=None, key_ends=None,
    dropout_seed=None, dropout_p=0.0, score_program=None, score_tensors=None, first=(0, 0, 0),
):  # fmt: skip
    """first: the batch entry, row and key that dropout and score_mod count the first ones as."""
    parts = sequences(query, key, query_starts, key_starts, key_ends)
    if parts:
        options, terms = (window_left, window_right, scale, softcap), (mask, bias, alibi_slopes, sinks)
        others = {"dropout_seed": dropout_seed, "dropout_p": dropout_p}
        others |= {"score_program": score_program, "score_tensors": score_tensors}
        return _attention_of_sequences(parts, query_starts is not None, query, key, value, options, terms, others)
    q = _grouped(widened(query), key.shape[1])
    k, v = (_shared(widened(tensor), q.shape[2]) for tensor in (key, value))
    with without_autocast(query.device):
        products = _scaled_products(q, k, scale)
        modify = _modifier(score_program, score_tensors, first)
        scores = _scores(products, window_left, window_right, softcap, mask, bias, alibi_slopes, modify)
        probabilities, lse = _softmax(scores, sinks)
        weights = _dropped(probabilities, dropout_seed, dropout_p, first)
        out = torch.einsum("bhgqk,bhgkd->bhgqd", weights, v).flatten(1, 2)
    return empty_laid_out_like(query, value.shape[-1]).copy_(out), lse.flatten(1, 2)


def attention_blocks(
    query, key, value, block_starts, block_entries, block_bits, window_left, window_right, scale, softcap,
    mask=None, *terms,
):  # fmt: skip
    """With a block mask (block_mask.py), which is a mask as any other."""
    mask = _with_blocks(mask, query, key, block_starts, block_entries, block_bits)
    return attention(query, key, value, window_left, window_right, scale, softcap, mask, *terms)


def _with_blocks(mask, query, key, *blocks):
    block_mask.check_lists(*blocks, key.shape[2])
    dense = block_mask.dense(*blocks, query.shape[2], key.shape[2])
    return dense if mask is None else mask & dense


def _attention_backward_of_sequences(parts, tensors, options, terms, others, bias_gradient):
    grad_out, grad_lse, query, key, value, out, lse = tensors
    bias = terms[1]
    gradients = [torch.zeros_like(widened(tensor)) for tensor in (query, key, value)]
    d_bias = torch.zeros_like(widened(bias)) if bias_gradient else query.new_empty(0)
    for batch, queries, keys in parts:
        *of_sequence, of_bias = attention_backward(
            *(_rows(tensor, batch, queries) for tensor in (grad_out, grad_lse, query)),
            *(_rows(tensor, batch, keys) for tensor in (key, value)),
            *(_rows(tensor, batch, queries) for tensor in (out, lse)),
            *options, *_terms_of((batch, queries, keys), *terms), **others, bias_gradient=bias_gradient,
            first=_first(batch, queries, keys),
        )  # fmt: skip
        for gradient, part, rows in zip(gradients, of_sequence, (queries, keys, keys), strict=True):
            _rows(gradient, batch, rows).add_(part)
        if bias_gradient:
            _pairs(d_bias, batch, queries, keys).add_(of_bias)
    laid_out = (empty_laid_out_like(t).copy_(g) for t, g in zip((query, key, value), gradients, strict=True))
    return *laid_out, d_bias.to(bias.dtype) if bias_gradient else d_bias


def attention_backward(
    grad_out, grad_lse, query, key, value, out, lse, window_left, window_right, scale, softcap,
    mask=None, bias=None, alibi_slopes=None, sinks=None,
    query_starts=None, key_starts=None, key_ends=None,
    dropout_seed=None, dropout_p=0.0, score_program=None, score_tensors=None, bias_gradient=False, first=(0, 0, 0),
):  # fmt: skip
    """Gradients of `attention`, recomputing the probabilities.

        P   = exp(scores - lse)                            dV = drop(P)^T dOut
        dP  = drop(dOut V^T)                               dS = P (dP - rowsum(P dP) + dlse),  dbias = dS
        dS  = dS (1 - tanh(scores / softcap)^2)            dQ = scale dS K,  dK = scale dS^T Q

    `out` and `lse` are there for kernels, which never hold a whole row of P: rowsum(P dP) is rowsum(dOut out).
    The last result is empty where `bias_gradient` does not ask for it.
    """
    parts = sequences(query, key, query_starts, key_starts, key_ends)
    if parts:
        options, terms = (window_left, window_right, scale, softcap), (mask, bias, alibi_slopes, sinks)
        tensors = grad_out, grad_lse, query, key, value, out, lse
        others = {"dropout_seed": dropout_seed, "dropout_p": dropout_p}
        others |= {"score_program": score_program, "score_tensors": score_tensors}
        return _attention_backward_of_sequences(parts, tensors, options, terms, others, bias_gradient)
    heads = key.shape[1]
    q = _grouped(widened(query), heads)
    k, v = (_shared(widened(tensor), q.shape[2]) for tensor in (key, value))
    d_out = _grouped(widened(grad_out), heads)
    with without_autocast(query.device):
        products = _scaled_products(q, k, scale)
        modify = _modifier(score_program, score_tensors, first)
        scores = _scores(products, window_left, window_right, softcap, mask, bias, alibi_slopes, modify)
        probabilities, _ = _softmax(scores, sinks)
        # Summed over queries first: see _shared.
        weights = _dropped(probabilities, dropout_seed, dropout_p, first)
        d_value = torch.einsum("bhgqk,bhgqd->bhgkd", weights, d_out).sum(2)
        d_scores = _dropped(torch.einsum("bhgqd,bhgkd->bhgqk", d_out, v), dropout_seed, dropout_p, first)
        d_scores = d_scores - (probabilities * d_scores).sum(-1, keepdim=True)
        if grad_lse is not None:
            d_scores = d_scores + _grouped(grad_lse, heads)[..., None]
        d_scores = probabilities * d_scores
        d_bias = d_scores.flatten(1, 2).sum_to_size(bias.shape).to(bias.dtype) if bias_gradient else query.new_empty(0)
        if modify is not None:
            capped = products if softcap is None else softcap * torch.tanh(products / softcap)
            slopes = modify(capped, derivative=True)[1]
            d_scores = torch.where(d_scores == 0.0, d_scores, d_scores * slopes)
        if softcap is not None:
            d_scores = d_scores * (1 - torch.tanh(products / softcap).square())
        d_query = scale * torch.einsum("bhgqk,bhgkd->bhgqd", d_scores, k).flatten(1, 2)
        d_key = scale * torch.einsum("bhgqk,bhgqd->bhgkd", d_scores, q).sum(2)
    gradients = ((query, d_query), (key, d_key), (value, d_value))
    return *(empty_laid_out_like(tensor).copy_(gradient) for tensor, gradient in gradients), d_bias


def attention_blocks_backward(
    grad_out, grad_lse, query, key, value, out, lse, block_starts, block_entries, block_bits,
    window_left, window_right, scale, softcap, mask=None, *terms,
):  # fmt: skip
    mask = _with_blocks(mask, query, key, block_starts, block_entries, block_bits)
    options = window_left, window_right, scale, softcap
    return attention_backward(grad_out, grad_lse, query, key, value, out, lse, *options, mask, *terms)


def sinks_gradient(grad_out, grad_lse, out, lse, sinks):
    """The gradient of `attention`'s sinks, each a key whose value is zero: P (dlse - rowsum(dOut out)).

    In float64 where the head_dim is gone: it costs nothing there.
    """
    probabilities = torch.exp(sinks.double()[:, None] - lse)
    d_scores = -(widened(grad_out) * widened(out)).sum(-1, dtype=torch.float64)
    if grad_lse is not None:
        d_scores = d_scores + grad_lse
    return (probabilities * d_scores).sum((0, 2)).to(sinks.dtype)
