"""Modules that stand in for PyTorch's normalisation layers."""

import torch

from ..operators import accumulation_dtype
from .operator import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` served by `nearpeak.rms_norm`: same constructor, same state dict, same numbers.

    Only one normalised dimension is served by the kernels; more than one goes to PyTorch's own layer. As in
    PyTorch, eps = None means the smallest step at 1 of the dtype that the arithmetic is done in.

    >>> norm = nearpeak.nn.RMSNorm(640, eps=1e-6)
    >>> y = norm(torch.randn(2, 10, 640))
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.normalized_shape) != 1:
            return super().forward(x)
        if x.shape[-1:] != self.normalized_shape:
            raise ValueError(f"x must end in {tuple(self.normalized_shape)}, not be of shape {tuple(x.shape)}")
        eps = torch.finfo(accumulation_dtype(x.dtype)).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, eps)
