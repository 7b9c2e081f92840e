"""Interleaved timing.

A round times every call once, in random order; rounds repeat until the ratios are known well enough, or the time
budget is spent. So baseline and candidate meet the same drift of clock and neighbours, and are compared round by
round (verdicts.py). A sample is the mean of as many calls as fill a millisecond. Every sample is kept. Caches are as
the preceding calls leave them, or cold (caches.py): then a sample is one call. Outputs are fresh unless the call itself
reuses them.
"""

import dataclasses
import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence

import torch

from . import verdicts

# Long enough that the clock's own 0.05 us and the loop's 0.03 us a call vanish, even for calls of 1 us.
MIN_SAMPLE_SECONDS = 1e-3
# Even a first call of this length leaves no doubt that one call fills a sample; slow baselines need no second one.
CERTAINLY_LONG_SECONDS = 1.0
MIN_ROUNDS = 3
MAX_ROUNDS = 200
# A ratio's interval of this width, relative to it, is narrow enough: half of what a verdict can tell apart.
PRECISION = 0.02
# An interval of few rounds may be narrow by chance, and looking at it often makes that likelier.
ROUNDS_FOR_PRECISION = 20
ROUNDS_BETWEEN_LOOKS = 10

Clock = Callable[[Callable[[], object], int], float]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Seconds per call of one implementation, one figure per round, each the mean of `repeats` calls."""

    seconds: list[float]
    repeats: int


def cpu_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds that `repeats` calls take."""
    loop = itertools.repeat(None, repeats)
    start = time.perf_counter_ns()
    for _ in loop:
        call()
    return (time.perf_counter_ns() - start) * 1e-9


def cuda_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds between the first kernel's start and the last one's end, by the GPU's own events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in itertools.repeat(None, repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def clock_of(device: torch.device) -> Clock:
    return cuda_clock if device.type == "cuda" else cpu_clock


def calibrate(call: Callable[[], object], clock: Clock) -> int:
    """How many calls fill MIN_SAMPLE_SECONDS; warms the call up on the way."""
    if clock(call, 1) > CERTAINLY_LONG_SECONDS:
        return 1
    repeats = 1
    while (elapsed := clock(call, repeats)) < MIN_SAMPLE_SECONDS:
        # One sample may be slow for reasons of its own, and a coarse clock may read zero: grow tenfold at most.
        wanted = math.ceil(1.2 * repeats * MIN_SAMPLE_SECONDS / max(elapsed, 1e-9))
        repeats = min(10 * repeats, max(wanted, repeats + 1))
    return repeats


def best_seconds(call: Callable[[], object], clock: Clock, samples: int = 20) -> float:
    """The fastest of some samples: for measuring what the hardware can do, never for comparing kernels."""
    repeats = calibrate(call, clock)
    return min(clock(call, repeats) for _ in range(samples)) / repeats


def time_interleaved(
    calls: dict[str, Callable[[], object]],
    budget: float,
    clock: Clock = cpu_clock,
    *,
    pairs: Sequence[tuple[str, str]] = (),
    turn: Callable[[str], None] = lambda name: None,
    evict: Callable[[], object] | None = None,
    seed: int = 0,
) -> dict[str, Samples]:
    """Time all `calls` in interleaved rounds of random order, MIN_ROUNDS rounds at least.

    The rounds end after `budget` seconds, or before that as soon as the ratio of every pair (baseline, candidate) is
    known to PRECISION. `turn` is told, outside of what is timed, whose call comes next. evict: empties the caches
    before every sample, which is one call then: a second would find what the first has read.
    """
    shuffle = random.Random(seed).shuffle
    order = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        repeats = {}
        for name, call in calls.items():
            turn(name)
            repeats[name] = calibrate(call, clock)
        if evict:
            repeats = dict.fromkeys(calls, 1)
        deadline = time.perf_counter() + budget
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() >= deadline:
                break
            if done >= ROUNDS_FOR_PRECISION and done % ROUNDS_BETWEEN_LOOKS == 0 and _precise(seconds, pairs):
                break
            shuffle(order)
            for name in order:
                turn(name)
                if evict:
                    evict()
                seconds[name].append(clock(calls[name], repeats[name]) / repeats[name])
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(seconds[name], repeats[name]) for name in calls}


def _precise(seconds: dict[str, list[float]], pairs: Sequence[tuple[str, str]]) -> bool:
    ratios = (verdicts.ratio(seconds[baseline], seconds[candidate]) for baseline, candidate in pairs)
    return bool(pairs) and all(ratio.width < PRECISION for ratio in ratios)
