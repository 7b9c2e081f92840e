"""The definition of rotary position embedding (RoPE).

Each pair (a, b) of a head's elements turns by the angle of its position and frequency:

    a' = a cos - b sin
    b' = b cos + a sin

The pair is (x[i], x[i + head_dim / 2]), or with `interleaved` (x[2i], x[2i + 1]). `inverse` turns back, which is
also the gradient, since a rotation's transpose is its inverse. Arithmetic in float32 (float64 for float64).
Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34.
"""

import torch

from ..operators import empty_laid_out_like, widened


def rotate(x, cos, sin, interleaved, inverse):
    """x: (batch, heads, sequence, head_dim); cos, sin: (sequence, at least head_dim / 2), or with a batch before."""
    wide = widened(x)
    cos, sin = (table[..., : x.shape[-1] // 2].to(wide.dtype) for table in (cos, sin))
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if inverse:
        sin = -sin
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = wide.chunk(2, dim=-1)
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return empty_laid_out_like(x).copy_(y)


def apply_rotary(query, key, cos, sin, interleaved, inverse):
    return rotate(query, cos, sin, interleaved, inverse), rotate(key, cos, sin, interleaved, inverse)


def apply_rotary_(query, key, cos, sin, interleaved, inverse):
    query.copy_(rotate(query, cos, sin, interleaved, inverse))
    key.copy_(rotate(key, cos, sin, interleaved, inverse))
