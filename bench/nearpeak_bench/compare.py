"""Two runs against each other, and a gate for CI: `nearpeak bench compare before.json after.json`.

A time of another day, or of another machine, says nothing. So each run's kernel is first held against that run's own
baseline, which met the same clock and neighbours, and what is compared is

    change = (baseline / kernel, after) / (baseline / kernel, before)        below 1: the kernel has become slower

with an interval: the bootstrap draws the rounds of both runs again. Where a row has no baseline, or none that both
runs have, its times are compared as they are.
"""

import pathlib

import numpy as np
import rich.console

from . import results, table, verdicts
from .exits import REGRESSION, UNSTABLE

HEADERS = ["case", "kernel", "held against", "before", "after", "change", "verdict"]


def load(path: pathlib.Path) -> results.Results:
    """The results in a file; ValueError with one line that says what is wrong with it."""
    try:
        return results.Results.from_json(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of this version of nearpeak bench ({error})") from None


def run(console: rich.console.Console, before_path: pathlib.Path, after_path: pathlib.Path) -> int:
    """Show what changed, worst first. Exit codes: 0, REGRESSION (a kernel is slower), UNSTABLE (too noisy)."""
    before, after = load(before_path), load(after_path)
    noise = max(before.noise or 0.0, after.noise or 0.0)
    compared = [
        (row, candidate, *_compare(old, candidate, old_row, row, noise))
        for row, candidate, old_row, old in _common(before, after)
    ]
    compared.sort(key=lambda entry: entry[-1].value)
    lines = [_line(*entry) for entry in compared]
    console.print(table.to_rich(table.Table("changes, worst first", HEADERS, lines), console))
    counts = {name: sum(change.verdict == name for *_, change in compared) for name in verdicts.ALL}
    console.print(", ".join(f"{count} {name}" for name, count in counts.items()), highlight=False)
    _print_unmatched(console, before, after)
    if counts[verdicts.SLOWER]:
        return REGRESSION
    return UNSTABLE if counts[verdicts.NOISY] else 0


def _timed(found: results.Results) -> dict:
    """By case and implementation, the kernels that have times."""
    return {
        (row.case, candidate.implementation): (row, candidate)
        for row in found.rows
        for candidate in row.candidates()
        if candidate.samples
    }


def _common(before: results.Results, after: results.Results):
    old = _timed(before)
    for key, (row, candidate) in _timed(after).items():
        if key in old:
            yield row, candidate, *old[key]


def _baseline(row: results.Row, other: results.Row) -> str:
    """The baseline that both runs timed and that is fastest in `row`; empty without one."""
    shared = {m.implementation for m in other.baselines() if m.samples}
    timed = [m for m in row.baselines() if m.samples and m.implementation in shared]
    return min(timed, key=lambda m: m.spread.median).implementation if timed else ""


def _speeds(row: results.Row, candidate: results.Measurement, baseline: str) -> np.ndarray:
    """By round: how many times faster than the baseline, or without one, calls a second."""
    own = np.asarray(candidate.samples.seconds)
    if not baseline:
        return 1 / own
    measured = next(m for m in row.baselines() if m.implementation == baseline)
    return np.asarray(measured.samples.seconds) / own


def _compare(old, new, old_row, row, noise) -> tuple[str, float, float, verdicts.Ratio]:
    baseline = _baseline(row, old_row)
    before, after = _speeds(old_row, old, baseline), _speeds(row, new, baseline)
    return baseline, float(np.median(before)), float(np.median(after)), verdicts.change(before, after, noise)


def _line(row, candidate, baseline, before, after, change) -> table.Line:
    if baseline:
        texts = [f"{before:.3g}x", f"{after:.3g}x"]
    else:
        texts = [table.seconds_text(1 / before), table.seconds_text(1 / after)]
    cells = [row.case, candidate.implementation, baseline or "-", *texts, table.ratio_text(change), change.verdict]
    return table.Line(cells, "bad" if change.verdict == verdicts.SLOWER else "fine", "")


def _print_unmatched(console: rich.console.Console, before: results.Results, after: results.Results) -> None:
    old, new = _timed(before).keys(), _timed(after).keys()
    for missing, where in ((old - new, "after"), (new - old, "before")):
        if missing:
            names = ", ".join(sorted(case for case, _ in missing))
            console.print(f"[yellow]not in the run {where}: {names}", highlight=False)
