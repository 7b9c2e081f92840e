"""Two runs against each other, and a gate for CI: `nearpeak bench compare before.json after.json`.

A time of another day, or of another machine, says nothing. So each run's kernel is first held against that run's own
baseline, which met the same clock and neighbours, and what is compared is

    change = (baseline / kernel, after) / (baseline / kernel, before)        below 1: the kernel has become slower

with an interval: the bootstrap draws the rounds of both runs again. Where a row has no baseline, or none that both
runs have, its times are compared as they are. A change counts where the interval leaves out 1 and the change is
further from 1 than the threshold: the operator's own, else the general one, and never less than either run's noise.
"""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Iterator

import numpy as np
import rich.console

from . import results, table, verdicts
from .cases import OPERATORS
from .exits import CRASHED, REGRESSION, UNSTABLE, WRONG, UsageError

ANY = ""
HEADERS = ["case", "kernel", "held against", "before", "after", "change", "threshold", "verdict"]


@dataclasses.dataclass(frozen=True)
class Change:
    """One kernel in one case: its median speeds before and after, relative to `baseline` ("": calls a second)."""

    case: str
    implementation: str
    baseline: str
    before: float
    after: float
    change: verdicts.Ratio
    threshold: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All changes, worst first, the names of the cases that only one run has, and those of cases whose kernel was right
    before and is not any more, with its status."""

    changes: list[Change]
    only_before: list[str]
    only_after: list[str]
    broken: dict[str, str]

    @classmethod
    def of(cls, before: results.Results, after: results.Results, thresholds: dict[str, float]) -> "Comparison":
        old, new = _timed(before), _timed(after)
        noise = max(before.noise or 0.0, after.noise or 0.0)
        changes = []
        for key, (row, candidate) in new.items():
            if key in old:
                threshold = thresholds.get(row.operator, thresholds.get(ANY, verdicts.LEAST_MARGIN))
                changes.append(_change(*old[key], row, candidate, max(noise, threshold)))
        broken = _broken(before, after)
        if not changes and not broken:
            raise UsageError("these runs have no case in common: compare runs of the same suites")
        changes.sort(key=lambda change: change.change.value)
        missing = (sorted({case for case, _ in one - other} - broken.keys()) for one, other in
                   ((old.keys(), new.keys()), (new.keys(), old.keys())))  # fmt: skip
        return cls(changes, *missing, broken)

    def count(self, verdict: str) -> int:
        return sum(change.change.verdict == verdict for change in self.changes)

    @property
    def code(self) -> int:
        """0, WRONG or CRASHED (a kernel has become so), REGRESSION (one is slower), or UNSTABLE (none is for certain,
        but of some noise hides it)."""
        if self.broken:
            return WRONG if "wrong" in self.broken.values() else CRASHED
        if self.count(verdicts.SLOWER):
            return REGRESSION
        return UNSTABLE if self.count(verdicts.NOISY) else 0


def thresholds_of(texts: tuple[str, ...]) -> dict[str, float]:
    """Of "5" and "rms_norm=10", in percent: by operator, as fractions; that of ANY is all others'."""
    names = {operator.name for operator in OPERATORS}
    found = {}
    for text in texts:
        operator, _, percent = text.rpartition("=")
        try:
            found[operator] = float(percent) / 100
        except ValueError:
            found[operator] = -1.0
        if found[operator] <= 0:
            raise UsageError(f"--threshold {text}: give percent, as in 5, or of one operator, as in rms_norm=10")
        if operator and operator not in names:
            raise UsageError(f"--threshold {text}: there is no operator {operator}: {', '.join(sorted(names))}")
    return found


def load(path: pathlib.Path) -> results.Results:
    """The results in a file; UsageError with one line that says what is wrong with it."""
    try:
        return results.Results.from_json(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} holds no results of this version of nearpeak bench ({error})") from None


def show(comparison: Comparison, console: rich.console.Console) -> None:
    """What changed, worst first."""
    console.print(table.to_rich(_table(comparison), console))
    for line in _remarks(comparison):
        console.print(line, highlight=False)


def to_markdown(comparison: Comparison) -> str:
    """For a pull request: the verdict first, then all rows."""
    shown = table.to_markdown([_table(comparison)]).rstrip()
    remarks = "\n\n".join(_remarks(comparison))
    return f"## nearpeak bench compare\n\n{remarks}\n\n{shown}\n"


def to_csv(comparison: Comparison) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "kernel", "held_against", "before", "after", "change", "lower", "upper", "threshold",
                     "verdict"])  # fmt: skip
    for each in comparison.changes:
        change = each.change
        writer.writerow([each.case, each.implementation, each.baseline, each.before, each.after, change.value,
                         change.lower, change.upper, each.threshold, change.verdict])  # fmt: skip
    return text.getvalue()


def _remarks(comparison: Comparison) -> Iterator[str]:
    yield ", ".join(f"{comparison.count(name)} {name}" for name in verdicts.ALL)
    if comparison.broken:
        yield f"no more right: {', '.join(f'{case} ({status})' for case, status in comparison.broken.items())}"
    for names, where in ((comparison.only_before, "after"), (comparison.only_after, "before")):
        if names:
            yield f"not in the run {where}: {', '.join(names)}"


def _broken(before: results.Results, after: results.Results) -> dict[str, str]:
    """By case, the status of kernels that were right before and are not any more."""
    statuses = [
        {(row.case, each.implementation): each.status for row in run.rows for each in row.candidates()}
        for run in (before, after)
    ]
    return {
        key[0]: status for key, status in statuses[1].items() if status in table.BAD and statuses[0].get(key) == "ok"
    }


def _timed(found: results.Results) -> dict:
    """By case and implementation, the kernels that have times."""
    return {
        (row.case, candidate.implementation): (row, candidate)
        for row in found.rows
        for candidate in row.candidates()
        if candidate.samples
    }


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


def _change(old_row, old, row, new, threshold: float) -> Change:
    baseline = _baseline(row, old_row)
    before, after = _speeds(old_row, old, baseline), _speeds(row, new, baseline)
    change = verdicts.change(before, after, threshold)
    return Change(
        row.case, new.implementation, baseline, float(np.median(before)), float(np.median(after)), change, threshold
    )


def _table(comparison: Comparison) -> table.Table:
    return table.Table("changes, worst first", HEADERS, [_line(change) for change in comparison.changes])


def _line(each: Change) -> table.Line:
    if each.baseline:
        texts = [f"{each.before:.3g}x", f"{each.after:.3g}x"]
    else:
        texts = [table.seconds_text(1 / each.before), table.seconds_text(1 / each.after)]
    change = table.ratio_text(each.change)
    threshold = f"{100 * each.threshold:.3g}%"
    cells = [each.case, each.implementation, each.baseline or "-", *texts, change, threshold, each.change.verdict]
    return table.Line(cells, "bad" if each.change.verdict == verdicts.SLOWER else "fine", "")
