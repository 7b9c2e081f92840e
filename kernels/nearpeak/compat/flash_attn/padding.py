"""flash_attn.bert_padding's functions: padded batches (batch, length, ...) to packed tokens (tokens, ...), and back.

Programs import them beside the functions for packed sequences.
"""

import torch

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]


def index_first_axis(input, indices):
    """The rows `indices`, (rows,), of a tensor (all rows, ...)."""
    return input[indices]


def index_put_first_axis(values, indices, first_axis_dim):
    """(first_axis_dim, ...), zero but for the rows `indices`, which are those of `values`."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """The tokens of a padded batch, one sequence behind the other.

    hidden_states: (batch, length, ...). attention_mask: (batch, length), 1 or True for tokens. unused_mask: the same,
    for places that are kept although they hold no token.

    Returns (tokens, indices of the tokens' places in the padded batch, cu_seqlens as int32, the longest sequence's
    length, number of tokens per sequence without those of unused_mask).
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, starts, lengths.max().item(), attention_mask.sum(-1, dtype=torch.int32)


def pad_input(hidden_states, indices, batch, seqlen):
    """The padded batch (batch, seqlen, ...) whose places `indices` hold the tokens, zero elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
