"""The definition of embeddings: the sum of a row of each table, normalised and dropped from where that is asked for.

    hidden = scale * weight[id] + positions[position] + segments[segment]
    y      = dropout(hidden)                                     without a norm
    y      = dropout((hidden - mean(hidden)) / sqrt(variance(hidden) + eps) * norm_weight + norm_bias)

The arithmetic is float32 (float64 for float64), rounded once at the end. Without position_ids positions count from 0
along the last dimension of the ids; without segment_ids every token is of segment 0. scale = sqrt(width) is that of
Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.4, and of Gemma; three tables and LayerNorm are Devlin
et al. 2018, https://arxiv.org/abs/1810.04805, figure 2.
"""

import torch

from .. import dropout
from ..norm import reference as norm
from ..operators import widened


def embedding(
    ids, weight, positions, position_ids, segments, segment_ids, norm_weight, norm_bias, scale, eps,
    dropout_seed, dropout_p, padding_idx, sparse,
):  # fmt: skip
    words = torch.nn.functional.embedding(ids, weight, padding_idx if padding_idx >= 0 else None, sparse=sparse)
    y = _hidden(ids, words, positions, position_ids, segments, segment_ids, scale)
    if eps is not None:
        y = norm.unrounded_layer_norm(y, norm_weight, norm_bias, eps)
    return _dropped(y, dropout_seed, dropout_p).to(weight.dtype)


def hidden_gradient(
    grad, ids, weight, positions, position_ids, segments, segment_ids, norm_weight, norm_bias, scale, eps,
    dropout_seed, dropout_p,
):  # fmt: skip
    """Gradients of y with respect to `hidden`, (tokens, width), and to norm_weight and norm_bias, empty without."""
    wide = _dropped(widened(grad), dropout_seed, dropout_p)
    d_weight, d_bias = weight.new_empty(0), weight.new_empty(0)
    if eps is not None:
        hidden = _hidden(ids, weight[ids], positions, position_ids, segments, segment_ids, scale)
        wide, d_weight, d_bias = norm.layer_norm_backward(wide, hidden, norm_weight, norm_bias, None, eps)
    tokens = wide.reshape(ids.numel(), weight.shape[1]).to(grad.dtype, copy=True)
    return tokens, *(weight.new_empty(0) if d.numel() == 0 else d for d in (d_weight, d_bias))


def table_gradient(d_hidden, ids, rows, scale, padding_idx):
    """The gradient of a table of `rows` rows: scale * the sum of d_hidden, (tokens, width), over each row's tokens.

    ids: of the first tokens, again and again for the others. padding_idx: a row that gets none, or -1.
    """
    wide = widened(d_hidden)
    ids = ids.flatten().repeat(len(wide) // max(1, ids.numel()))
    sums = wide.new_zeros(rows, wide.shape[1]).index_add_(0, ids, wide)
    if padding_idx >= 0:
        sums[padding_idx] = 0.0
    return (scale * sums).to(d_hidden.dtype)


def position_numbers(ids):
    """What position_ids are where none are given."""
    return torch.arange(ids.shape[-1], device=ids.device) if ids.dim() > 0 else torch.zeros_like(ids)


def _hidden(ids, words, positions, position_ids, segments, segment_ids, scale):
    hidden = scale * widened(words)
    if positions is not None:
        hidden = hidden + positions[position_numbers(ids) if position_ids is None else position_ids].to(hidden.dtype)
    if segments is not None:
        hidden = hidden + segments[0 if segment_ids is None else segment_ids].to(hidden.dtype)
    return hidden


def _dropped(values, seed, p):
    if p == 0.0:
        return values
    width = values.shape[-1]
    kept = dropout.kept(seed, p, (1, 1, values.numel() // width, width), (0, 0, 0)).view_as(values)
    return torch.where(kept, values / (1.0 - p), 0.0)
