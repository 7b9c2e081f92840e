"""The module that stands in for torch.nn.Linear."""

import torch

from .operator import linear


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` served by `nearpeak.linear`: same constructor, same state dict, same numbers.

    >>> layer = nearpeak.nn.Linear(640, 2048, dtype=torch.bfloat16)
    >>> y = layer(torch.randn(2, 10, 640, dtype=torch.bfloat16))
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
