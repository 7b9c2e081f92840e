"""Results as tables for people: one line per case and candidate, in the terminal, in Markdown and in HTML.

The worst line of a suite, the one slowest against its fastest baseline, is marked, and so is every wrong result.
"""

import csv
import dataclasses
import io
import statistics
from collections.abc import Iterable

import rich.box
import rich.console
import rich.markup
import rich.measure
import rich.table
import rich.text

from . import growth
from .memory import RESOLUTION
from .results import BROKEN, Measurement, Results, Row
from .verdicts import SLOWER, Ratio, Spread

BAD = ("wrong", *BROKEN)
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
CASE_HEADERS = ["op", "shape", "dtype", "backend"]
DROPPABLE = ["max error", "compile", "memory", "mean error", "backend", "rows"]
UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
STYLES = {"worst": "bold yellow", "bad": "bold red", "fine": ""}
EXPLANATION = (
    "time: median of one call, and the quartiles. A column named after a baseline: how many times faster nearpeak is "
    "than it (above 1 is faster), and the 95 % interval. verdict: against the fastest baseline; a difference counts "
    "where the interval leaves out 1 and the ratio is further from it than this machine's noise. limit: the share "
    "reached of what this machine's arithmetic and memory, measured in this run, allow. error: against float64, and "
    "the plain layer's own. memory: peak bytes of a call beside inputs and outputs. compile: what the first call took "
    "where a compiler worked, torch.compile or Triton, and with its files cached."
)
# A fit further off than this is no power of the size.
NOTABLE_DEVIATION = 0.1


@dataclasses.dataclass(frozen=True)
class Line:
    """The cells of one line, and its mark: "fine", "worst" or "bad" (wrong or failed). command: repeats its row."""

    cells: list[str]
    mark: str
    note: str
    command: str = ""

    @property
    def name(self) -> str:
        return " ".join(self.cells[:3])


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    headers: list[str]
    lines: list[Line]

    @property
    def commands(self) -> list[str]:
        return list(dict.fromkeys(line.command for line in self.lines if line.command))


def _unit(seconds: float) -> tuple[str, float]:
    return next((unit for unit in UNITS if abs(seconds) >= unit[1]), UNITS[-1])


def seconds_text(seconds: float) -> str:
    unit, size = _unit(seconds)
    return f"{figure_text(seconds / size)} {unit}"


