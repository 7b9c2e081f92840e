"""The HTML reports, of one run and of several machines: pages that hold everything and ask the network for nothing."""

import dataclasses
import itertools
import pathlib
import re

import jinja2

from . import growth, history, machines, overview, plots, table
from .results import Results

FIGURE = re.compile(r"~?(\d+(?:\.\d+)?(?:e[+-]?\d+)?) ?(s|ms|µs|MiB|GiB|x|%)?(?: \(|$)")
UNITS = {"ms": 1e-3, "µs": 1e-6, "MiB": 2.0**20, "GiB": 2.0**30}
TEMPLATES = pathlib.Path(__file__).parent
# Of the history, the newest: a line of more cannot be read, and each takes a while to load.
MOST_RUNS = 20


@dataclasses.dataclass(frozen=True)
class Chart:
    """One chart: SVG text, and the sentence that says what it shows to who cannot see it."""

    description: str
    svg: str


def _charts(results: Results) -> dict[str, list[Chart]]:
    """By title of the table that they belong to: of a suite, three charts for each operator; of growth, one each."""
    charts: dict[str, list[Chart]] = {}
    by_operator: dict[tuple[str, str], list] = {}
    for row in results.rows:
        for candidate in row.candidates():
            by_operator.setdefault((row.suite, row.operator), []).append((row, candidate))
    for (suite, operator), pairs in by_operator.items():
        found = charts.setdefault(suite, [])
        if timed := [pair for pair in pairs if pair[1].ratios]:
            description = f"{operator}: how many times faster than each baseline"
            found.append(Chart(description, plots.speedup_chart(timed)))
        if bounded := [pair for pair in pairs if pair[1].share is not None]:
            found.append(Chart(f"{operator}: share of the physical limit", plots.limit_chart(bounded)))
        counted = [pair for pair in pairs if pair[1].spread and pair[0].flops and pair[0].bytes]
        if counted and results.peaks:
            description = f"{operator}: roofline, rate over operations per byte"
            found.append(Chart(description, plots.roofline_chart(counted, results.peaks)))
    return charts | _growth_charts(results)


def _growth_charts(results: Results) -> dict[str, list[Chart]]:
    groups: dict[tuple[str, str], list[growth.Growth]] = {}
    for each in growth.growths(results.rows):
        op, _, dtype = table.case_cells(each.row, each.shape)
        description = f"{op} {dtype}: time over {each.dimension}, both logarithmic"
        groups.setdefault((table.growth_title(each.row.suite), description), []).append(each)
    charts: dict[str, list[Chart]] = {}
    for (title, description), members in groups.items():
        charts.setdefault(title, []).append(Chart(description, plots.growth_chart(members)))
    return charts


def machine_facts(results: Results) -> list[tuple[str, str]]:
    """What the page says of the machine, as (name, value) pairs."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    memory = machine["memory_bytes"]
    facts = [
        ("Processor", machine["processor"]),
        ("Features", " ".join(machine["features"])),
        ("Cores, threads used", f"{machine['cores']}, {machine['threads']}"),
        ("Memory", f"{memory / 2**30:.0f} GiB" if memory else "unknown"),
        ("Instruction set of nearpeak", machine["isa"] or "none: the C++ extension is missing"),
        ("Instruction set of PyTorch", machine["torch_capability"]),
        ("GPU", "; ".join(machine["gpus"]) or "none"),
        ("Versions", versions),
        ("Commit", machine["commit"] or "unknown"),
    ]
    if results.rows:
        facts.append(("Caches and outputs", _modes(results)))
    if results.noise is not None:
        facts.append(("Noise", f"one call differs from itself by up to {100 * results.noise:.1f} %"))
    if absent := table.absent(results.rows):
        facts.append(("Baselines that are absent", absent))
    if results.peaks:
        rates = results.peaks.multiply_add.items()
        largest = max(results.peaks.copy)
        facts += [
            ("Peak multiply-add", ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates)),
            ("Memory bandwidth", f"copy {results.peaks.copy[largest] / 1e9:.1f} GB/s, "
                                 f"read {results.peaks.read[largest] / 1e9:.1f} GB/s"),
        ]  # fmt: skip
    return facts


def _modes(results: Results) -> str:
    states = {
        False: "warm caches, as the preceding call leaves them",
        True: "cold caches, emptied before each sample, where a row says so",
    }
    used = [text for cold, text in states.items() if any(row.cold == cold for row in results.rows)]
    return "; ".join([*used, "fresh outputs, but for operators whose name ends in out or inplace"])


def tables_of(results: Results) -> list[table.Table]:
    """The tables of the suites in the order in which they ran, then the model's."""
    suites = dict.fromkeys(row.suite for row in results.rows)
    tables = [each for suite in suites for each in table.suite_tables(suite, results.rows)]
    if results.model:
        tables.append(table.model_table(results.model))
    return tables


def sort_value(cell: str) -> str:
    """What a column is sorted by: the cell's figure in its base unit, or its text."""
    found = FIGURE.match(cell)
    if not found:
        return cell
    return repr(float(found.group(1)) * UNITS.get(found.group(2), 1.0))


def _history(results: Results) -> list[Chart]:
    """A chart per operator that earlier runs of this machine have too."""
    runs = [run for _, run in itertools.islice(history.earlier(results), MOST_RUNS - 1)]
    runs = [*reversed(runs), results]
    charts = {}
    for course in history.courses(runs):
        charts.setdefault(course.row.operator, []).append(course)
    return [
        Chart(f"{name}: how many times faster, run by run", overview.history_chart(courses, runs))
        for name, courses in charts.items()
    ]


def to_html(results: Results) -> str:
    """The page of one run."""
    return _render(
        "report.html.j2",
        results=results,
        facts=machine_facts(results),
        summary=table.summary_table(results.rows),
        tables=tables_of(results),
        charts=_charts(results),
        past=_history(results),
        explanation=table.EXPLANATION,
    )


def to_markdown(results: Results) -> str:
    """The tables of one run, for a pull request."""
    facts = "".join(f"- {name}: {value}\n" for name, value in machine_facts(results))
    summary = [table.summary_table(results.rows)] if results.rows else []
    shown = table.to_markdown([*summary, *tables_of(results)])
    return f"## nearpeak bench, {results.created}\n\n{facts}\n{shown}\n{table.EXPLANATION}\n"


def machines_to_markdown(found: list[machines.Machine]) -> str:
    """The tables of several machines side by side, for a pull request."""
    shown = table.to_markdown([machines.operators_table(found), machines.rows_table(found)])
    return f"## nearpeak bench: {', '.join(machine.name for machine in found)}\n\n{shown}\n{machines.EXPLANATION}\n"


def machines_to_html(found: list[machines.Machine]) -> str:
    """The page of several machines side by side."""
    return _render(
        "machines.html.j2",
        machines=found,
        operators=machines.operators_table(found),
        rows=machines.rows_table(found),
        overview=overview.speedup_overview(found),
        facts={machine.name: machine_facts(machine.results) for machine in found},
        models={machine.name: table.model_table(machine.results.model) for machine in found if machine.results.model},
        past={machine.name: _history(machine.results) for machine in found},
        explanation=machines.EXPLANATION,
    )


def _render(template: str, **names) -> str:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["sort_value"] = sort_value
    return environment.get_template(template).render(**names)
