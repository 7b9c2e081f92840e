"""flash-attn's function for decoding: append to a key-value cache, turn by position, attend, in one call."""

import torch

from ...attention import attention
from ...checks import check_float_of
from ...rotary import apply_rotary
from .arguments import check_grouped, check_heads, check_integers, dense_last, options_of
from .functions import BATCHED, PAGED
from .pages import gathered, used_pages


@torch.no_grad()
def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,
    cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
    alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    """flash-attn's attention over a key-value cache, to which it first appends new keys and values in place.

    Sequence b's keys are those of its cache entry from cache_leftpad[b] to cache_seqlens[b], then the new ones. Query
    i stands at position p = i + (number of these keys - query length) among them. Rotary embedding turns the new key j
    by row cache_seqlens[b] + j of the tables, and query i by row cache_seqlens[b] + i if causal or windowed, else by
    row cache_seqlens[b]. No gradient is recorded.

    Args:
        q: (batch, query length, heads, head_dim), float32, bfloat16, float16 or float64.
        k_cache, v_cache: (cache entries, cache length, key heads, head_dim), q's dtype; with block_table pages,
            (num_blocks, page_size, key heads, head_dim), of any size.
        k, v: (batch, new length, key heads, head_dim), to be written behind cache_seqlens, which then must be given.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), float32 or q's dtype; the first rotary_dim elements of
            each head are turned. Only with k and v.
        cache_seqlens: how many keys each entry holds before the call: a number, or (batch,) int32 or int64; None means
            that the cache is full.
        cache_batch_idx: (batch,), the cache entry of each sequence; None means 0, 1, 2 ... Not with block_table.
        cache_leftpad: (batch,), where each entry's keys begin. Not with block_table.
        block_table: (batch, pages), the pages of each sequence in their order.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
        rotary_interleaved: pairs are (x[2i], x[2i + 1]), or else (x[i], x[i + rotary_dim / 2]).
        num_splits: changes nothing; the kernels split long caches as they see fit.
        return_softmax_lse: return (out, softmax_lse), the latter (batch, heads, query length).

    Returns:
        out, q's shape (with v_cache's head_dim); or (out, softmax_lse), -inf for a query that sees no key.

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape, device, option, length or page that does not fit.

    Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; pages: Kwon et al. 2023,
    https://arxiv.org/abs/2309.06180.

    >>> from nearpeak.compat.flash_attn import flash_attn_with_kvcache
    >>> cache_k, cache_v = torch.zeros(2, 100, 2, 64), torch.zeros(2, 100, 2, 64)
    >>> q, k, lengths = torch.randn(2, 1, 8, 64), torch.randn(2, 1, 2, 64), torch.tensor([40, 7])
    >>> out = flash_attn_with_kvcache(q, cache_k, cache_v, k, k, cache_seqlens=lengths, causal=True)
    """
    options = options_of(softmax_scale, causal, window_size, softcap, alibi_slopes)
    _check_cache(q, k_cache, v_cache, cache_batch_idx, cache_leftpad, block_table)
    _check_new(q, k_cache, v_cache, k, v, cache_seqlens, rotary_cos, rotary_sin)
    lengths = _lengths(q, k_cache, cache_seqlens, block_table)
    ends = lengths if k is None else lengths + k.shape[1]
    cache = _Cache(k_cache, v_cache, ends, cache_batch_idx, cache_leftpad, block_table)
    if rotary_cos is not None:
        moves = causal or options["window"] != (None, None)
        q, k = _turned_by_position(q, k, rotary_cos, rotary_sin, lengths, moves, rotary_interleaved)
    if k is not None:
        cache.append(k, v, lengths)
    key, value = cache.tensors()
    bounds = {"key_starts": cache_leftpad, "key_ends": None if cache_seqlens is None else cache.ends}
    out, lse = attention(
        *(tensor.transpose(1, 2) for tensor in (dense_last(q), key, value)), **options, **bounds, return_lse=True
    )
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