def figure_text(value: float) -> str:
    """Three significant figures, and never an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def bytes_text(size: int | None) -> str:
    if size is None:
        return "-"
    if size < RESOLUTION:
        return "~0"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def error_text(own: float | None, plain: float) -> str:
    return "-" if own is None else f"{_short(own)} ({_short(plain)})"


def _short(value: float) -> str:
    """1.2e-7, without the zero that Python puts before a single digit of the exponent."""
    return f"{value:.1e}".replace("e-0", "e-").replace("e+00", "") if value else "0"


def spread_text(spread: Spread) -> str:
    _, size = _unit(spread.median)
    return f"{seconds_text(spread.median)} ({figure_text(spread.lower / size)}-{figure_text(spread.upper / size)})"


def ratio_text(ratio: Ratio) -> str:
    return f"{figure_text(ratio.value)}x ({figure_text(ratio.lower)}-{figure_text(ratio.upper)})"


def slowest_ratio(candidate: Measurement) -> Ratio | None:
    """The ratio to the fastest baseline."""
    return min(candidate.ratios.values(), key=lambda ratio: ratio.value, default=None)


def _ratio_cell(row: Row, candidate: Measurement, name: str) -> str:
    if name in candidate.ratios:
        return ratio_text(candidate.ratios[name])
    baseline = next((m for m in row.measurements if m.implementation == name), None)
    return "" if baseline is None or candidate.status != "ok" else baseline.status


def _verdict_cell(row: Row, candidate: Measurement) -> str:
    slowest = slowest_ratio(candidate)
    return "" if slowest is None or row.limit_seconds is None else slowest.verdict


def _note(row: Row, candidate: Measurement) -> str:
    if row.limit_seconds is None and candidate.ratios:
        # A yardstick, not a rival: what counts is the time on top of it.
        over = [f"{seconds_text(ratio.difference)} over {name}" for name, ratio in candidate.ratios.items()]
        return ", ".join([*over, *filter(None, [candidate.note])])
    baselines = [f"{m.implementation} {m.status}: {m.note}" for m in row.baselines() if m.status in BROKEN]
    return "; ".join([*filter(None, [candidate.note]), *baselines])


def _compile_cell(row: Row, candidate: Measurement) -> str:
    """Of the candidate and of the baselines, of which one is compiled at most."""
    compiled = [m for m in (candidate, *row.baselines()) if m.compile_cold is not None or m.compile_cached is not None]
    return ", ".join(_compile_text(m.compile_cold, m.compile_cached) for m in compiled)


def _compile_text(cold: float | None, cached: float | None) -> str:
    if cold is None:
        return f"{seconds_text(cached)} cached"
    return seconds_text(cold) + (f" ({seconds_text(cached)} cached)" if cached is not None else "")


def suite_tables(suite: str, rows: Iterable[Row]) -> list[Table]:
    """The table of one suite, and what its rows say together, where they do."""
    rows = [row for row in rows if row.suite == suite]
    tables = [suite_table(suite, rows), growth_table(suite, rows), scaling_table(suite, rows)]
    return [each for each in tables if each.lines]


def suite_table(suite: str, rows: Iterable[Row]) -> Table:
    """The table of one suite, a line per row and candidate."""
    rows = [row for row in rows if row.suite == suite]
    baselines = list(dict.fromkeys(m.implementation for row in rows for m in row.baselines() if m.status != "absent"))
    pairs = [(row, candidate) for row in rows for candidate in row.candidates()]
    timed = [candidate for _, candidate in pairs if candidate.ratios]
    worst = min(timed, key=lambda candidate: slowest_ratio(candidate).value, default=None)
    lines = []
    for row, candidate in pairs:
        bad = candidate.status in BAD
        cells = [
            *case_cells(row, row.shape),
            candidate.backend if candidate.implementation == "nearpeak" else candidate.implementation,
            candidate.status.upper() if candidate.spread is None else spread_text(candidate.spread),
            *(_ratio_cell(row, candidate, name) for name in baselines),
            _verdict_cell(row, candidate),
            "-" if candidate.share is None else f"{100 * candidate.share:.0f}%",
            error_text(candidate.error_mean, row.plain_error_mean),
            error_text(candidate.error_max, row.plain_error_max),
            bytes_text(candidate.extra_memory),
            _compile_cell(row, candidate),
        ]
        mark = "bad" if bad else "worst" if candidate is worst else "fine"
        lines.append(Line(cells, mark, _note(row, candidate), row.command))
    headers = [*CASE_HEADERS, "time", *baselines, "verdict", "limit", "mean error", "max error", "memory", "compile"]
    if not any(line.cells[-1] for line in lines):
        headers.pop()
        lines = [dataclasses.replace(line, cells=line.cells[:-1]) for line in lines]
    return Table(suite, headers, lines)


def growth_table(suite: str, rows: Iterable[Row]) -> Table:
    """The power of a dimension that time grows with, by implementation, and that of the physical limit."""
    grown = growth.growths(rows)
    names = list(dict.fromkeys(name for each in grown for name in each.fits))
    lines = []
    for each in grown:
        sizes = next(iter(each.fits.values())).sizes
        fits = [each.fits.get(name) for name in names]
        limit = f"{each.limit.exponent:.2f}" if each.limit else "-"
        cells = [*case_cells(each.row, each.shape), f"{min(sizes)}-{max(sizes)}", *map(_exponent_text, fits), limit]
        lines.append(Line(cells, "fine", _deviations(each)))
    return Table(growth_title(suite), ["op", "shape", "dtype", "sizes", *names, "limit"], lines)


def _deviations(each: growth.Growth) -> str:
    notable = {name: fit.deviation for name, fit in each.fits.items() if fit.deviation > NOTABLE_DEVIATION}
    if not notable:
        return ""
    off = ", ".join(f"{name} {100 * deviation:.0f} %" for name, deviation in notable.items())
    return f"off a power of {each.dimension} by up to {off}"


def scaling_table(suite: str, rows: Iterable[Row]) -> Table:
    """How many times faster rows are with more threads, by implementation."""
    scaled = growth.scalings(rows)
    names = list(dict.fromkeys(name for each in scaled for name in each.speedups))
    lines = []
    for each in scaled:
        speedups = [ratio_text(each.speedups[name]) if name in each.speedups else "" for name in names]
        counts = f"{each.row.threads} over {each.least}"
        lines.append(Line([*case_cells(each.row, each.shape), counts, *speedups], "fine", ""))
    return Table(f"{suite}: speed-up by threads", ["op", "shape", "dtype", "threads", *names], lines)


def growth_title(suite: str) -> str:
    return f"{suite}: time grows as size^b, b ="


def case_cells(row: Row, shape: str) -> list[str]:
    """The first cells of a line."""
    operator = row.operator if row.direction == "forward" else f"{row.operator} {row.direction}"
    return [operator, shape, SHORT_DTYPES.get(row.dtype, row.dtype)]


def _exponent_text(fitted: growth.Fit | None) -> str:
    return f"{fitted.exponent:.2f} ({fitted.lower:.2f}-{fitted.upper:.2f})" if fitted else ""


def absent(rows: Iterable[Row]) -> str:
    """The baselines that could not be run, and what they lack; empty where all could."""
    baselines = [m for row in rows for m in row.baselines()]
    present = {m.implementation for m in baselines if m.status != "absent"}
    found = {m.implementation: m.note for m in baselines if m.implementation not in present}
    return ", ".join(f"{name} ({why})" for name, why in found.items())


def summary_table(rows: list[Row]) -> Table:
    """One line per operator, dtype and direction: against the fastest baseline of each row."""
    groups: dict[tuple, list[tuple[Row, Measurement]]] = {}
    for row in rows:
        for candidate in row.candidates():
            key = (row.operator, row.direction, row.dtype, candidate.backend)
            groups.setdefault(key, []).append((row, candidate))
    lines = [_summary_line(*key, members) for key, members in groups.items()]
    headers = ["op", "dtype", "backend", "rows", "wrong", "vs fastest baseline", "worst", "at", "limit"]
    return Table("summary", headers, lines)


def _summary_line(operator, direction, dtype, backend, members) -> Line:
    timed = [(row, candidate, slowest_ratio(candidate)) for row, candidate in members if candidate.ratios]
    wrong = sum(candidate.status in BAD for _, candidate in members)
    shares = [candidate.share for _, candidate in members if candidate.share is not None]
    cells = [
        operator if direction == "forward" else f"{operator} {direction}",
        SHORT_DTYPES.get(dtype, dtype),
        backend,
        str(len(members)),
        str(wrong),
    ]
    mark = "bad" if wrong else "fine"
    if timed:
        row, candidate, slowest = min(timed, key=lambda member: member[2].value)
        name = next(name for name, ratio in candidate.ratios.items() if ratio is slowest)
        mean = statistics.geometric_mean(ratio.value for _, _, ratio in timed)
        cells += [f"{figure_text(mean)}x", f"{figure_text(slowest.value)}x", f"{row.shape} ({name})"]
        if mark == "fine" and slowest.verdict == SLOWER and row.limit_seconds is not None:
            mark = "worst"
    else:
        cells += ["-", "-", "-"]
    cells.append(f"{100 * statistics.median(shares):.0f}%" if shares else "-")
    return Line(cells, mark, "")


def model_table(model: dict) -> Table:
    """The model benchmark's rows, whose keys are the headers."""
    rows, command = model.get("rows", []), model.get("command", "")
    headers = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list)))
    lines = [Line([_model_cell(row.get(key)) for key in headers], "fine", "", command) for row in rows]
    return Table("model", headers, lines)


