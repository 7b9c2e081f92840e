"""What samples say: medians with their spread, ratios with intervals, and a verdict.

    ratio = median over rounds of (baseline's time / candidate's time)        above 1: the candidate is faster

Both times of a quotient are of the same round, so that what a round has in common cancels. The interval is the
bootstrap's: the medians of rounds drawn again with replacement. The verdict asks two questions, whether the interval
leaves out 1, and whether the ratio is further from 1 than the margin, which is what this machine's noise could do:

    faster, slower   both are so
    same             nothing further from 1 than twice the margin, or 10 %, is possible
    too noisy        anything else, and fewer rounds than can tell

Bootstrap: Efron 1979, https://doi.org/10.1214/aos/1176344552; fences: Tukey 1977.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

ALL = FASTER, SLOWER, SAME, NOISY = "faster", "slower", "same", "too noisy"

BOOTSTRAP_RESAMPLES = 2000
CONFIDENCE = 0.95
# Below this difference nobody changes a kernel, however quiet the machine is.
LEAST_MARGIN = 0.02
# And this much is never the same, however noisy it is.
WIDEST_SAME = 0.1
# The bootstrap of a median of fewer values is narrower than the truth.
ROUNDS_FOR_VERDICT = 6
# Samples beyond the quartiles by this many interquartile ranges, and the share of them that is worth a note.
FENCE, NOTABLE_OUTLIERS = 3.0, 0.1
# Standard deviations of the rank correlation between round and time that chance does not reach, and change that counts.
DRIFT_DEVIATIONS, NOTABLE_DRIFT = 4.0, 0.05


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples, in seconds."""

    median: float
    lower: float
    upper: float


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times faster a candidate is than a baseline, its interval, the difference in seconds, the verdict."""

    value: float
    lower: float
    upper: float
    difference: float
    verdict: str

    @property
    def width(self) -> float:
        """Of the interval, relative to the ratio."""
        return (self.upper - self.lower) / self.value


def spread(seconds: Sequence[float]) -> Spread:
    lower, median, upper = np.percentile(seconds, (25, 50, 75))
    return Spread(float(median), float(lower), float(upper))


def ratio(baseline: Sequence[float], candidate: Sequence[float], noise: float = 0.0, seed: int = 0) -> Ratio:
    """How many times faster `candidate` is than `baseline`: both are samples of the same rounds, in order.

    noise: what two runs of one call may differ by on this machine (see noise.py), as a fraction.
    """
    baseline, candidate = np.asarray(baseline), np.asarray(candidate)
    ratios = baseline / candidate
    medians = resampled_medians(ratios, np.random.default_rng(seed))
    return _ratio(float(np.median(ratios)), medians, float(np.median(candidate - baseline)), noise, len(ratios))


def change(before: Sequence[float], after: Sequence[float], noise: float = 0.0, seed: int = 0) -> Ratio:
    """after / before, of the medians of two runs that share no rounds; what they hold is speeds (more is faster)."""
    before, after = np.asarray(before), np.asarray(after)
    random = np.random.default_rng(seed)
    quotients = resampled_medians(after, random) / resampled_medians(before, random)
    value = float(np.median(after) / np.median(before))
    difference = float(np.median(after) - np.median(before))
    return _ratio(value, quotients, difference, noise, min(len(before), len(after)))


def resampled_medians(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The medians of BOOTSTRAP_RESAMPLES samples drawn from these with replacement."""
    return np.median(values[random.integers(0, len(values), (BOOTSTRAP_RESAMPLES, len(values)))], axis=1)


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """The bootstrap's interval of a figure, of its values in resamples."""
    tail = 50 * (1 - CONFIDENCE)
    lower, upper = np.percentile(resampled, (tail, 100 - tail))
    return float(lower), float(upper)


def _ratio(value: float, resampled: np.ndarray, difference: float, noise: float, rounds: int) -> Ratio:
    lower, upper = interval(resampled)
    verdict = _verdict(value, lower, upper, max(LEAST_MARGIN, noise)) if rounds >= ROUNDS_FOR_VERDICT else NOISY
    return Ratio(value, lower, upper, difference, verdict)


def _verdict(value: float, lower: float, upper: float, margin: float) -> str:
    if lower > 1 and value > 1 + margin:
        return FASTER
    if upper < 1 and value < 1 / (1 + margin):
        return SLOWER
    band = 1 + min(2 * margin, WIDEST_SAME)
    return SAME if lower > 1 / band and upper < band else NOISY


def remarks(seconds: Sequence[float]) -> str:
    """What is to be known of the samples beside their median; empty where they are as they should be."""
    found = []
    outliers, drift = outlier_share(seconds), drift_of(seconds)
    if outliers > NOTABLE_OUTLIERS:
        found.append(f"{100 * outliers:.0f} % outliers")
    if abs(drift) > NOTABLE_DRIFT:
        found.append(f"drifted by {100 * drift:+.0f} %")
    return ", ".join(found)


def outlier_share(seconds: Sequence[float]) -> float:
    """The share of samples outside of the fences. They stay in: the median does not mind them."""
    seconds = np.asarray(seconds)
    lower, upper = np.percentile(seconds, (25, 75))
    fence = FENCE * (upper - lower)
    return float(np.mean((seconds < lower - fence) | (seconds > upper + fence)))


def drift_of(seconds: Sequence[float]) -> float:
    """The change from the first third of the rounds to the last, as a fraction; 0 where chance could have done it."""
    seconds = np.asarray(seconds)
    third = len(seconds) // 3
    if third < 3:
        return 0.0
    ranks = np.argsort(np.argsort(seconds))
    correlation = np.corrcoef(ranks, np.arange(len(seconds)))[0, 1]
    if abs(correlation) * np.sqrt(len(seconds) - 1) < DRIFT_DEVIATIONS:
        return 0.0
    return float(np.median(seconds[-third:]) / np.median(seconds[:third]) - 1)
