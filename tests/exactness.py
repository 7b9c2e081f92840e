"""The rule of exactness, shared with the harness: see nearpeak_bench.exactness."""

from nearpeak_bench.exactness import (
    MAXIMUM_RATIO,
    MEAN_RATIO,
    assert_as_exact_as_plain,
    errors,
    unit_in_last_place,
)

__all__ = ["MAXIMUM_RATIO", "MEAN_RATIO", "assert_as_exact_as_plain", "errors", "unit_in_last_place"]
