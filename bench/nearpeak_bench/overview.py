"""Charts over many rows, as SVG text: every operator's speed-up on several machines, and a machine's history."""

import math
import statistics

import matplotlib
import matplotlib.ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .history import Course
from .machines import Machine, title
from .plots import COLOURS, INK, MARKERS, STYLE, WIDTH_INCHES, svg_of
from .results import Results
from .table import SHORT_DTYPES, slowest_ratio

ROW_INCHES = 0.27
LABEL_INCHES = 2.4
PANEL_INCHES = 3.1
HEAD_INCHES, FOOT_INCHES = 0.65, 0.4
MOST_TICKS = 8


def speedup_overview(machines: list[Machine], ink: str = "currentColor") -> str:
    """A panel per machine, a row per operator, a bar per dtype: how many times faster than each case's fastest
    baseline, as the geometric mean over the operator's cases. Those that do no work (overheads) are left out."""
    means = [_means(machine) for machine in machines]
    names = list(dict.fromkeys(name for of_machine in means for name, _ in of_machine))
    dtypes = list(dict.fromkeys(dtype for of_machine in means for _, dtype in of_machine))
    height = HEAD_INCHES + len(names) * ROW_INCHES + FOOT_INCHES
    width = LABEL_INCHES + len(machines) * PANEL_INCHES
    values = [value for of_machine in means for value in of_machine.values()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        for number, (machine, of_machine) in enumerate(zip(machines, means, strict=True)):
            left = (LABEL_INCHES + number * PANEL_INCHES) / width
            size = (0.93 * PANEL_INCHES / width, len(names) * ROW_INCHES / height)
            axes = figure.add_axes((left, FOOT_INCHES / height, *size))
            _bars(axes, of_machine, names, dtypes)
            axes.set_xlim(min(0.8, *values) / 1.1, max(1.25, *values) * 1.5)
            axes.set_title(machine.name, fontsize=9, loc="left")
            axes.set_yticks(range(len(names)), names if number == 0 else [])
        handles = [Patch(color=COLOURS[i], label=SHORT_DTYPES.get(dtype, dtype)) for i, dtype in enumerate(dtypes)]
        figure.legend(handles=handles, loc="upper right", ncols=len(dtypes), frameon=False, handlelength=1)
        figure.text(0.01, 1 - 0.08 / height, "times faster than the fastest baseline", va="top", weight="bold")
        return svg_of(figure, ink)


def _means(machine: Machine) -> dict[tuple[str, str], float]:
    """By operator (with its direction) and dtype."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row, candidate in machine.pairs():
        ratio = slowest_ratio(candidate)
        if ratio and row.limit_seconds and candidate.implementation == "nearpeak":
            groups.setdefault((title(row), row.dtype), []).append(ratio.value)
    return {key: statistics.geometric_mean(values) for key, values in groups.items()}


def _bars(axes, means: dict[tuple[str, str], float], names: list[str], dtypes: list[str]) -> None:
    thickness = 0.8 / len(dtypes)
    for (name, dtype), value in means.items():
        index = dtypes.index(dtype)
        y = names.index(name) - 0.4 + (index + 0.5) * thickness
        axes.barh(y, value - 1, thickness * 0.9, left=1, color=COLOURS[index])
        axes.text(max(value, 1) * 1.05, y, f"{value:.3g}x", va="center", fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.axvline(1, color="#a0aec0", linewidth=1, zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5), numticks=12))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}x"))


def history_chart(courses: list[Course], runs: list[Results]) -> str:
    """One line per case over the runs, oldest on the left: how many times faster than its fastest baseline of the last
    run; the colour says the dtype, and dashes all that is not forward."""
    dtypes = list(dict.fromkeys(course.row.dtype for course in courses))
    dashed = [course.row.direction for course in courses if course.row.direction != "forward"]
    with matplotlib.rc_context(STYLE | {"axes.spines.left": True}):
        figure = Figure(figsize=(WIDTH_INCHES, 2.9))
        axes = figure.add_axes((0.11, 0.3, 0.86, 0.58))
        for course in courses:
            number = dtypes.index(course.row.dtype)
            style = "-" if course.row.direction == "forward" else "--"
            # A run without the case is passed over, not a gap: its neighbours are joined.
            points = [(x, ratio) for x, ratio in enumerate(course.ratios) if not math.isnan(ratio)]
            axes.plot(*zip(*points, strict=True), linestyle=style, linewidth=1, color=COLOURS[number], alpha=0.8,
                      marker=MARKERS[number % len(MARKERS)], markersize=3)  # fmt: skip
        axes.set_yscale("log")
        axes.axhline(1, color="#a0aec0", linewidth=1, zorder=0)
        lower, upper = axes.get_ylim()
        steps = (1, 2, 5) if upper > 4 * lower else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=steps, numticks=12))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}x"))
        step = math.ceil(len(runs) / MOST_TICKS)
        shown = range((len(runs) - 1) % step, len(runs), step)
        axes.set_xticks(shown, [_when(runs[index]) for index in shown], fontsize=7)
        axes.set_xlim(-0.3, len(runs) - 0.7)
        handles = [
            Line2D([], [], color=COLOURS[i], label=SHORT_DTYPES.get(dtype, dtype)) for i, dtype in enumerate(dtypes)
        ]
        handles += [Line2D([], [], color=INK, linestyle="--", label=name) for name in dict.fromkeys(dashed)]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8,
                    handlelength=1.6, columnspacing=1, borderpad=0)  # fmt: skip
        return svg_of(figure)


def _when(run: Results) -> str:
    """Day, time and commit, a line each."""
    commit = (run.machine.get("commit") or "")[:7]
    return f"{run.created[5:10]}\n{run.created[11:16]}\n{commit}"
