"""RMSNorm modules of any library, recognised by what they compute:

    y = x / sqrt(mean(x^2) + eps) * (offset + weight)        offset 0 (Llama, torch.nn.RMSNorm) or 1 (Gemma)

Hugging Face has a hundred copies of this class that differ in names, in the offset and in where they round, and
their next release will have more. So a candidate is run once on a small random input with random weights, and
served where its result is the formula's. Served modules round once, at the end, where some of these classes round
before the weight as well.
"""

import copy
import functools
import inspect
import warnings
from typing import NamedTuple

import torch

from ..norm import rms_norm
from ..norm.reference import rms_norm as reference_rms_norm
from .classes import serving_subclass

EPS_NAMES = ("variance_epsilon", "eps", "epsilon")

# Tells formulas apart, and is no measure of exactness: float32 evaluations of one formula differ by 1e-7, and the
# probe's two formulas, or two values of eps, by more than 1e-2.
SAME_FORMULA = 1e-5


class Formula(NamedTuple):
    """What a module was found to compute."""

    eps_name: str
    offset: float
    keeps_dtype: bool  # the result has x's dtype even where the weight is float32 and x is not


@functools.cache
def serving_class(base: type, formula: Formula) -> type:
    """The subclass of the RMSNorm class `base` that `nearpeak.rms_norm` serves."""
    eps_name, offset, keeps_dtype = formula

    def forward(self, *positional, **named):
        (x,) = (*positional, *named.values())
        weight = getattr(self, "weight", None)
        if weight is not None and weight.dtype is not x.dtype and not (keeps_dtype and weight.dtype is torch.float32):
            return base.forward(self, x)
        eps = getattr(self, eps_name)
        return rms_norm(x, weight, torch.finfo(x.dtype).eps if eps is None else eps, offset=offset)

    return serving_subclass(base, forward, serving_class, (base, formula))


def formula_of(module: torch.nn.Module) -> Formula | None:
    """What the module computes, if that is RMSNorm over the last dimension; else None."""
    parameters = {name: value for name, value in module.named_parameters() if value is not None}
    weight = parameters.pop("weight", None)
    eps_name = next((name for name in EPS_NAMES if hasattr(module, name)), None)
    if eps_name is None or parameters or any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    if weight is not None and weight.dim() != 1:
        return None
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _probe(module, eps_name)
    except Exception:  # an unknown module's forward may raise anything on an input that is not its own
        return None


@torch.no_grad()
def _probe(module: torch.nn.Module, eps_name: str) -> Formula | None:
    normalised = getattr(module, "normalized_shape", (8,))
    if len(normalised) != 1:
        return None
    width = normalised[0]
    random = torch.Generator().manual_seed(0)
    eps = getattr(module, eps_name)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    # One row whose mean square is of eps's size, so that a module that treats eps in another way is told apart.
    x = torch.randn(2, width, generator=random, device="cpu") * torch.tensor([[1.0], [eps**0.5]], device="cpu")
    weight = None
    stand_in = copy.copy(module)
    if getattr(module, "weight", None) is not None:
        weight = 1.5 + torch.rand(width, generator=random, device="cpu")
        vars(stand_in)["_parameters"] = {**module._parameters, "weight": torch.nn.Parameter(weight)}
    y = type(module).forward(stand_in, x)
    for offset in (0.0, 1.0):
        expected = reference_rms_norm(x, weight, eps, offset)
        if y.shape == expected.shape and torch.allclose(y, expected, rtol=SAME_FORMULA, atol=0.0):
            keeps_dtype = type(module).forward(stand_in, x.bfloat16()).dtype is torch.bfloat16
            return Formula(eps_name, offset, keeps_dtype)
    return None
