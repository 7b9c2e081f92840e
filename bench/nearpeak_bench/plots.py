"""The report's charts, as SVG text: speed-ups, shares of the physical limit, rooflines, and growth with a size."""

import functools
import io

import matplotlib
import matplotlib.lines
import matplotlib.patches
import matplotlib.ticker
from matplotlib.figure import Figure

from .growth import Fit, Growth
from .peaks import Peaks
from .results import Measurement, Row
from .table import SHORT_DTYPES, seconds_text

# Narrow enough to be read on a phone without zooming: charts stand below each other there.
WIDTH_INCHES = 5.2
COLOURS = ["#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#b83280"]
LIMIT_COLOURS = {"memory": "#2c7a7b", "compute": "#975a16"}
MARKERS = "os^D"
BAR_INCHES = 0.13
LABEL_INCHES = 0.23
MARGIN_INCHES = 0.75
PANEL_INCHES = 1.8
# What is drawn in it takes the page's text colour, in light and in dark.
INK = "#123456"
STYLE = {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
         "svg.fonttype": "none", "svg.hashsalt": "nearpeak", "font.family": "sans-serif", "font.size": 9,
         "axes.spines.right": False, "axes.spines.top": False, "axes.spines.left": False}  # fmt: skip


def _label(row: Row, candidate: Measurement) -> str:
    parts = [row.shape, SHORT_DTYPES.get(row.dtype, row.dtype)]
    if row.direction != "forward":
        parts.append(row.direction)
    if candidate.implementation != "nearpeak":
        parts.append(candidate.implementation)
    return " ".join(parts)


def svg_of(figure: Figure, ink: str = "currentColor") -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(INK, ink)


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
                axes.hlines(y, ratio.lower, ratio.upper, color=INK, linewidth=1)
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
        return svg_of(figure)


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
        return svg_of(figure)


def roofline_chart(pairs: list[tuple[Row, Measurement]], peaks: Peaks) -> str:
    """Rate over arithmetic intensity, under the roofs measured in the run: one flat roof per dtype, slopes for memory
    and for the fastest cache. A point on its roof cannot be improved."""
    dtypes = list(dict.fromkeys(row.dtype for row, _ in pairs))
    points = [(row, row.flops / row.bytes, row.flops / candidate.spread.median / 1e9) for row, candidate in pairs]
    left = min(0.1, *(x for _, x, _ in points)) / 2
    right = max(1000.0, *(x for _, x, _ in points)) * 2
    highest = max(peaks.multiply_add[dtype] for dtype in dtypes) / 1e9
    with matplotlib.rc_context(STYLE | {"axes.spines.left": True}):
        figure = Figure(figsize=(WIDTH_INCHES, 3.6))
        axes = figure.add_axes((0.13, 0.14, 0.84, 0.74))
        for name, rate in _slopes(peaks):
            axes.plot([left, highest / rate], [left * rate, highest], color=INK, linewidth=0.8, linestyle="--")
            axes.text(left * 1.15, left * rate * 1.8, f"{name} {rate:.0f} GB/s", fontsize=7, va="bottom")
        for number, dtype in enumerate(dtypes):
            colour, roof = COLOURS[number % len(COLOURS)], peaks.multiply_add[dtype] / 1e9
            axes.hlines(roof, left, right, color=colour, linewidth=1)
            mine = [(x, y) for row, x, y in points if row.dtype == dtype]
            label = f"{SHORT_DTYPES.get(dtype, dtype)}, roof {roof:.0f} GFLOP/s"
            axes.plot(*zip(*mine, strict=True), linestyle="", marker=MARKERS[number % len(MARKERS)], markersize=5,
                      color=colour, alpha=0.8, label=label)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left, right)
        axes.set_ylim(min(y for _, _, y in points) / 2, highest * 2)
        axes.set_xlabel("operations per byte")
        axes.set_ylabel("GFLOP/s")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8, handlelength=1,
                    columnspacing=1, borderpad=0)  # fmt: skip
        return svg_of(figure)


def growth_chart(growths: list[Growth]) -> str:
    """Time over size, both logarithmic, one panel for each group of rows: points are medians, lines the fits."""
    names = list(dict.fromkeys(name for each in growths for name in each.fits))
    # Baselines in the colours that they have in the other charts.
    others = [name for name in names if name != "nearpeak"]
    colours = dict.fromkeys(names, INK) | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    lines = -(-len(growths) // 2)
    height = lines * PANEL_INCHES + MARGIN_INCHES / 2
    with matplotlib.rc_context(STYLE | {"axes.spines.left": True}):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        panels = figure.subplots(lines, 2, squeeze=False).flatten()
        for panel, each in zip(panels, growths, strict=False):
            _growth_panel(panel, each, colours)
        for panel in panels[len(growths) :]:
            panel.set_axis_off()
        line = functools.partial(matplotlib.lines.Line2D, [], [])
        handles = [line(color=colour, marker="o", markersize=4, label=name) for name, colour in colours.items()]
        handles.append(line(color=INK, linestyle=":", label="limit"))
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=8,
                      handlelength=1, columnspacing=1, borderpad=0)  # fmt: skip
        return svg_of(figure)


def _growth_panel(axes, each: Growth, colours: dict[str, str]) -> None:
    for name, fit in each.fits.items():
        axes.plot(fit.sizes, fit.seconds, color=colours[name], linestyle="", marker="o", markersize=3.5)
        _power(axes, fit, color=colours[name], linewidth=1)
    if each.limit:
        _power(axes, each.limit, color=INK, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: seconds_text(value)))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.tick_params(labelsize=7)
    axes.set_title(each.shape, fontsize=8, loc="left")


def _power(axes, fit: Fit, **style) -> None:
    """A straight line in log-log."""
    ends = [min(fit.sizes), max(fit.sizes)]
    axes.plot(ends, [fit.factor * size**fit.exponent for size in ends], **style)


def _slopes(peaks: Peaks) -> list[tuple[str, float]]:
    """GB/s of the largest footprint and of the fastest one, by what they are called."""
    fastest = max(peaks.read.values())
    memory = peaks.read[max(peaks.read)]
    found = [("memory", memory / 1e9)]
    return found if fastest < 1.2 * memory else [*found, ("cache", fastest / 1e9)]
