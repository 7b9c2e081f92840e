"""x in 8 bits, for products of integers:  x[k] ~ scale[g] code[k],  g = k // group_size

scale[g] = max over k in g of |x[k]| / 127,  code[k] = round(x[k] / scale[g]), ties to even

Rounded anew at each call, as x comes. Groups that only numbers below 2^-119 fill become zeros; an infinity or NaN makes
its whole group NaN.
"""

import torch

from ..operators import widened

MOST_CODE = 127
LEAST = 2.0**-119  # below, 127 / max could be infinite
GROUP_OF_BLOCKS = 32  # of x, where the weight is GGUF's blocks


def check_input_bits(input_bits):
    """Raises ValueError where input_bits is none that is served."""
    if input_bits is not None and input_bits != 8:
        raise ValueError(f"input_bits must be None or 8, not {input_bits!r}")


def codes_and_scales(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes, whole numbers of x's dtype in (..., groups, group_size), and the scales (..., groups, 1)."""
    groups = x.unflatten(-1, (-1, group_size))
    most = groups.abs().amax(-1, keepdim=True)
    # As a tensor: a number over a tensor, torch rounds twice.
    factor = torch.where(most >= LEAST, torch.full_like(most, MOST_CODE) / most, 0.0)
    scales = torch.where(most < LEAST, 0.0, most / MOST_CODE)
    return (groups * factor).round(), torch.where(most.isfinite(), scales, torch.nan)


def rounded(x: torch.Tensor, input_bits: int | None, group_size: int) -> torch.Tensor:
    """x as its codes stand for it, in the dtype of the arithmetic, with x's gradient; input_bits None: x itself."""
    x = widened(x)
    if input_bits is None:
        return x
    codes, scales = codes_and_scales(x.detach(), group_size)
    values = (codes * scales).flatten(-2)
    return values + (x - x.detach()) if x.requires_grad else values
