"""The rule of exactness, shared with the harness: see nearpeak_bench.exactness."""

from nearpeak_bench.exactness import (
    MAXIMUM_RATIO,
    MEAN_RATIO,
    Errors,
    assert_as_exact_as_plain,
    errors,
    errors_over_draws,
    unit_in_last_place,
    units_over_draws,
    why_beyond,
)

__all__ = [
    "MAXIMUM_RATIO",
    "MEAN_RATIO",
    "Errors",
    "assert_as_exact_as_plain",
    "errors",
    "errors_over_draws",
    "unit_in_last_place",
    "units_over_draws",
    "why_beyond",
]
