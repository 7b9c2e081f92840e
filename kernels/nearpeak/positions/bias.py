"""Biases that attention adds to its scores by the distance of key and query: ALiBi's slopes, T5's buckets."""

import math

import torch


def alibi_slopes(heads: int, device=None) -> torch.Tensor:
    """How fast each head's scores fall with distance (ALiBi), for `nearpeak.attention(..., alibi_slopes=...)`.

        slope(h) = 2 ** (-8 h / heads),   h = 1 .. heads

    for a power of two; other numbers of heads take the slopes of the power of two below, and then every second one of
    those of the power of two above. Returns (heads,) in float32.

    Press et al. 2022, https://arxiv.org/abs/2108.12409.

    >>> slopes = nearpeak.nn.alibi_slopes(8)
    >>> query = torch.randn(1, 8, 10, 64)
    >>> out = nearpeak.attention(query, query, query, causal=True, alibi_slopes=slopes)
    """
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"heads must be an int, not {type(heads).__name__}")
    if heads < 1:
        raise ValueError(f"heads must be at least 1, not {heads}")
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-4 * h / power) for h in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def relative_position_bucket(
    distances: torch.Tensor, *, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> torch.Tensor:
    """T5's buckets of distances, key's position less query's: exact for near keys, logarithmic for far ones.

        bucket(d) = d                                                          for d < half
        bucket(d) = half + floor(half ln(d / half) / ln(max_distance / half))  else, at most `buckets` - 1

    with half = buckets / 2 and d the distance back from query to key; keys ahead are at distance 0. If `bidirectional`,
    keys behind take the first half of the buckets in this way, and keys ahead the second.

    Raffel et al. 2020, https://arxiv.org/abs/1910.10683.

    >>> distances = torch.arange(10) - torch.arange(10)[:, None]
    >>> bucket = nearpeak.nn.relative_position_bucket(distances)
    """
    if not isinstance(distances, torch.Tensor) or distances.dtype not in (torch.int32, torch.int64):
        raise TypeError("distances must be a torch.Tensor of int32 or int64")
    _check_buckets(buckets, max_distance, bidirectional)
    first = 0
    if bidirectional:
        buckets //= 2
        first = (distances > 0) * buckets
        back = distances.abs()
    else:
        back = (-distances).clamp(min=0)
    half = buckets // 2
    growth = torch.log(back.clamp(min=half).float() / half) / math.log(max_distance / half)
    far = (half + (growth * (buckets - half)).long()).clamp(max=buckets - 1)
    return first + torch.where(back < half, back.long(), far)


def _check_buckets(buckets, max_distance, bidirectional):
    least = 4 if bidirectional else 2
    if buckets < least or buckets % least:
        raise ValueError(f"buckets must be a positive multiple of {least}, not {buckets}")
    if max_distance <= buckets // least:
        raise ValueError(f"max_distance must be more than the {buckets // least} exact distances, not {max_distance}")


class RelativePositionBias(torch.nn.Module):
    """T5's bias of attention scores: a learned number for each head and bucket of distances.

        bias[h, i, j] = weight[bucket(j - i), h]

    See `relative_position_bucket`; the weight is named and shaped as Hugging Face's `relative_attention_bias.weight`.

    >>> bias = nearpeak.nn.RelativePositionBias(8)(10, 10)
    >>> query = torch.randn(1, 8, 10, 64)
    >>> out = nearpeak.attention(query, query, query, bias=bias, scale=1.0)
    """

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True):
        _check_buckets(buckets, max_distance, bidirectional)
        super().__init__()
        self.options = {"buckets": buckets, "max_distance": max_distance, "bidirectional": bidirectional}
        self.weight = torch.nn.Parameter(torch.randn(buckets, heads))

    def forward(self, query_length: int, key_length: int) -> torch.Tensor:
        """(1, heads, query_length, key_length); the last query stands at the last key, as behind a cache."""
        keys = torch.arange(key_length, device=self.weight.device)
        queries = torch.arange(key_length - query_length, key_length, device=self.weight.device)
        bucket = relative_position_bucket(keys - queries[:, None], **self.options)
        return self.weight[bucket].permute(2, 0, 1).unsqueeze(0)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, " + ", ".join(f"{name}={value}" for name, value in self.options.items())
