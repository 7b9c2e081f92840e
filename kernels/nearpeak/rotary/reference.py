"""The definition of rotary position embedding (RoPE).

Each pair (a, b) of a head's elements turns by the angle of its position and frequency:

    a' = a cos - b sin
    b' = b cos + a sin

The pair is (x[i], x[i + rotary_dim / 2]), or with `interleaved` (x[2i], x[2i + 1]); elements from rotary_dim on stay
what they are. `inverse` turns back, which is also the gradient, since a rotation's transpose is its inverse. Arithmetic
in float32 (float64 for float64). Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34.
"""

import torch

from ..operators import empty_laid_out_like, widened


def rotate(x, cos, sin, interleaved, inverse, rotary_dim):
    """x: (batch, heads, sequence, head_dim); cos, sin: (sequence, at least rotary_dim / 2), or with a batch before."""
    wide, rest = widened(x).tensor_split([rotary_dim], dim=-1)
    cos, sin = (table[..., : rotary_dim // 2].to(wide.dtype) for table in (cos, sin))
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
    return empty_laid_out_like(x).copy_(torch.cat((y, rest), dim=-1))


def apply_rotary(query, key, cos, sin, *form):
    return rotate(query, cos, sin, *form), rotate(key, cos, sin, *form)


def apply_rotary_(query, key, cos, sin, *form):
    query.copy_(rotate(query, cos, sin, *form))
    key.copy_(rotate(key, cos, sin, *form))
