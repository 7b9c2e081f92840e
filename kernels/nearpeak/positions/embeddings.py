"""Embeddings of positions that are added to the input: sinusoidal or learned."""

import torch

from ..checks import check_floating


class _AddedPositions(torch.nn.Module):
    """Adds table(positions) to x."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """x: (..., sequence, width). positions: (sequence,), or with x's leading dimensions; None counts from 0."""
        check_floating("x", x)
        if x.dim() < 2 or x.shape[-1] != self.width:
            raise ValueError(f"x must be (..., sequence, {self.width}), not of shape {tuple(x.shape)}")
        if positions is None:
            positions = torch.arange(x.shape[-2], device=x.device)
        elif not isinstance(positions, torch.Tensor) or positions.dtype not in (torch.int32, torch.int64):
            raise TypeError("positions must be a torch.Tensor of int32 or int64, or None")
        elif positions.shape[-1:] != x.shape[-2:-1]:
            raise ValueError(f"positions must end in x's sequence {x.shape[-2]}, not be of {tuple(positions.shape)}")
        return x + self.table(positions).to(x.dtype)


class SinusoidalPositions(_AddedPositions):
    """Adds sines and cosines of every position to x.

        p[s, 2i] = sin(s base^(-2i / width)),   p[s, 2i + 1] = cos(s base^(-2i / width))

    For any position, also beyond those of training. The arithmetic is float32.
    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5.

    >>> y = nearpeak.nn.SinusoidalPositions(64)(torch.randn(2, 10, 64))
    >>> y = nearpeak.nn.SinusoidalPositions(64)(torch.randn(2, 1, 64), torch.tensor([10]))  # behind a cache
    """

    def __init__(self, width: int, base: float = 10000.0):
        if width < 2 or width % 2:
            raise ValueError(f"width must be even and at least 2, not {width}")
        if base <= 0:
            raise ValueError(f"base must be positive, not {base}")
        super().__init__(width)
        self.base = base

    def table(self, positions: torch.Tensor) -> torch.Tensor:
        """(..., sequence, width) in float32."""
        exponents = torch.arange(0, self.width, 2, dtype=torch.float32, device=positions.device) / self.width
        angles = positions.float()[..., None] * self.base**-exponents
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.width}, base={self.base}"


class LearnedPositions(_AddedPositions):
    """Adds a learned vector of each position to x.

        y[s] = x[s] + weight[position(s)]

    As in GPT-2 and BERT; the weight is drawn from a normal distribution of deviation 0.02, as theirs.
    A position that has no vector is an IndexError, as in torch.nn.Embedding.

    >>> y = nearpeak.nn.LearnedPositions(512, 64)(torch.randn(2, 10, 64))
    """

    def __init__(self, count: int, width: int, device=None, dtype=None):
        if count < 1 or width < 1:
            raise ValueError(f"count and width must be at least 1, not {count} and {width}")
        super().__init__(width)
        self.weight = torch.nn.Parameter(torch.empty(count, width, device=device, dtype=dtype))
        torch.nn.init.normal_(self.weight, std=0.02)

    def table(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(positions, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.width}"