class _Cache:
    """The cache entries of a batch, wherever they lie. ends: (batch,), how many keys each will hold."""

    def __init__(self, keys, values, ends, batch_idx, leftpad, block_table):
        self.keys, self.values, self.ends = keys, values, ends
        self.table = None if block_table is None else used_pages(keys, block_table, ends)
        self.entries = None if batch_idx is None else batch_idx.long()
        self.longest = None
        if not torch.compiler.is_compiling():
            numbers = ends.tolist()  # once: on a GPU it waits for all that runs there
            self.longest = max(numbers, default=0)
            self._check_numbers(numbers, leftpad)

    def _check_numbers(self, ends, leftpad):
        """Under torch.compile, which has no numbers to look at, attention's own kernels check those that they read."""
        if self.table is None and self.longest > self.keys.shape[1]:
            raise ValueError(
                f"cache_seqlens must leave room for the new keys in a cache of {self.keys.shape[1]}: they would end "
                f"at {ends}"
            )
        if self.entries is not None and not all(0 <= entry < self.keys.shape[0] for entry in self.entries.tolist()):
            raise ValueError(
                f"cache_batch_idx must lie within 0..{self.keys.shape[0] - 1}, not be {self.entries.tolist()}"
            )
        starts = [0] * len(ends) if leftpad is None else leftpad.tolist()
        if not all(0 <= start <= end for start, end in zip(starts, ends, strict=True)):
            raise ValueError(f"cache_leftpad must lie between 0 and the keys' ends {ends}, not be {starts}")

    def append(self, k, v, lengths):
        """Write new keys and values, (batch, new length, heads, head_dim), behind those that are there."""
        rows = lengths[:, None] + torch.arange(k.shape[1], device=k.device)
        if self.table is not None:
            page_size = self.keys.shape[1]
            places = self.table.gather(1, rows // page_size), rows % page_size
        elif self.entries is not None:
            places = self.entries[:, None], rows
        else:
            places = torch.arange(k.shape[0], device=k.device)[:, None], rows
        self.keys.index_put_(places, k)
        self.values.index_put_(places, v)

    def tensors(self):
        """Keys and values of the batch, (batch, keys, heads, head_dim)."""
        if self.table is not None:
            return gathered(self.keys, self.table), gathered(self.values, self.table)
        if self.entries is not None:
            # A copy, so only of what is read.
            return tuple(cache[:, : self.longest][self.entries] for cache in (self.keys, self.values))
        batch = self.ends.shape[0]
        return self.keys[:batch], self.values[:batch]


def _turned_by_position(q, k, cos, sin, lengths, moves, interleaved):
    """Queries and new keys, turned by rows of the tables from lengths on; without `moves` all queries by the first."""
    query_rows = torch.arange(q.shape[1], device=q.device) * int(moves) + lengths[:, None]
    key_rows = torch.arange(k.shape[1], device=q.device) + lengths[:, None]
    _check_rows(cos, query_rows, key_rows)
    return _turned(q, cos, sin, query_rows, interleaved), _turned(k, cos, sin, key_rows, interleaved)


def _turned(x, cos, sin, rows, interleaved):
    """x, (batch, length, heads, head_dim), its first elements turned by rows (batch, length) of the tables."""
    heads, rotary_dim = dense_last(x).transpose(1, 2), 2 * cos.shape[1]
    turned, _ = apply_rotary(heads, heads[:, :0], cos[rows], sin[rows], interleaved=interleaved, rotary_dim=rotary_dim)
    return turned.transpose(1, 2)


def _lengths(q, k_cache, cache_seqlens, block_table):
    """(batch,) int64: how many keys each sequence's entry holds before the call."""
    if isinstance(cache_seqlens, torch.Tensor):
        check_integers("cache_seqlens", cache_seqlens, q.shape[:1], q.device)
        lengths = cache_seqlens.long()
        if not torch.compiler.is_compiling() and lengths.numel() and int(lengths.min()) < 0:
            raise ValueError(f"cache_seqlens must not be negative, as in {cache_seqlens.tolist()}")
        return lengths
    if cache_seqlens is None:
        capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        return torch.full(q.shape[:1], capacity, device=q.device)
    if not isinstance(cache_seqlens, int) or cache_seqlens < 0:
        raise ValueError(f"cache_seqlens must be a tensor or a number of at least 0, not {cache_seqlens!r}")
    return torch.full(q.shape[:1], cache_seqlens, device=q.device)


def _check_cache(q, k_cache, v_cache, cache_batch_idx, cache_leftpad, block_table):
    layout = BATCHED if block_table is None else PAGED
    check_heads("q", q, BATCHED)
    check_heads("k_cache", k_cache, layout, q)
    check_heads("v_cache", v_cache, layout, q)
    check_grouped(q, k_cache, "k_cache", v_cache, "v_cache")
    batch = q.shape[:1]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1 and cache.shape[-1] > 1 and cache.numel() > 0:
            raise ValueError(f"{name} must be dense in its last dimension, not of strides {cache.stride()}")
    for name, numbers in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if numbers is None:
            continue
        check_integers(name, numbers, batch, q.device)
        if block_table is not None:
            raise ValueError(f"{name} must not be given with a block_table")
    if block_table is not None:
        check_integers("block_table", block_table, (*batch, None), q.device)
    elif cache_batch_idx is None and k_cache.shape[0] < q.shape[0]:
        raise ValueError(f"k_cache must have an entry for each of {q.shape[0]} sequences, not {k_cache.shape[0]}")


def _check_new(q, k_cache, v_cache, k, v, cache_seqlens, rotary_cos, rotary_sin):
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if k is not None:
        if cache_seqlens is None:
            raise ValueError("cache_seqlens must be given with k and v, to say where they are written")
        for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
            check_heads(name, new, BATCHED, q)
            wanted = (q.shape[0], k.shape[1], *cache.shape[2:])
            if new.shape != wanted:
                raise ValueError(f"{name} must have the shape {wanted}, not {tuple(new.shape)}")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if rotary_cos is not None:
        if k is None:
            raise ValueError("rotary_cos must not be given without k and v")
        for name, table in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
            check_float_of(name, table, q)
            if table.dim() != 2 or not 2 <= 2 * table.shape[1] <= q.shape[3] or table.shape != rotary_cos.shape:
                raise ValueError(
                    f"{name} must be (positions, rotary_dim / 2) with rotary_dim at most {q.shape[3]}, not "
                    f"{tuple(table.shape)}"
                )


def _check_rows(rotary_cos, *rows):
    if torch.compiler.is_compiling():
        return
    last = max(int(each.max()) if each.numel() else -1 for each in rows)
    if last >= rotary_cos.shape[0]:
        raise ValueError(f"rotary_cos must have a row for each position up to {last}, not {rotary_cos.shape[0]} rows")
