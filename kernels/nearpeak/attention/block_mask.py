"""Masks of the user's own, with the blocks that hide everything known up front.

A `mask_mod(batch, head, query, key)` says which query may look at which key, as in torch's FlexAttention: it takes
index tensors that broadcast against each other, and returns booleans. `create_block_mask` asks it once, and keeps per
block of queries a list of the blocks of keys that some query sees. Of those that are not seen whole it keeps the bits,
equal ones once. So memory and attention's work grow with the blocks that are listed.

FlexAttention: Dong et al. 2024, https://arxiv.org/abs/2412.05496.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

# Of blocks whose bits are computed at a time.
_TOGETHER = 256
# (batch, heads, blocks of queries, blocks of keys) in the order in which bits are collected.
_BY_QUERIES = (2, 0, 1, 3)


class BlockMask(NamedTuple):
    """Which query may look at which key, block by block. Made by `create_block_mask` or `BlockMask.from_torch`.

    starts: (batch or 1, heads or 1, blocks of queries + 1), int64: where each block's entries begin, and the last end.
    entries: (number, 2), int32: of each block of keys that is seen, in ascending order, its number, and which `bits`
        say what of it, or -1 where it is seen whole.
    bits: (number, rows of a block, keys of a block), boolean.

    >>> block_mask = nearpeak.create_block_mask(nearpeak.masks.prefix_lm(torch.tensor([5])), 1, None, 20, 20)
    >>> query = torch.randn(1, 2, 20, 64)
    >>> out = nearpeak.attention(query, query, query, block_mask=block_mask)
    """

    starts: torch.Tensor
    entries: torch.Tensor
    bits: torch.Tensor
    query_length: int
    key_length: int

    @classmethod
    def from_torch(cls, block_mask) -> "BlockMask":
        """A torch.nn.attention.flex_attention.BlockMask, whose mask_mod is asked about its partial blocks.

        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> causal = create_block_mask(nearpeak.masks.causal, None, None, 300, 300, device="cpu")
        >>> block_mask = nearpeak.BlockMask.from_torch(causal)
        """
        lengths, size = tuple(block_mask.seq_lengths), tuple(block_mask.BLOCK_SIZE)
        grid = _blocks(lengths[0], size[0]), _blocks(lengths[1], size[1])
        seen = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, grid)
        whole = torch.zeros_like(seen)
        asked = seen.permute(_BY_QUERIES).nonzero()
        bits, some, all_of_them = _bits_of(block_mask.mask_mod, asked, lengths, size)
        seen.permute(_BY_QUERIES)[tuple(asked.T)] = some
        whole.permute(_BY_QUERIES)[tuple(asked.T)] = all_of_them
        if block_mask.full_kv_num_blocks is not None:
            full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, grid)
            seen, whole = seen | full, whole | full
        return _built(seen, whole, bits[some & ~all_of_them], lengths)

    def dense(self) -> torch.Tensor:
        """(batch or 1, heads or 1, query length, key length), True where a query may look at a key."""
        return dense(self.starts, self.entries, self.bits, self.query_length, self.key_length)

    def density(self) -> float:
        """The share of all blocks that is listed: what attention costs beside attention without a mask."""
        blocks = self.starts[..., 1:].numel() * _blocks(self.key_length, self.bits.shape[2])
        return self.entries.shape[0] / max(1, blocks)

    def to(self, device: torch.device | str) -> "BlockMask":
        return self._replace(**{name: getattr(self, name).to(device) for name in ("starts", "entries", "bits")})


def create_block_mask(mask_mod, batch, heads, query_length, key_length, *, block_size=128, device="cpu") -> BlockMask:
    """Ask `mask_mod(batch, head, query, key)` for all queries and keys, a block of queries at a time.

    Args:
        mask_mod: takes four int64 tensors that broadcast against each other, and returns booleans that broadcast
            likewise, True where the query may look at the key; `nearpeak.masks` has ready ones. Queries and keys are
            both counted from the first: a causal mask is `query >= key`.
        batch, heads: how many, or None where the mask is the same for all of them.
        query_length, key_length: of the tensors that attention is given.
        block_size: of queries and keys, or a pair of both.
        device: where the mask is made, and attention runs.

    Raises:
        TypeError: mask_mod does not return booleans. ValueError: a size or length that cannot be, or a result that does
        not broadcast.

    >>> block_mask = nearpeak.create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 100), None, None, 300, 300)
    >>> query = torch.randn(1, 8, 300, 64)
    >>> out = nearpeak.attention(query, query, query, block_mask=block_mask)
    """
    size = block_size if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    if len(size) != 2 or not all(isinstance(each, int) and each > 0 for each in size):
        raise ValueError(f"block_size must be a positive integer or a pair of them, not {block_size!r}")
    if not all(count is None or (isinstance(count, int) and count > 0) for count in (batch, heads)):
        raise ValueError(f"batch and heads must be positive integers or None, not {batch!r} and {heads!r}")
    lengths = query_length, key_length
    if not all(isinstance(length, int) and length >= 0 for length in lengths):
        raise ValueError(f"query_length and key_length must be integers from 0 on, not {lengths}")
    outer = [1 if count is None else count for count in (batch, heads)]
    (rows, keys), key_blocks = size, _blocks(key_length, size[1])
    b, h, k = (torch.arange(count, device=device) for count in (*outer, key_length))
    seen, whole, bits = [], [], []
    for first in range(0, query_length, rows):
        q = torch.arange(first, min(first + rows, query_length), device=device)
        asked = b[:, None, None, None], h[:, None, None], q[:, None], k
        allowed = _asked(mask_mod, asked, (*outer, len(q), key_length)).to(torch.uint8)
        # Of what lies beyond the last query and key nothing is seen, and nothing counts.
        beyond = 0, key_blocks * keys - key_length, 0, rows - len(q)
        most, least = (F.pad(allowed, beyond, value=value).unflatten(-1, (-1, keys)) for value in (0, 1))
        seen.append(most.amax((-3, -1)).bool())
        whole.append(least.amin((-3, -1)).bool())
        bits.append(most.transpose(-3, -2)[seen[-1] & ~whole[-1]].bool())
    if not seen:
        nothing = torch.zeros(*outer, 0, key_blocks, dtype=torch.bool, device=device)
        return _built(nothing, nothing, nothing.new_empty(0, *size), lengths)
    return _built(torch.stack(seen, 2), torch.stack(whole, 2), torch.cat(bits), lengths)


def dense(starts, entries, bits, query_length, key_length) -> torch.Tensor:
    """(batch or 1, heads or 1, query length, key length), True where a query may look at a key."""
    (batch, heads, width), (_, rows, keys) = starts.shape, bits.shape
    counts = (starts[..., 1:] - starts[..., :-1]).flatten()
    lists = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    skipped = starts[..., :-1].flatten() - (counts.cumsum(0) - counts)  # entries that belong to no list
    number = torch.arange(lists.numel(), device=counts.device) + skipped[lists]
    blocks, parts = entries.long()[number].unbind(1)
    key_blocks = _blocks(key_length, keys)
    mask = torch.zeros(counts.numel(), key_blocks, rows, keys, dtype=torch.bool, device=counts.device)
    mask[lists, blocks] = torch.cat((bits, bits.new_ones(1, rows, keys)))[parts]  # -1 is the last one, which sees all
    mask = mask.view(batch, heads, width - 1, key_blocks, rows, keys).transpose(3, 4)
    return mask.reshape(batch, heads, (width - 1) * rows, key_blocks * keys)[:, :, :query_length, :key_length]


def check(block_mask, query, key) -> None:
    """Raise what names why a block mask does not fit query and key."""
    starts, entries, bits, query_length, key_length = block_mask
    for name, tensor, dtype, dims in (("starts", starts, torch.int64, 3), ("entries", entries, torch.int32, 2),
                                      ("bits", bits, torch.bool, 3)):  # fmt: skip
        if not isinstance(tensor, torch.Tensor) or tensor.dtype is not dtype:
            raise TypeError(f"block_mask.{name} must be a tensor of {dtype}")
        if tensor.dim() != dims or tensor.device != query.device:
            raise ValueError(f"block_mask.{name} must have {dims} dimensions, and query's device {query.device}")
    batch, heads, queries = query.shape[:3]
    if (query_length, key_length) != (queries, key.shape[2]):
        raise ValueError(
            f"block_mask must be of query's and key's lengths {queries} and {key.shape[2]}, "
            f"not {query_length} and {key_length}"
        )
    if starts.shape[0] not in (1, batch) or starts.shape[1] not in (1, heads):
        raise ValueError(
            f"block_mask must be of query's batch {batch} and heads {heads}, or of 1, not {tuple(starts.shape[:2])}"
        )
    if min(bits.shape[1:]) < 1 or starts.shape[2] != _blocks(queries, bits.shape[1]) + 1 or entries.shape[1] != 2:
        raise ValueError("block_mask.starts, entries and bits must have the shapes that BlockMask documents")


def fitted(block_mask, query, key) -> BlockMask:
    """A BlockMask that fits query and key, of ours or torch's."""
    if not isinstance(block_mask, BlockMask):
        if not hasattr(block_mask, "kv_num_blocks"):
            kind = type(block_mask).__name__
            raise TypeError(f"block_mask must be a nearpeak.BlockMask or torch's BlockMask, not {kind}")
        block_mask = BlockMask.from_torch(block_mask)
    check(block_mask, query, key)
    return block_mask


