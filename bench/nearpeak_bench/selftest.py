"""Whether the harness can be believed on this machine: `nearpeak bench selftest`.

Each quick case times our kernel against itself, which must come out as `same`, and against itself with 5 % more work
put on top, which must come out as `slower`. Rows of short calls are left out of the second: a delay of 5 % is too
short there to be made exactly.
"""

import dataclasses
import time
from collections.abc import Callable

import rich.console
import rich.progress
import torch

from . import noise, suites, table, timing, verdicts
from .cases import Case
from .exits import SELFTEST

BUDGET = 3.0
DELAY = 0.05
LONG_SECONDS = 100e-6
SAME_GOAL, SLOWER_GOAL = 0.97, 0.90
HEADERS = ["case", "time", "against itself", "verdict", f"slowed by {100 * DELAY:.0f} %", "verdict"]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One case: our kernel's median seconds, against itself, and against itself slowed."""

    case: Case
    seconds: float
    itself: verdicts.Ratio
    slowed: verdicts.Ratio

    @property
    def long(self) -> bool:
        return self.seconds > LONG_SECONDS


def slowed(call: Callable[[], object], delay: float) -> Callable[[], object]:
    """The call, and then `delay` seconds of waiting."""
    nanoseconds = int(delay * 1e9)

    def run():
        result = call()
        end = time.perf_counter_ns() + nanoseconds
        while time.perf_counter_ns() < end:
            pass
        return result

    return run


def try_case(case: Case, noise_floor: float) -> Trial:
    """Time one case on the CPU."""
    device = torch.device("cpu")
    call = case.bind(case.operator.implementations["nearpeak"].prepare, case.inputs(device))
    delay = DELAY * timing.best_seconds(call, timing.cpu_clock)
    calls = {"once": call, "again": call, "slowed": slowed(call, delay)}
    pairs = [("once", "again"), ("once", "slowed")]
    samples = {name: each.seconds for name, each in timing.time_interleaved(calls, BUDGET, pairs=pairs).items()}
    itself, slower = (verdicts.ratio(samples[first], samples[second], noise_floor) for first, second in pairs)
    return Trial(case, verdicts.spread(samples["once"]).median, itself, slower)


def run(console: rich.console.Console) -> int:
    """Show a line per case and what follows; the exit code is 0, or SELFTEST where a goal was missed."""
    floor = noise.measure(torch.device("cpu"))
    cases = [case for _, case in suites.select(suites.SUITES)]
    trials = [
        try_case(case, floor)
        for case in rich.progress.track(cases, "timing kernels against themselves", console=console, transient=True)
    ]
    console.print(table.to_rich(table.Table("selftest", HEADERS, [_line(trial) for trial in trials]), console))
    same = [trial.itself.verdict == verdicts.SAME for trial in trials]
    slower = [trial.slowed.verdict == verdicts.SLOWER for trial in trials if trial.long]
    console.print(f"noise of this machine: {100 * floor:.1f} %")
    kept = [
        _judge(console, "a kernel against itself is the same", same, SAME_GOAL),
        _judge(console, f"a kernel slowed by {100 * DELAY:.0f} % is slower", slower, SLOWER_GOAL),
    ]
    return 0 if all(kept) else SELFTEST


def _line(trial: Trial) -> table.Line:
    itself, slower = trial.itself, trial.slowed
    missed = itself.verdict != verdicts.SAME or (trial.long and slower.verdict != verdicts.SLOWER)
    cells = [
        trial.case.name,
        table.seconds_text(trial.seconds),
        table.ratio_text(itself),
        itself.verdict,
        table.ratio_text(slower),
        slower.verdict if trial.long else "-",
    ]
    return table.Line(cells, "worst" if missed else "fine", "")


def _judge(console: rich.console.Console, what: str, found: list[bool], goal: float) -> bool:
    share = sum(found) / max(1, len(found))
    style = "green" if share >= goal else "red"
    console.print(f"[{style}]{what}: {100 * share:.0f} % of {len(found)} rows (goal {100 * goal:.0f} %)")
    return share >= goal