def _model_cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_rich(table: Table, console: rich.console.Console) -> rich.table.Table:
    """The table for a terminal, without the columns of least interest where it is narrow; notes stand under it."""
    dropped: list[str] = []
    while True:
        shown = _rich_table(table, dropped)
        left = [header for header in DROPPABLE if header in table.headers and header not in dropped]
        width = rich.measure.Measurement.get(console, console.options.update(width=1000), shown).maximum
        if width <= console.width or not left:
            return shown
        dropped.append(left[0])


def _rich_table(table: Table, dropped: list[str]) -> rich.table.Table:
    notes = [rich.markup.escape(f"{line.name}: {line.note}") for line in table.lines if line.note]
    if dropped:
        notes.append(f"This terminal is too narrow for: {', '.join(dropped)}. The files written have them.")
    shown = rich.table.Table(
        title=table.title, title_justify="left", title_style="bold", header_style="bold", caption_justify="left",
        box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption="\n".join(notes) or None,
    )  # fmt: skip
    kept = [index for index, header in enumerate(table.headers) if header not in dropped]
    # The first four columns name a case: two lines of one column save a terminal's width.
    cased = table.headers[:4] == CASE_HEADERS
    if cased:
        kept = [index for index in kept if index >= 4]
        shown.add_column("case")
    for index in kept:
        left = not cased and index < 3
        shown.add_column(_folded_header(table.headers[index]), justify="left" if left else "right")
    for line in table.lines:
        cells = [_folded(line.cells[index]) for index in kept]
        if cased:
            op, shape, dtype, backend = line.cells[:4]
            cells.insert(0, f"{op}\n{shape} {dtype} {backend}")
        if line.mark == "worst":
            cells[0] = cells[0].replace("\n", " ◀ worst\n") if cased else f"{cells[0]} ◀"
        shown.add_row(*map(rich.text.Text, cells), style=STYLES[line.mark])
    return shown