def check_lists(starts, entries, bits, key_length) -> None:
    """Raise ValueError where lists of blocks do not rise, or name entries, keys or bits that there are not."""
    first, last = starts[..., :-1].flatten(), starts[..., 1:].flatten()
    blocks, parts = entries.unbind(1)
    fits = not len(first) or bool(((first >= 0) & (first <= last) & (last <= len(entries))).all())
    if fits and len(entries):
        fits = bool(((blocks >= 0) & (blocks < _blocks(key_length, bits.shape[2]))).all())
        fits = fits and bool(((parts >= -1) & (parts < len(bits))).all())
        begins = torch.zeros(len(entries) + 1, dtype=torch.bool, device=entries.device)
        begins[first] = True
        fits = fits and bool((begins[1:-1] | (blocks[1:] > blocks[:-1])).all())
    if not fits:
        raise ValueError("block_mask's lists must rise, within its entries, key's blocks and its bits")


def _blocks(length, size) -> int:
    return (length + size - 1) // size


def _asked(mask_mod, indices, shape) -> torch.Tensor:
    allowed = mask_mod(*indices)
    if not isinstance(allowed, torch.Tensor) or allowed.dtype is not torch.bool:
        kind = allowed.dtype if isinstance(allowed, torch.Tensor) else type(allowed).__name__
        raise TypeError(f"mask_mod must return a tensor of booleans, not {kind}")
    try:
        return allowed.expand(shape)
    except RuntimeError:
        raise ValueError(f"mask_mod must return what broadcasts to {shape}, not {tuple(allowed.shape)}") from None


