"""torch.nn.Linear modules, and those of subclasses that keep its forward.

The weight decides: on a GPU torch has cuBLAS and its like, and a dtype without kernels stays with torch as well. How
many rows a call has is known only when it comes: `nearpeak.linear` hands those to torch that torch is faster at.
"""

import functools

import torch

from .. import backends
from ..linear import linear
from ..linear.operator import FAST_IN_TORCH, few_rows
from .classes import serving_subclass


@functools.cache
def serving_class(base: type) -> type:
    """The subclass of the linear class `base` that `nearpeak.linear` serves."""

    def forward(self, input):
        return linear(input, self.weight, self.bias)

    return serving_subclass(base, forward, serving_class, (base,))


def is_linear(module: torch.nn.Module) -> bool:
    """Whether the module computes torch.nn.Linear's function where it is called.

    That of torch.nn.MultiheadAttention never is: its owner reads the weight.
    """
    if isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, torch.nn.Linear) and type(module).forward is torch.nn.Linear.forward


def served(module: torch.nn.Linear) -> tuple[type | None, str]:
    """The class that serves the module, and what serves it; or None and why not."""
    weight = module.weight
    if weight.device.type != "cpu":
        return None, f"its weight is on {weight.device.type}, where torch's own library is the one to use"
    if weight.dtype not in backends.KERNEL_DTYPES:
        return None, f"{weight.dtype} has no kernel"
    detail = "nearpeak.linear"
    if weight.dtype in FAST_IN_TORCH:
        detail += f" up to {few_rows(weight.dtype)} rows, torch's own for more"
    return serving_class(type(module)), detail
