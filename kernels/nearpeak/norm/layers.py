"""Modules that stand in for PyTorch's normalisation layers."""

import torch

from ..operators import accumulation_dtype
from .operator import layer_norm, rms_norm


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


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` served by `nearpeak.layer_norm`: same constructor, same state dict, same numbers.

    >>> norm = nearpeak.nn.LayerNorm(768)
    >>> y = norm(torch.randn(2, 10, 768))
    >>> y = nearpeak.nn.LayerNorm((10, 768), bias=False)(torch.randn(2, 10, 768))
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = self.normalized_shape
        if x.shape[-len(shape) :] != shape:
            raise ValueError(f"x must end in {tuple(shape)}, not be of shape {tuple(x.shape)}")
        if len(shape) == 1:
            return layer_norm(x, self.weight, self.bias, self.eps)
        # Several dimensions are normalised as one.
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        return layer_norm(x.flatten(-len(shape)), weight, bias, self.eps).unflatten(-1, shape)
