"""How exactness is judged: against the plain layer's own error, never against a hand-picked tolerance.

The truth is the reference in float64. A kernel may err on average 1.1 times as much as the plain PyTorch layer does
in the same dtype on the same input, and at most 1.5 times as much anywhere (two equally good algorithms differ that
much by chance), plus one unit in the last place at the result's scale.
"""

import torch

MEAN_RATIO = 1.1
MAXIMUM_RATIO = 1.5


def unit_in_last_place(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place of `dtype` at the scale (root mean square) of `exact`."""
    if exact.numel() == 0:
        return 0.0
    return float(exact.double().square().mean().sqrt()) * torch.finfo(dtype).eps


def errors(result: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Mean and maximum absolute error of `result`."""
    if exact.numel() == 0:
        return 0.0, 0.0
    error = (result.double() - exact.double()).abs()
    return float(error.mean()), float(error.max())


def why_inexact(result, plain, exact, name="result") -> str | None:
    """Why `result` breaks the rule above, or None if it keeps it; tuples of tensors are judged one by one.

    Infinities must stand in the same places in `result` and `exact`; NaN never passes.
    """
    if isinstance(result, (tuple, list)):
        parts = enumerate(zip(result, plain, exact, strict=True))
        reasons = (why_inexact(*part, name=f"{name}[{index}]") for index, part in parts)
        return next((reason for reason in reasons if reason), None)
    if result.shape != exact.shape:
        return f"{name}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    if result.isnan().any():
        return f"{name}: {int(result.isnan().sum())} of {result.numel()} elements are NaN"
    finite = exact.isfinite()
    if not torch.equal(result[~finite].double(), exact[~finite].double()):
        return f"{name}: infinities differ"
    result, plain, exact = result[finite], plain[finite], exact[finite]
    ulp = unit_in_last_place(exact, result.dtype)
    mean, maximum = errors(result, exact)
    plain_mean, plain_maximum = errors(plain, exact)
    if not mean <= MEAN_RATIO * plain_mean + ulp:
        return f"{name}: mean error {mean:.3e}, plain layer {plain_mean:.3e}, one ulp {ulp:.3e}"
    if not maximum <= MAXIMUM_RATIO * plain_maximum + ulp:
        return f"{name}: maximum error {maximum:.3e}, plain layer {plain_maximum:.3e}, one ulp {ulp:.3e}"
    return None


def why_inexact_over_draws(result, plain, exact, name="result") -> str | None:
    """As `why_inexact`, of draws of one case that stand in the first dimension.

    One small draw cannot compare maxima: of few large elements one layer rounds some better by chance. So the largest
    errors are averaged over the draws, and the unit in the last place that they may add is the largest element's.
    """
    if isinstance(result, (tuple, list)):
        parts = enumerate(zip(result, plain, exact, strict=True))
        reasons = (why_inexact_over_draws(*part, name=f"{name}[{index}]") for index, part in parts)
        return next((reason for reason in reasons if reason), None)
    if result.shape != exact.shape:
        return f"{name}: shape {tuple(result.shape[1:])}, expected {tuple(exact.shape[1:])}"
    if result.isnan().any():
        return f"{name}: {int(result.isnan().sum())} of {result.numel()} elements are NaN"
    if exact.numel() == 0:
        return None
    (mean, maximum), (plain_mean, plain_maximum) = (_over_draws(each, exact) for each in (result, plain))
    squared = exact.double().square()
    step = torch.finfo(result.dtype).eps
    ulp, largest_ulp = step * float(squared.mean().sqrt()), step * float(squared.flatten(1).amax(1).mean().sqrt())
    if not mean <= MEAN_RATIO * plain_mean + ulp:
        return f"{name}: mean error {mean:.3e}, plain layer {plain_mean:.3e}, one ulp {ulp:.3e}"
    if not maximum <= MAXIMUM_RATIO * plain_maximum + largest_ulp:
        return f"{name}: maximum error {maximum:.3e}, plain layer {plain_maximum:.3e}, one ulp {largest_ulp:.3e}"
    return None


def _over_draws(draws: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Mean error, and the average over draws of the largest one."""
    error = (draws.double() - exact.double()).abs()
    return float(error.mean()), float(error.flatten(1).amax(1).mean())


def assert_as_exact_as_plain(result, plain, exact, name="result"):
    """Assert the rule above for one tensor, or for tuples of tensors one by one."""
    reason = why_inexact(result, plain, exact, name)
    if reason:
        raise AssertionError(reason)
