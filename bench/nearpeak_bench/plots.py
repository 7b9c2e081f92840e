"""The report's charts, as SVG text: speed-up over each baseline, and share of the physical limit, row by row."""

import io

import matplotlib
import matplotlib.patches
import matplotlib.ticker
from matplotlib.figure import Figure

from .results import Measurement, Row
from .table import SHORT_DTYPES

# Narrow enough to be read on a phone without zooming: charts stand below each other there.
WIDTH_INCHES = 5.2
COLOURS = ["#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#b83280"]
LIMIT_COLOURS = {"memory": "#2c7a7b", "compute": "#975a16"}
BAR_INCHES = 0.13
LABEL_INCHES = 0.23
MARGIN_INCHES = 0.75
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.spines.right": False,
         "axes.spines.top": False, "axes.spines.left": False}  # fmt: skip


def _label(row: Row, candidate: Measurement) -> str:
    parts = [row.shape, SHORT_DTYPES.get(row.dtype, row.dtype)]
    if row.direction != "forward":
        parts.append(row.direction)
    if candidate.implementation != "nearpeak":
        parts.append(candidate.implementation)
    return " ".join(parts)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _axes(rows: int, bars: int):
    """A figure with one slot per row: a line of text, and below it `bars` bars. Returns also the slot's height."""
    slot = LABEL_INCHES + bars * BAR_INCHES
    height = rows * slot + MARGIN_INCHES
    figure = Figure(figsize=(WIDTH_INCHES, height))
    axes = figure.add_axes((0.04, 0.5 / height, 0.9, rows * slot / height))
    axes.set_ylim(rows * slot, 0)
    axes.set_yticks([])
    return figure, axes, slot


def _text(axes, y: float, label: str) -> None:
    axes.text(0.0, y, label, transform=axes.get_yaxis_transform(), va="top", fontsize=8)


def speedup_chart(pairs: list[tuple[Row, Measurement]]) -> str:
    """Bars that grow to the right of 1 where nearpeak is faster than a baseline, to the left where it is slower."""
    names = list(dict.fromkeys(name for _, candidate in pairs for name in candidate.ratios))
    with matplotlib.rc_context(STYLE):
        figure, axes, slot = _axes(len(pairs), len(names))
        for index, (row, candidate) in enumerate(pairs):
            _text(axes, index * slot + 0.05, _label(row, candidate))
            for name, ratio in candidate.ratios.items():
                y = index * slot + LABEL_INCHES + (names.index(name) + 0.5) * BAR_INCHES
                axes.barh(y, ratio.value - 1, BAR_INCHES * 0.8, left=1, color=COLOURS[names.index(name) % len(COLOURS)])
                axes.hlines(y, ratio.lower, ratio.upper, color="#1a202c", linewidth=1)
        axes.set_xscale("log")
        ratios = [ratio for _, candidate in pairs for ratio in candidate.ratios.values()]
        axes.set_xlim(min(0.8, *(r.lower for r in ratios)) / 1.1, max(1.25, *(r.upper for r in ratios)) * 1.1)
        axes.axvline(1, color="#a0aec0", linewidth=1, zorder=0)
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}x"))
        handles = [matplotlib.patches.Patch(color=COLOURS[i % len(COLOURS)], label=n) for i, n in enumerate(names)]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(names), frameon=False,
                    fontsize=8, handlelength=1, columnspacing=1, borderpad=0)  # fmt: skip
        return _svg(figure)


def limit_chart(pairs: list[tuple[Row, Measurement]]) -> str:
    """Bars of the share of the physical limit; the colour says whether memory or compute is the limit."""
    with matplotlib.rc_context(STYLE):
        figure, axes, slot = _axes(len(pairs), 1)
        for index, (row, candidate) in enumerate(pairs):
            _text(axes, index * slot + 0.05, f"{_label(row, candidate)}: {100 * candidate.share:.0f}%")
            y = index * slot + LABEL_INCHES + 0.5 * BAR_INCHES
            axes.barh(y, 100 * candidate.share, BAR_INCHES * 0.8, color=LIMIT_COLOURS[row.bound])
        axes.set_xlim(0, max(100, *(100 * candidate.share for _, candidate in pairs)))
        axes.axvline(100, color="#a0aec0", linewidth=1, zorder=0)
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(decimals=0))
        handles = [matplotlib.patches.Patch(color=c, label=f"bound by {n}") for n, c in LIMIT_COLOURS.items()]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8,
                    handlelength=1, columnspacing=1, borderpad=0)  # fmt: skip
        return _svg(figure)
