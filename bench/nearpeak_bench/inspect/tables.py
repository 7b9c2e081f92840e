"""Results as tables for people; the terminal, Markdown and HTML show the same ones (../table.py)."""

from ..table import Line, Table
from . import comparison, pipes
from .code import Code
from .results import Results
from .targets import TARGETS

KERNELS, LOOPS = "kernels", "hottest loop: cycles of an iteration, by pipe"
EXPLANATION = (
    "shared: of one program. occupancy: warps of those that a processor has room for, and what keeps more out. access: "
    "bytes of the widest load and store of a thread. loop: instructions of one iteration of the hottest loop. busiest "
    "pipe: cycles that one iteration of one program keeps it busy; no iteration can be faster. DRAM: cycles that its "
    "traffic takes at this processor's share of the board's bandwidth, and the share of it that caches must serve for "
    "the pipe to be the bound. Rates are the vendors' peak rates (docs/inspect.md); latencies come on top."
)
LOOPS_EXPLANATION = "Below the cycles, or in brackets: how many instructions of a warp run on the pipe."


def tables_of(results: Results) -> list[Table]:
    """All kernels, then their loops, by vendor, whose pipes differ."""
    vendors: dict[str, list[Code]] = {}
    for code in results.codes:
        vendors.setdefault(TARGETS[code.target].compiler.backend, []).append(code)
    return [kernels_table(results), *(loops_table(codes) for codes in vendors.values())]


def kernels_table(results: Results) -> Table:
    headers = ["kernel", "target", "warps", "registers", "shared", "occupancy", "matrix", "access", "loop",
               "busiest pipe", "DRAM"]  # fmt: skip
    lines = [_kernel_line(code) for code in results.codes]
    blank = [""] * (len(headers) - 3)
    lines += [Line([each.case, each.target, "failed", *blank], "bad", each.reason) for each in results.failures]
    return Table(KERNELS, headers, lines)


def _kernel_line(code: Code) -> Line:
    loop = code.loop
    cells = [
        f"{code.name} ({code.case})",
        code.target,
        str(code.warps),
        f"{code.registers} ({code.spilled} B spilled)" if code.spilled else str(code.registers),
        bytes_text(code.shared),
        _occupancy_text(code),
        str(code.matrix),
        f"{code.load}/{code.store} B",
        str(loop.instructions) if loop.looped else f"{loop.instructions} (no loop)",
        f"{loop.bound} ({loop.bound_cycles:.0f})",
        _memory_text(loop),
    ]
    return Line(cells, "bad" if code.spilled or not code.fits else "fine", note_of(code))


def note_of(code: Code) -> str:
    """What a reader must know beside the figures."""
    notes = []
    if not code.fits:
        limit = f"takes {code.shared} bytes of shared memory, {TARGETS[code.target].shared_limit} are there"
        notes.append(
            f"cannot run: one program {limit if code.occupancy.limiter == 'shared memory' else 'is too large'}"
        )
    if code.loop.unknown:
        notes.append(f"{code.loop.unknown} instructions do not tell their size (as TMA copies): they are not counted")
    return "; ".join(notes)


def bytes_text(size: int) -> str:
    return f"{size} B" if size < 1024 else f"{size / 1024:.3g} KiB"


def _occupancy_text(code: Code) -> str:
    share = f"{100 * code.occupancy.share:.0f}%"
    return share if code.occupancy.share == 1 else f"{share} ({code.occupancy.limiter})"


def _memory_text(loop: pipes.Estimate) -> str:
    if not loop.memory_cycles:
        return "-"
    return f"{loop.memory_cycles:.0f}" + (f" ({100 * loop.cached:.0f}% cached)" if loop.cached else "")


def loops_table(codes: list[Code]) -> Table:
    names = [name for name in pipes.NAMES if any(name in code.loop.cycles for code in codes)]
    headers = ["kernel", "target", "instructions", *names, "bound"]
    lines = []
    for code in codes:
        first = [f"{code.name} ({code.case})", code.target, str(code.loop.instructions)]
        cells = [_pipe_text(code.loop, name) for name in names]
        lines.append(Line([*first, *cells, _bound_text(code.loop)], "fine", ""))
    return Table(LOOPS, headers, lines)


def _bound_text(loop: pipes.Estimate) -> str:
    return f"DRAM ({loop.bound} if {100 * loop.cached:.0f}% cached)" if loop.cached else loop.bound


def _pipe_text(loop: pipes.Estimate, name: str) -> str:
    if name not in loop.cycles:
        return ""
    count = loop.counts.get(name)
    return f"{loop.cycles[name]:.0f}" + (f" ({count})" if count else "")


def comparison_table(found: comparison.Comparison) -> Table:
    """Each figure before and after, where it changed."""
    headers = ["kernel", "target", "warps", "registers", "spilled", "shared", "occupancy", "loop", "busiest pipe",
               "cost", "verdict"]  # fmt: skip
    lines = [_change_line(change) for change in found.changes]
    versions = [found.before.triton, found.after.triton]
    title = "changes" if len(set(versions)) == 1 else f"changes from Triton {' to '.join(versions)}"
    return Table(title, headers, lines)


def _change_line(change: comparison.Change) -> Line:
    before, after = change.before, change.after

    def both(text) -> str:
        old, new = text(before), text(after)
        return new if old == new else f"{old} → {new}"

    cells = [
        f"{both(lambda code: code.name)} ({after.case})",
        after.target,
        both(lambda code: str(code.warps)),
        both(lambda code: str(code.registers)),
        both(lambda code: f"{code.spilled} B"),
        both(lambda code: bytes_text(code.shared)),
        both(lambda code: f"{100 * code.occupancy.share:.0f}%"),
        both(lambda code: str(code.loop.instructions)),
        both(lambda code: f"{code.loop.bound} {code.loop.bound_cycles:.0f}"),
        f"{change.cost:.2f}x",
        change.verdict,
    ]
    return Line(cells, "bad" if change.verdict == comparison.WORSE else "fine", change.reasons)
