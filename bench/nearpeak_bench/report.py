"""The HTML report: one page that holds everything and asks the network for nothing."""

import dataclasses
import pathlib
import re

import jinja2

from . import growth, plots, table
from .results import Results

FIGURE = re.compile(r"~?(\d+(?:\.\d+)?(?:e[+-]?\d+)?) ?(s|ms|µs|MiB|GiB|x|%)?(?: \(|$)")
UNITS = {"ms": 1e-3, "µs": 1e-6, "MiB": 2.0**20, "GiB": 2.0**30}
TEMPLATE = pathlib.Path(__file__).with_name("report.html.j2")


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


def to_html(results: Results) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["sort_value"] = sort_value
    return environment.from_string(TEMPLATE.read_text()).render(
        results=results,
        facts=machine_facts(results),
        summary=table.summary_table(results.rows),
        tables=tables_of(results),
        charts=_charts(results),
        explanation=table.EXPLANATION,
    )
