"""The HTML pages of `nearpeak inspect`: figures, pipes, annotated machine code, in one file that asks for nothing."""

import pathlib

import jinja2

from ..table import Table
from . import comparison, pipes, tables
from .code import Code
from .instructions import OTHER
from .results import Results
from .targets import TARGETS

TEMPLATE = pathlib.Path(__file__).with_name("page.html.j2")
MIX = 12  # operations named


def to_html(found: Results) -> str:
    """Every kernel's figures and, of those compiled in this run, the machine code."""
    return _render("nearpeak inspect", found, tables.tables_of(found), found.codes)


def comparison_to_html(found: comparison.Comparison) -> str:
    """What changed, then the kernels as they are now."""
    shown = [tables.comparison_table(found), *tables.tables_of(found.after)]
    return _render("nearpeak inspect compare", found.after, shown, found.after.codes)


def _render(title: str, found: Results, shown: list[Table], codes: list[Code]) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        title=title,
        found=found,
        tables=shown,
        explanation=f"{tables.EXPLANATION} {tables.LOOPS_EXPLANATION}",
        kernels=[_kernel(code) for code in codes],
    )


def _kernel(code: Code) -> dict:
    """What the page shows of one kernel."""
    loop, target = code.loop, TARGETS[code.target]
    busiest = max(loop.bound_cycles, loop.memory_cycles)
    bars = [(name, cycles, 100 * cycles / busiest) for name, cycles in loop.cycles.items()]
    if loop.memory_cycles:
        bars.append(("DRAM", loop.memory_cycles, 100 * loop.memory_cycles / busiest))
    return {
        "code": code,
        "board": target.board,
        "shared": tables.bytes_text(code.shared),
        "note": tables.note_of(code),
        "bars": bars,
        "work": _work(loop),
        "mix": ", ".join(f"{count} {name}" for name, count in list(loop.mix.items())[:MIX]),
        "rows": _rows(code),
    }


def _work(loop: pipes.Estimate) -> str:
    parts = [f"{loop.flops:,} matrix operations"] if loop.flops else []
    parts += [f"{size:,} bytes {word}" for size, word in ((loop.loaded, "loaded"), (loop.stored, "stored")) if size]
    return ", ".join(parts)


def _rows(code: Code) -> list[dict]:
    """One for each instruction; its source line where it is another than the one above."""
    if code.listing is None:
        return []
    hot, rows, source = set(code.listing.hot), [], ""
    for index, each in enumerate(code.listing.instructions):
        pipe = pipes.pipe_of(each)
        rows.append(
            {
                "pipe": "" if pipe == OTHER else pipe,
                "text": each.text,
                "labels": each.labels,
                "hot": index in hot,
                "first": index in hot and (index == 0 or not rows[-1]["hot"]),
                "source": each.source if each.source != source else "",
            }
        )
        source = each.source
    return rows
