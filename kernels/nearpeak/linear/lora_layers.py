"""The module of a linear layer with a low-rank update."""

import math

import torch

from .layers import Linear
from .lora import lora_linear
from .operator import linear


class LoRALinear(Linear):
    """A linear layer with a trainable low-rank update:  y = f(x W^T + b + alpha / rank (x A^T) B^T).

    W and b are frozen (`requires_grad` is False); A starts as torch.nn.Linear's weight does and B as zeros, so that the
    layer starts as W's own. State dict: `weight`, `bias`, `lora_a`, `lora_b`.

    Args:
        rank: of the update, at least 1.
        alpha: what rank divides to give the update's scale.
        all others: as nearpeak.nn.Linear takes them.

    Raises:
        ValueError: a rank below 1, or an activation that is not served.

    >>> layer = nearpeak.nn.LoRALinear.from_linear(torch.nn.Linear(640, 2048), rank=16, alpha=32)
    >>> layer(torch.randn(4, 640)).sum().backward()
    >>> layer.merge()  # for inference: W itself is updated; layer.unmerge() takes that back
    """

    def __init__(
        self, in_features, out_features, rank=16, alpha=32, bias=True, device=None, dtype=None, *, activation=None
    ):
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        super().__init__(in_features, out_features, bias, device, dtype, activation=activation)
        self.rank, self.alpha, self.merged = rank, alpha, False
        self.lora_a = torch.nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.lora_b = torch.nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        torch.nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.weight.requires_grad_(False)
        if bias:
            self.bias.requires_grad_(False)

    @classmethod
    def from_linear(cls, module: torch.nn.Linear, rank: int = 16, alpha: float = 32) -> "LoRALinear":
        """The layer around module's own weight and bias, and its activation if it is a nearpeak.nn.Linear."""
        activation = module.activation if isinstance(module, Linear) else None
        layer = cls(
            module.in_features, module.out_features, rank, alpha, module.bias is not None, module.weight.device,
            module.weight.dtype, activation=activation,
        )  # fmt: skip
        layer.weight, layer.bias = module.weight, module.bias
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        return layer.train(module.training)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @torch.no_grad()
    def _add_update(self, sign: int) -> None:
        wide = torch.float64 if self.weight.dtype is torch.float64 else torch.float32
        update = self.lora_b.to(wide) @ self.lora_a.to(wide)
        self.weight.copy_(self.weight.to(wide) + sign * self.scale * update)

    def merge(self) -> None:
        """Add the update to W, in place, rounded once: the layer then costs what one without an update costs."""
        if not self.merged:
            self._add_update(1)
            self.merged = True

    def unmerge(self) -> None:
        """Take the update from W again; W is what it was, but for rounding."""
        if self.merged:
            self._add_update(-1)
            self.merged = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return linear(x, self.weight, self.bias, activation=self.activation)
        return lora_linear(x, self.weight, self.lora_a, self.lora_b, self.scale, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"
