"""Ready masks for `create_block_mask`, and what combines them.

Each is, or makes, a `mask_mod(batch, head, query, key)` as torch's FlexAttention takes them: index tensors that
broadcast against each other in, booleans out, True where the query may look at the key. Queries and keys are both
counted from the first.

>>> mask_mod = nearpeak.masks.both(nearpeak.masks.causal, nearpeak.masks.documents(torch.tensor([0] * 120 + [1] * 80)))
>>> block_mask = nearpeak.create_block_mask(mask_mod, None, None, 200, 200)
"""

import torch


def causal(batch, head, query, key):
    """Keys up to the query's own: key <= query."""
    return query >= key


def sliding_window(left: int, right: int = 0):
    """Keys query - left .. query + right."""

    def mask_mod(batch, head, query, key):
        return (key >= query - left) & (key <= query + right)

    return mask_mod


def prefix_lm(prefix_lengths: torch.Tensor):
    """Causal, and all see the prefix: key <= query, or key < prefix_lengths[batch].

    prefix_lengths: (batch,), integers. PrefixLM of T5, Raffel et al. 2020, https://arxiv.org/abs/1910.10683.
    """

    def mask_mod(batch, head, query, key):
        return (query >= key) | (key < prefix_lengths[batch])

    return mask_mod


def chunked(size: int):
    """Keys of the query's own chunk: query // size == key // size. With `causal`, Llama 4's local attention."""
    if size < 1:
        raise ValueError(f"size must be positive, not {size}")

    def mask_mod(batch, head, query, key):
        return query // size == key // size

    return mask_mod


def documents(ids: torch.Tensor):
    """Keys of the query's own document: ids[query] == ids[key].

    ids: (sequence,) or (batch, sequence), the number of the document that each token belongs to.
    """
    if ids.dim() not in (1, 2):
        raise ValueError(f"ids must be (sequence,) or (batch, sequence), not of shape {tuple(ids.shape)}")

    def mask_mod(batch, head, query, key):
        if ids.dim() == 1:
            return ids[query] == ids[key]
        return ids[batch, query] == ids[batch, key]

    return mask_mod


def both(first, second):
    """What two masks allow."""

    def mask_mod(batch, head, query, key):
        return first(batch, head, query, key) & second(batch, head, query, key)

    return mask_mod


def either(first, second):
    """What one of two masks allows."""

    def mask_mod(batch, head, query, key):
        return first(batch, head, query, key) | second(batch, head, query, key)

    return mask_mod
