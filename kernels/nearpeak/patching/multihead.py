"""torch.nn.MultiheadAttention modules, and those of subclasses that keep its forward.

In inference torch.nn.TransformerEncoderLayer, with batch_first, reads the parameters of the layers in it and computes
everything by itself: none of its parts is called then, whatever serves it (torch.backends.mha.set_fastpath_enabled).
"""

import functools

import torch

from ..attention.layers import multihead
from .classes import serving_subclass

READ = "never called: the MultiheadAttention that holds it reads its parameters"
DETAIL = "nearpeak.attention where need_weights=False"


@functools.cache
def serving_class(base: type) -> type:
    """The subclass of the multi-head attention class `base` that nearpeak serves."""

    def forward(self, *positional, **named):
        return multihead(self, base.forward, *positional, **named)

    return serving_subclass(base, forward, serving_class, (base,))


def is_multihead(module: torch.nn.Module) -> bool:
    """Whether the module computes torch.nn.MultiheadAttention's function where it is called."""
    return type(module).forward is torch.nn.MultiheadAttention.forward


def is_read_by_multihead(module: torch.nn.Module) -> bool:
    """Whether the module holds parameters for a torch.nn.MultiheadAttention, which never calls it."""
    return isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear)
