"""How far two runs of one call differ on this machine: measured before anything is compared.

Two calls that are one and the same are timed against each other, as a kernel and its baseline will be. What their
ratio differs from 1 by, interval included, is the machine's noise; a difference between kernels must exceed it to
count. Two such pairs are tried: arithmetic in one thread, which meets the clock's changes and the neighbours of a
virtual machine, and a sum that all threads share, which waits for the slowest of them.
"""

from collections.abc import Callable

import torch

from . import timing, verdicts

SECONDS = 1.0
SPIN = 20_000  # steps, about 0.3 ms of Python
SHARED_ELEMENTS = 1 << 20  # 4 MiB, enough for torch to use every thread


def measure(device: torch.device, seconds: float = SECONDS) -> float:
    """The noise as a fraction: 0.01 means that one call seems up to 1 % faster than itself."""
    shared = torch.ones(SHARED_ELEMENTS, device=device)
    pairs = [lambda: sum(range(SPIN)), lambda: shared.sum()]
    if device.type == "cuda":
        pairs = pairs[1:]
    return max(_against_itself(call, device, seconds / len(pairs)) for call in pairs)


def _against_itself(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    samples = timing.time_interleaved({"once": call, "again": call}, seconds, timing.clock_of(device))
    ratio = verdicts.ratio(samples["once"].seconds, samples["again"].seconds)
    return max(1 - ratio.lower, ratio.upper - 1)
