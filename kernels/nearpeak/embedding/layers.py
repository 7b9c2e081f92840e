"""A module that stands in for torch.nn.Embedding."""

from collections.abc import Callable

import torch

from .. import backends, operators
from .operator import embedding


def is_torchs_own(module: torch.nn.Embedding) -> bool:
    """Whether the module has options that PyTorch's own layer alone serves."""
    return module.max_norm is not None or module.scale_grad_by_freq


def rows_of(module: torch.nn.Embedding, own: Callable, token_ids: torch.Tensor) -> torch.Tensor:
    """Rows as they are, or by the module's own forward where that is the one to use."""
    if is_torchs_own(module):
        backends.because("max_norm and scale_grad_by_freq are torch.nn.Embedding's own")
        return own(module, token_ids)
    if not operators.wants_gradient(module.weight):
        backends.because("rows as they are, without gradients, are torch.nn.Embedding's own: a copy")
        return own(module, token_ids)
    return embedding(token_ids, module.weight, padding_idx=module.padding_idx, sparse=module.sparse)


class Embedding(torch.nn.Embedding):
    """`torch.nn.Embedding` served by `nearpeak.embedding`: same constructor, same state dict, same numbers.

    Besides, y = scale * weight[token_id], in the same pass. max_norm and scale_grad_by_freq are PyTorch's own, and so
    are rows as they are where no gradients are recorded: that only copies.

    >>> y = nearpeak.nn.Embedding(1000, 64)(torch.tensor([[5, 3, 8]]))
    >>> y = nearpeak.nn.Embedding(1000, 64, scale=64**0.5)(torch.tensor([[5, 3, 8]]))
    """

    def __init__(self, *arguments, scale: float = 1.0, **options):
        super().__init__(*arguments, **options)
        self.scale = scale

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.scale == 1.0:
            return rows_of(self, torch.nn.Embedding.forward, token_ids)
        if is_torchs_own(self):
            return self.scale * super().forward(token_ids)
        return embedding(token_ids, self.weight, scale=self.scale, padding_idx=self.padding_idx, sparse=self.sparse)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.scale == 1.0 else f", scale={self.scale:g}")
