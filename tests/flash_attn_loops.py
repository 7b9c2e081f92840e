"""flash-attn's meaning in plain loops over queries and keys, written from its documentation: what compat is held to."""

import inspect

import torch
from nearpeak.compat.flash_attn import flash_attn_func

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(flash_attn_func).parameters.items()
    if parameter.default is not parameter.empty
}


def seen_keys(position, key_length, causal, window_size):
    """The keys that a query at this position may look at."""
    left, right = window_size
    return [
        key
        for key in range(key_length)
        if (not causal or key <= position)
        and (left < 0 or key >= position - left)
        and (right < 0 or causal or key <= position + right)
    ]


def attend(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, slopes=None):
    """Of one sequence, (length, heads, head_dim): out, and lse of (heads, length)."""
    length, heads, head_dim = q.shape
    group = heads // k.shape[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out, lse = [], []
    for head in range(heads):
        of_key = head // group
        for query in range(length):
            position = query + k.shape[0] - length
            seen = seen_keys(position, k.shape[0], causal, window_size)
            if not seen:
                out.append(v.new_zeros(v.shape[2]))
                lse.append(v.new_tensor(-torch.inf))
                continue
            scores = torch.stack([(q[query, head] * k[key, of_key]).sum() * scale for key in seen])
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            if slopes is not None:
                scores = scores - slopes[head] * torch.tensor([abs(position - key) for key in seen])
            out.append((scores.softmax(0)[:, None] * v[seen, of_key]).sum(0))
            lse.append(scores.logsumexp(0))
    if not out:
        return q.new_zeros(*q.shape[:2], v.shape[2]), q.new_zeros(heads, length)
    return torch.stack(out).unflatten(0, (heads, length)).transpose(0, 1), torch.stack(lse).unflatten(
        0, (heads, length)
    )


def slopes_of(alibi_slopes, index):
    """One sequence's slopes, of (heads,) or (batch, heads)."""
    return alibi_slopes[index] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes


def turn(x, cos, sin, row, interleaved):
    """One head's vector, turned by a row of the tables in its first elements."""
    half = cos.shape[1]
    result = x.clone()
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        result[a] = x[a] * cos[row, pair] - x[b] * sin[row, pair]
        result[b] = x[b] * cos[row, pair] + x[a] * sin[row, pair]
    return result
