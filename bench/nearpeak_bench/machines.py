"""Runs of several machines side by side: each row with every machine's ratio and share of its limit, worst share first.

Files of one machine are taken together: of a case that several of them have, the newest row counts.
"""

import dataclasses
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable

from . import compare, history, results, table
from .results import Measurement, Row

HISTORY_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d+Z")
# Of rows whose limit is shorter, the share says what a call costs (2 to 10 us whatever it does), not what kernels do.
SHORTEST_LIMIT = 1e-5
EXPLANATION = (
    "ratio: how many times faster nearpeak is than the fastest baseline, measured in turns with it in one run on that "
    "machine; of several rows the geometric mean, and the worst. limit: the share reached of what that machine's "
    "arithmetic and memory, measured in the same run, allow; of several rows the lowest and the highest, "
    "and only of those whose limit is 10 us or more: shorter ones say what a call costs, and stand last."
)
Pair = tuple[Row, Measurement]


@dataclasses.dataclass(frozen=True)
class Machine:
    """name: that of its newest file, or of its folder in the history; results: the newest row of every case."""

    name: str
    results: results.Results

    def pairs(self) -> list[Pair]:
        return [(row, candidate) for row in self.results.rows for candidate in row.candidates()]


def gather(paths: Iterable[pathlib.Path]) -> list[Machine]:
    """The machines of these files, in the order of their names; UsageError where a file holds no results."""
    runs: dict[str, list[tuple[pathlib.Path, results.Results]]] = {}
    for path in paths:
        found = compare.load(path)
        runs.setdefault(history.fingerprint(found.machine), []).append((path, found))
    machines = {}
    for fingerprint, of_machine in runs.items():
        of_machine.sort(key=lambda pair: pair[1].created)
        name = _name(of_machine[-1][0])
        name = name if name not in machines else f"{name} {fingerprint[-8:]}"
        machines[name] = Machine(name, _merged([found for _, found in of_machine]))
    return [machines[name] for name in sorted(machines)]


def _name(path: pathlib.Path) -> str:
    return path.resolve().parent.name if HISTORY_NAME.fullmatch(path.stem) else path.stem


def _merged(runs: list[results.Results]) -> results.Results:
    """The newest run, with the rows and models that only earlier ones have."""
    rows = {row.case: row for run in runs for row in run.rows}
    model = next((run.model for run in reversed(runs) if run.model), None)
    return dataclasses.replace(runs[-1], rows=list(rows.values()), model=model)


def rows_table(machines: list[Machine]) -> table.Table:
    """Every row of every machine."""
    return _table("rows", table.CASE_HEADERS, machines, _case_key, _case_cells)


def operators_table(machines: list[Machine]) -> table.Table:
    """One line per operator, direction and dtype."""
    return _table("operators", ["op", "dtype", "lowest at", "rows"], machines, _operator_key, _operator_cells)


def _case_key(row: Row, candidate: Measurement) -> tuple:
    return row.case, candidate.implementation


def _case_cells(pairs: list[Pair]) -> list[str]:
    row, candidate = pairs[0]
    backends = dict.fromkeys(candidate.backend.split(" ")[0] for _, candidate in pairs)
    backend = ", ".join(backends) if candidate.implementation == "nearpeak" else candidate.implementation
    return [title(row), row.shape, table.SHORT_DTYPES.get(row.dtype, row.dtype), backend]


def _operator_key(row: Row, candidate: Measurement) -> tuple:
    return row.operator, row.direction, row.dtype, candidate.implementation


def _operator_cells(pairs: list[Pair]) -> list[str]:
    row, candidate = pairs[0]
    name = "" if candidate.implementation == "nearpeak" else f" {candidate.implementation}"
    cases = {row.case for row, _ in pairs}
    lowest, _ = min(pairs, key=_place)
    return [title(row) + name, table.SHORT_DTYPES.get(row.dtype, row.dtype), lowest.shape, str(len(cases))]


def title(row: Row) -> str:
    """The operator and, where it is not forward, the direction."""
    return row.operator if row.direction == "forward" else f"{row.operator} {row.direction}"


def _table(title: str, headers: list[str], machines: list[Machine], key: Callable, cells: Callable) -> table.Table:
    """Lines by `key`, whose first cells `cells` gives: wrong ones, then by the worst share, those without one last."""
    groups: dict[tuple, dict[str, list[Pair]]] = {}
    for machine in machines:
        for pair in machine.pairs():
            groups.setdefault(key(*pair), {}).setdefault(machine.name, []).append(pair)
    lines = sorted(groups.values(), key=_urgency)
    worst = next((group for group in lines if _urgency(group)[0] == 1), None)
    shown = []
    for group in lines:
        pairs = [pair for of_machine in group.values() for pair in of_machine]
        own = [cell for machine in machines for cell in _machine_cells(group.get(machine.name, []))]
        mark = "bad" if _urgency(group)[0] == 0 else "worst" if group is worst else "fine"
        shown.append(table.Line([*cells(pairs), *own], mark, _note(group)))
    return table.Table(title, [*headers, *(f"{m.name} {what}" for m in machines for what in ("ratio", "limit"))], shown)


def _urgency(group: dict[str, list[Pair]]) -> tuple[int, float]:
    """What is wrong (0), then what has a limit (1) by its lowest share on any machine, then the rest (2), calls whose
    limit is below their overhead among it."""
    return min(_place(pair) for of_machine in group.values() for pair in of_machine)


def _place(pair: Pair) -> tuple[int, float]:
    row, candidate = pair
    if candidate.status in table.BAD:
        return 0, 0.0
    if candidate.share is None or row.limit_seconds < SHORTEST_LIMIT:
        return 2, 0.0
    return 1, candidate.share


def _note(group: dict[str, list[Pair]]) -> str:
    wrong = [(name, *pair) for name, pairs in group.items() for pair in pairs if pair[1].status in table.BAD]
    return "; ".join(f"{name}, {row.shape} {candidate.status}: {candidate.note}" for name, row, candidate in wrong)


def _machine_cells(pairs: list[Pair]) -> list[str]:
    """The ratio to the fastest baseline, and the share of the limit: of one row, or of several their range."""
    if not pairs:
        return ["", ""]
    if len(pairs) == 1:
        return _row_cells(*pairs[0])
    ratios = [ratio.value for _, candidate in pairs if (ratio := table.slowest_ratio(candidate))]
    shares = [100 * share for kind, share in map(_place, pairs) if kind == 1]
    mean = "-"
    if ratios:
        mean = f"{table.figure_text(statistics.geometric_mean(ratios))}x (worst {table.figure_text(min(ratios))}x)"
    if len(shares) < 2:
        return [mean, f"{shares[0]:.0f}%" if shares else "-"]
    return [mean, f"{min(shares):.0f}% (to {max(shares):.0f}%)"]


def _row_cells(row: Row, candidate: Measurement) -> list[str]:
    share = "-" if candidate.share is None else f"{100 * candidate.share:.0f}%"
    slowest = table.slowest_ratio(candidate)
    if slowest is None:
        return ["-" if candidate.status == "ok" else candidate.status.upper(), share]
    name = next(name for name, ratio in candidate.ratios.items() if ratio is slowest)
    return [f"{table.figure_text(slowest.value)}x ({name})", share]
