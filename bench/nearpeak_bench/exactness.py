"""How exactness is judged: against the plain layer's own error, never against a hand-picked tolerance.

The truth is the reference in float64. A kernel may err on average 1.1 times as much as the plain PyTorch layer does
in the same dtype on the same input, and at most 1.5 times as much anywhere (two equally good algorithms differ that
much by chance), plus one unit in the last place at the result's scale.

A single small draw cannot compare maxima: of few large elements, one layer rounds some better by chance. In float32,
eager attention and a copy of it that only sums in another order were measured up to 6 times apart in the largest error
of a gradient, and on average of 8 draws never beyond the rule. So where a case is drawn several times, largest errors
are averaged over the draws before they are compared; and the one unit in the last place that they may add is the
largest element's.
"""

from typing import NamedTuple

import torch

MEAN_RATIO = 1.1
MAXIMUM_RATIO = 1.5


def unit_in_last_place(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place of `dtype` at the scale (root mean square) of `exact`."""
    if exact.numel() == 0:
        return 0.0
    return float(exact.double().square().mean().sqrt()) * torch.finfo(dtype).eps


class Errors(NamedTuple):
    """Absolute errors, or the units in the last place that they may add."""

    mean: float
    maximum: float


def errors(result: torch.Tensor, exact: torch.Tensor) -> Errors:
    """Of `result`, all of it one draw."""
    if exact.numel() == 0:
        return Errors(0.0, 0.0)
    error = (result.double() - exact.double()).abs()
    return Errors(float(error.mean()), float(error.max()))


def errors_over_draws(draws: torch.Tensor, exact: torch.Tensor) -> Errors:
    """Of the finite elements of draws of one case, which stand in the first dimension."""
    return _over_draws((draws.double() - exact.double()).abs().where(exact.isfinite(), 0.0))


def units_over_draws(exact: torch.Tensor, dtype: torch.dtype) -> Errors:
    """One unit in the last place of `dtype` at the scale of the root mean square, and of the largest element."""
    mean, largest = _over_draws(exact.double().where(exact.isfinite(), 0.0).square())
    step = torch.finfo(dtype).eps
    return Errors(mean**0.5 * step, largest**0.5 * step)


def _over_draws(values: torch.Tensor) -> Errors:
    """The mean, and the average over draws of the largest element."""
    if values.numel() == 0:
        return Errors(0.0, 0.0)
    return Errors(float(values.mean()), float(values.flatten(1).amax(1).mean()))


def why_beyond(mine: Errors, plain: Errors, units: Errors) -> str | None:
    """Why errors break the rule, or None if they keep it."""
    if not mine.mean <= MEAN_RATIO * plain.mean + units.mean:
        return f"mean error {mine.mean:.3e}, plain layer {plain.mean:.3e}, one ulp {units.mean:.3e}"
    if not mine.maximum <= MAXIMUM_RATIO * plain.maximum + units.maximum:
        return f"maximum error {mine.maximum:.3e}, plain layer {plain.maximum:.3e}, one ulp {units.maximum:.3e}"
    return None


def _why_unlike(result: torch.Tensor, exact: torch.Tensor) -> str | None:
    """Why errors cannot be taken at all."""
    if result.shape != exact.shape:
        return f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    if result.isnan().any():
        return f"{int(result.isnan().sum())} of {result.numel()} elements are NaN"
    finite = exact.isfinite()
    if not torch.equal(result[~finite].double(), exact[~finite].double()):
        return "infinities differ"
    return None


def why_inexact(result, plain, exact, name="result") -> str | None:
    """Why `result` breaks the rule above, or None if it keeps it; tuples of tensors are judged one by one.

    Infinities must stand in the same places in `result` and `exact`; NaN never passes.
    """
    return _why_any(_of_one_draw, result, plain, exact, name)


def why_inexact_over_draws(result, plain, exact, name="result") -> str | None:
    """As `why_inexact`, of draws of one case that stand in the first dimension."""
    return _why_any(_of_draws, result, plain, exact, name)


def _why_any(why, result, plain, exact, name):
    if isinstance(result, (tuple, list)):
        parts = enumerate(zip(result, plain, exact, strict=True))
        reasons = (_why_any(why, *part, name=f"{name}[{index}]") for index, part in parts)
        return next((reason for reason in reasons if reason), None)
    reason = _why_unlike(result, exact) or why(result, plain, exact)
    return reason and f"{name}: {reason}"


def _of_one_draw(result, plain, exact):
    finite = exact.isfinite()
    result, plain, exact = result[finite], plain[finite], exact[finite]
    ulp = unit_in_last_place(exact, result.dtype)
    return why_beyond(errors(result, exact), errors(plain, exact), Errors(ulp, ulp))


def _of_draws(result, plain, exact):
    mine, plain = errors_over_draws(result, exact), errors_over_draws(plain, exact)
    return why_beyond(mine, plain, units_over_draws(exact, result.dtype))


def assert_as_exact_as_plain(result, plain, exact, name="result"):
    """Assert the rule above for one tensor, or for tuples of tensors one by one."""
    reason = why_inexact(result, plain, exact, name)
    if reason:
        raise AssertionError(reason)