def _folded(cell: str) -> str:
    """A value above what belongs to it: an interval, the plain layer's error, a baseline."""
    return cell.replace(" (", "\n").removesuffix(")")


def _folded_header(header: str) -> str:
    return header.replace(".", ".\n").replace(" ", "\n")


def to_markdown(tables: Iterable[Table], title: bool = True) -> str:
    """The tables for a pull request, each below its title."""
    parts = []
    for table in tables:
        head = [f"### {table.title}", ""] if title else []
        head += [_markdown_line(table.headers), _markdown_line(["---"] * len(table.headers))]
        for line in table.lines:
            emphasis = {"worst": "**", "bad": "**", "fine": ""}[line.mark]
            head.append(_markdown_line(f"{emphasis}{cell}{emphasis}" if cell else "" for cell in line.cells))
        notes = [f"- {line.name}: {line.note}" for line in table.lines if line.note]
        parts.append("\n".join([*head, "", *notes, *_markdown_commands(table)]).rstrip() + "\n")
    return "\n".join(parts)


def _markdown_commands(table: Table) -> list[str]:
    """Folded, as they are long."""
    if not table.commands:
        return []
    head = ["", "<details><summary>Commands, each of which repeats one row</summary>", "", "```sh"]
    return [*head, *table.commands, "```", "", "</details>"]


CSV_COLUMNS = (
    "suite", "case", "operator", "shape", "dtype", "direction", "implementation", "baseline", "backend", "status",
    "seconds", "seconds_lower", "seconds_upper", "rounds", "against", "ratio", "ratio_lower", "ratio_upper", "verdict",
    "limit_seconds", "bound", "share", "error_mean", "error_max", "extra_memory", "compile_cold", "compile_cached",
    "threads", "cold", "note", "command",
)  # fmt: skip


def to_csv(found: Results) -> str:
    """A line per implementation and baseline that it is held against; the figures are not rounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in found.rows:
        for m in row.measurements:
            known = {**vars(row), **vars(m)}
            if m.spread:
                known |= {"seconds": m.spread.median, "seconds_lower": m.spread.lower, "seconds_upper": m.spread.upper}
                known["rounds"] = len(m.samples.seconds)
            for name, ratio in m.ratios.items() or [("", None)]:
                against = {"against": name}
                if ratio:
                    against |= {"ratio": ratio.value, "ratio_lower": ratio.lower, "ratio_upper": ratio.upper}
                    against["verdict"] = ratio.verdict
                writer.writerow({**known, **against})
    return text.getvalue()


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
