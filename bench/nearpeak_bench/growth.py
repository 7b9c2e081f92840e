"""How time grows with one dimension, and what more threads give: what rows say together.

    time ~ a * size^b        b by least squares in log-log, over rows that differ in that dimension alone

The interval of b is the bootstrap's: each row's rounds are drawn again with replacement. It tells what the noise of
timing within a run leaves open: not what the machine did between one row and the next, and not whether time follows a
power of the size at all. For that, the greatest deviation is kept.
The same fit of the physical limit says how the time would have to grow: 2 for attention in S, 1 for a norm in its rows.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from . import verdicts
from .cases import conditions
from .results import Measurement, Row
from .variants import dimensions

# Through two points every line passes, and near each other they say little.
LEAST_SIZES, LEAST_RANGE = 3, 4


@dataclasses.dataclass(frozen=True)
class Fit:
    """seconds ~ factor * size^exponent; lower and upper bound the exponent; deviation: of the time furthest from the
    fit, as a fraction of it. sizes, seconds: what was fitted, the times being medians."""

    exponent: float
    lower: float
    upper: float
    factor: float
    deviation: float
    sizes: list[int]
    seconds: list[float]


@dataclasses.dataclass(frozen=True)
class Growth:
    """Rows that differ in `dimension` alone, which stands in brackets in their shape; `row` is the smallest. fits: by
    implementation; limit: of the physical limit, None where there is none."""

    row: Row
    dimension: str
    shape: str
    fits: dict[str, Fit]
    limit: Fit | None


@dataclasses.dataclass(frozen=True)
class Scaling:
    """One row with several threads. speedups: by implementation, over the row with the fewest threads, `least`."""

    row: Row
    shape: str
    least: int
    speedups: dict[str, verdicts.Ratio]


def fit(sizes: Iterable[int], samples: Iterable[Sequence[float]], seed: int = 0) -> Fit:
    """The power of the size that the medians follow; `samples` holds the seconds of each size."""
    sizes, samples = list(sizes), list(samples)
    medians = np.array([np.median(seconds) for seconds in samples])
    random = np.random.default_rng(seed)
    resampled = np.stack([verdicts.resampled_medians(np.asarray(seconds), random) for seconds in samples], axis=1)
    x = np.log(sizes)
    slopes = (x - x.mean()) / np.square(x - x.mean()).sum()
    exponent = float(np.log(medians) @ slopes)
    factor = float(np.exp(np.log(medians).mean() - exponent * x.mean()))
    deviation = float(np.abs(medians / (factor * np.asarray(sizes) ** exponent) - 1).max())
    lower, upper = verdicts.interval(np.log(resampled) @ slopes)
    return Fit(exponent, lower, upper, factor, deviation, sizes, medians.tolist())


def growths(rows: Iterable[Row]) -> list[Growth]:
    """Of every group of rows that is large enough."""
    groups: dict[tuple, list[tuple[int, Row]]] = {}
    for row in rows:
        for dimension, names in dimensions(row.parameters).items():
            rest = {name: value for name, value in row.parameters.items() if name not in names}
            key = (*_kind(row), tuple(rest.items()), row.threads, row.cold, dimension)
            groups.setdefault(key, []).append((row.parameters[names[0]], row))
    found = []
    for (*_, dimension), members in groups.items():
        growth = _growth(dimension, dict(sorted(members, key=lambda member: member[0])))
        if growth.fits:
            found.append(growth)
    return found


def _kind(row: Row) -> tuple:
    return row.suite, row.operator, row.direction, row.dtype, row.template


def _growth(dimension: str, rows: dict[int, Row]) -> Growth:
    """Of rows by size; without fits where they are too few."""
    first = next(iter(rows.values()))
    marked = dict.fromkeys(dimensions(first.parameters)[dimension], f"[{dimension}]")
    shape = first.template.format(**{**first.parameters, **marked}) + conditions(first.threads, first.cold)
    samples: dict[str, dict[int, Sequence[float]]] = {}
    for size, row in rows.items():
        for each in row.measurements:
            if each.spread:
                samples.setdefault(each.implementation, {})[size] = each.samples.seconds
    limits = {size: [row.limit_seconds] for size, row in rows.items() if row.limit_seconds}
    fits = {name: fit(of.keys(), of.values()) for name, of in samples.items() if _enough(of)}
    return Growth(first, dimension, shape, fits, fit(limits.keys(), limits.values()) if _enough(limits) else None)


def _enough(sizes: Iterable[int]) -> bool:
    sizes = list(sizes)
    return len(sizes) >= LEAST_SIZES and max(sizes) >= LEAST_RANGE * min(sizes)


def scalings(rows: Iterable[Row]) -> list[Scaling]:
    """Of every row that was measured with more threads than another one like it."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.threads:
            groups.setdefault((*_kind(row), tuple(row.parameters.items()), row.cold), []).append(row)
    found = []
    for members in groups.values():
        least, *others = sorted(members, key=lambda row: row.threads)
        shape = least.template.format(**least.parameters) + conditions(None, least.cold)
        for row in others:
            found.append(Scaling(row, shape, least.threads, _speedups(least, row)))
    return found


def _speedups(least: Row, row: Row) -> dict[str, verdicts.Ratio]:
    before = {each.implementation: each for each in least.measurements if each.spread}
    return {
        each.implementation: verdicts.change(_speeds(before[each.implementation]), _speeds(each))
        for each in row.measurements
        if each.spread and each.implementation in before
    }


def _speeds(measurement: Measurement) -> np.ndarray:
    return 1 / np.asarray(measurement.samples.seconds)