def _listed(counts, indices, grid) -> torch.Tensor:
    """(batch, heads, *grid), True at the blocks that the first `counts` of `indices` name."""
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    beyond = grid[1]  # a column more takes what is not valid
    listed = torch.zeros(*counts.shape, grid[1] + 1, dtype=torch.bool, device=indices.device)
    return listed.scatter_(-1, indices.long().where(valid, beyond), True)[..., :beyond]


def _bits_of(mask_mod, asked, lengths, size):
    """What mask_mod says of blocks, each (block of queries, batch, head, block of keys): their bits, False beyond the
    ends, and of each block whether it allows anything, and whether everything."""
    bits = torch.zeros(len(asked), *size, dtype=torch.bool, device=asked.device)
    all_of_them = torch.zeros(len(asked), dtype=torch.bool, device=asked.device)
    for first in range(0, len(asked), _TOGETHER):
        some = slice(first, first + _TOGETHER)
        query_block, b, h, key_block = (each[:, None, None] for each in asked[some].unbind(1))
        q = query_block * size[0] + torch.arange(size[0], device=asked.device)[:, None]
        k = key_block * size[1] + torch.arange(size[1], device=asked.device)
        within = b, h, q.clamp(max=lengths[0] - 1), k.clamp(max=lengths[1] - 1)
        allowed, inside = _asked(mask_mod, within, bits[some].shape), (q < lengths[0]) & (k < lengths[1])
        bits[some] = allowed & inside
        all_of_them[some] = (allowed | ~inside).flatten(1).all(1)
    return bits, bits.flatten(1).any(1), all_of_them


def _built(seen, whole, bits, lengths) -> BlockMask:
    """seen, whole: (batch, heads, blocks of queries, blocks of keys); bits: of those that are seen, but not whole."""
    bits, numbers = _distinct(bits)
    parts = torch.full(seen.shape, -1, dtype=torch.int32, device=seen.device)
    parts.permute(_BY_QUERIES)[(seen & ~whole).permute(_BY_QUERIES)] = numbers.to(torch.int32)
    counts = seen.sum(-1)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    starts = (
        torch.cat(((ends - counts)[..., :1], ends), -1) if counts.shape[2] else counts.new_zeros(*counts.shape[:2], 1)
    )
    entries = torch.stack((seen.nonzero()[:, 3].to(torch.int32), parts[seen]), 1)
    return BlockMask(starts, entries, bits, *lengths)


def _distinct(bits):
    """Each that occurs once, and of each its number among them."""
    flat = bits.flatten(1)
    words = F.pad(flat, (0, -flat.shape[1] % 8)).view(torch.int64)
    _, numbers = torch.unique(words, dim=0, return_inverse=True)
    first = torch.full((int(numbers.max()) + 1 if len(numbers) else 0,), len(numbers), device=bits.device)
    first.scatter_reduce_(0, numbers, torch.arange(len(numbers), device=bits.device), "amin")
    return bits[first], numbers
