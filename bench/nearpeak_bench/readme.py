"""What a README shows of results: written between two markers, from files, so that no figure is copied by hand.

nearpeak bench report bench/results/*.json --readme README.md
"""

import pathlib

from . import machines, overview, results, table
from .exits import UsageError
from .machines import Machine

BEGIN, END = "<!-- results: written by nearpeak bench report --readme -->", "<!-- end of results -->"
# GitHub's text colours, by what its <picture> calls its themes.
INKS = {"light": "#1f2328", "dark": "#e6edf3"}
CHART = "docs/speedup-{theme}.svg"


def replaced(text: str, found: list[Machine]) -> str:
    """The README's text with the results anew; UsageError where its markers are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f"put a line {BEGIN} and below it a line {END} where the results shall stand")
    return f"{before}{BEGIN}\n{section(found)}{END}{after}"


def section(found: list[Machine]) -> str:
    """Machines, chart, models, and the operators with the worst share of the limit first."""
    parts = [_machine_lines(found), _picture(found)]
    if any(machine.results.model for machine in found):
        parts.append(_models(found))
    operators = table.to_markdown([_with_limits(machines.operators_table(found))], title=False)
    parts.append(
        f"<details><summary>All operators, the worst share of the limit first</summary>\n\n{operators}\n</details>\n"
    )
    return "\n".join(parts)


def write(path: pathlib.Path, found: list[Machine]) -> list[pathlib.Path]:
    """Write the README and, beside it, its charts; returns what was written."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    files = {path: replaced(text, found)}
    for theme, ink in INKS.items():
        files[path.parent / CHART.format(theme=theme)] = overview.speedup_overview(found, ink)
    for each, content in files.items():
        results.write(each, content)
    return list(files)


def _machine_lines(found: list[Machine]) -> str:
    lines = []
    for machine in found:
        described = machine.results.machine
        what = "; ".join(described["gpus"]) or f"{described['processor']}, {described['threads']} threads"
        lines.append(
            f"- **{machine.name}**: {what}, nearpeak {described['isa'] or 'without C++'}, torch "
            f"{described['versions']['torch']}, {machine.results.created[:10]}\n"
        )
    return "".join(lines)


def _picture(found: list[Machine]) -> str:
    names = ", ".join(machine.name for machine in found)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{CHART.format(theme="dark")}">'
        f'<img src="{CHART.format(theme="light")}" alt="How many times faster than the fastest baseline every operator '
        f'is, on {names}; the figures are in the table below"></picture>\n'
    )


def _models(found: list[Machine]) -> str:
    tables = [(machine.name, table.model_table(machine.results.model)) for machine in found if machine.results.model]
    headers = list(dict.fromkeys(header for _, shown in tables for header in shown.headers))
    lines = []
    for name, shown in tables:
        for line in shown.lines:
            cells = dict(zip(shown.headers, line.cells, strict=True))
            lines.append(table.Line([name, *(cells.get(header, "") for header in headers)], line.mark, line.note))
    return table.to_markdown([table.Table("models", ["machine", *headers], lines)], title=False)


def _with_limits(shown: table.Table) -> table.Table:
    """Without the calls of no work (overheads), of whose time no share is claimed."""
    limits = [index for index, header in enumerate(shown.headers) if header.endswith(" limit")]
    lines = [line for line in shown.lines if line.mark == "bad" or any(line.cells[i] not in ("", "-") for i in limits)]
    return table.Table(shown.title, shown.headers, lines)
