"""The commands `nearpeak bench` and `nearpeak check`: their options, and their way into `nearpeak_bench`."""

import enum
import importlib.util
import os
import pathlib
from typing import Annotated

import rich.console
import rich.markup
import typer

MODULES = ("jinja2", "matplotlib")
LOG_WIDTH = 120
CHOICE, TIMING, GATE, FILES = "Choice of cases", "Timing", "Comparison with an earlier run", "Files"

Path = pathlib.Path | None


class CacheState(enum.Enum):
    WARM = "warm"
    COLD = "cold"


class Profiler(enum.Enum):
    TORCH = "torch"
    PERF = "perf"
    NCU = "ncu"


Suites = Annotated[
    list[str] | None,
    typer.Argument(
        help="norm, rotary, feedforward, embedding, linear, attention, overhead, model, or all; without a name all but "
        "model. "
        "selftest, alone: whether timings can be believed on this machine. compare BEFORE AFTER: what changed "
        "between two files of results. report FILE...: the results of several machines side by side. bisect GOOD BAD: "
        "the commit that made a row slower or wrong."
    ),
]
Full = Annotated[
    bool,
    typer.Option(
        "--full/--quick",
        help="Every shape and dtype, with more time for each, and cached compile times; or a subset.",
        rich_help_panel=CHOICE,
    ),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(help="Only this dtype: float32, bfloat16 or float16. May be repeated.", rich_help_panel=CHOICE),
]
Filter = Annotated[str, typer.Option("--filter", help="Only cases whose name contains this.", rich_help_panel=CHOICE)]
Cases = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Exactly this case, of whichever suite, quick or not, as reports' commands name it: "
        "rms_norm-2048x4096-float32-forward. May be repeated.",
        rich_help_panel=CHOICE,
    ),
]
Sweep = Annotated[
    str,
    typer.Option(
        metavar="DIMENSION=SIZES",
        help="The chosen cases with one dimension in these sizes, and how time grows with it: S=128,256,512 for the "
        "sequence's length, or one of their own, as rows=1,16,256, width or head_dim.",
        rich_help_panel=CHOICE,
    ),
]
Threads = Annotated[
    str,
    typer.Option(
        metavar="COUNTS",
        help="The chosen cases with each of these numbers of threads, and what more of them gain: 1,2,4.",
        rich_help_panel=CHOICE,
    ),
]
Caches = Annotated[
    CacheState,
    typer.Option(
        help="warm: as the preceding call leaves them; cold: emptied before each sample, outside of what is timed.",
        rich_help_panel=TIMING,
    ),
]
Profile = Annotated[
    Profiler | None,
    typer.Option(
        help="Instead of timing, run our kernel of each chosen case under a profiler: torch (operators, and a Chrome "
        "trace), perf (counters and hot functions on the CPU), ncu (Nsight Compute, on a GPU).",
        rich_help_panel=TIMING,
    ),
]
Add = Annotated[
    list[pathlib.Path] | None,
    typer.Option(
        help="A Python file that registers kernels of yours, to be measured too; without the name of a suite, only "
        "their operators' cases run. May be repeated.",
        rich_help_panel=CHOICE,
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        help="Cases in the shapes of a real model's layer: llama3-8b, gemma3-270m, bert-base, t5-base, gpt2, "
        "qwen3-8b, mistral-7b, deepseek-v3, or the path of a Hugging Face config.json. May be repeated.",
        rich_help_panel=CHOICE,
    ),
]
TimeBudget = Annotated[
    float | None,
    typer.Option(help="Seconds of timing per case (never fewer than three rounds).", rich_help_panel=TIMING),
]
Isolate = Annotated[
    bool,
    typer.Option(
        "--isolate/--no-isolate",
        help="Measure in a process of its own, so that a crash or an endless loop costs one implementation of one row; "
        "without, in this one, for debuggers and profilers.",
        rich_help_panel=TIMING,
    ),
]
TimeLimit = Annotated[
    float,
    typer.Option(help="Seconds after which a call that has not returned is given up.", rich_help_panel=TIMING),
]
MemoryLimit = Annotated[
    float | None,
    typer.Option(
        help="GiB that the measured process may take; by default 80 % of this machine's.", rich_help_panel=TIMING
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the last run that was interrupted.", rich_help_panel=CHOICE)
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|last",
        help="Hold this run against an earlier one, a file or this machine's last, as compare does.",
        rich_help_panel=GATE,
    ),
]
Threshold = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[OPERATOR=]PERCENT",
        help="Changes below it are no changes: of all operators, as in 5, or of one, as in rms_norm=10; by default 2, "
        "and never less than the noise. May be repeated.",
        rich_help_panel=GATE,
    ),
]
Json = Annotated[Path, typer.Option(help="Where to write every sample, as JSON.", rich_help_panel=FILES)]
Html = Annotated[Path, typer.Option(help="Where to write the page with tables and charts.", rich_help_panel=FILES)]
Markdown = Annotated[Path, typer.Option(help="Where to write the tables as Markdown.", rich_help_panel=FILES)]

Csv = Annotated[Path, typer.Option(help="Where to write every figure of the tables, as CSV.", rich_help_panel=FILES)]

Readme = Annotated[
    Path,
    typer.Option(
        help="Of report: a README that holds two markers; what stands between them becomes the results, and the chart "
        "is written to docs/ beside it.",
        rich_help_panel=FILES,
    ),
]


EXAMPLES = """
Examples:

  All kernels, the quick cases:  [cyan]nearpeak bench[/]

  Two families, every shape, one dtype:  [cyan]nearpeak bench norm rotary --full --dtype bfloat16[/]

  A model's layer, by its dimensions:  [cyan]nearpeak bench --shapes llama3-8b[/]

  One row again, as its report gives it:  [cyan]nearpeak bench --case linear-1x768x3072-float32-forward[/]

  How time grows with the sequence:  [cyan]nearpeak bench attention --filter causal --sweep S=128,256,512,1024[/]

  What a second thread gains, with cold caches:  [cyan]nearpeak bench norm --threads 1,2 --caches cold[/]

  Where the time goes:  [cyan]nearpeak bench --case rms_norm-2048x4096-float32-forward --profile perf[/]

  A kernel of yours beside ours:  [cyan]nearpeak bench --add mykernel.py[/]

  What changed since the last time:  [cyan]nearpeak bench norm --against last[/]

  What changed between two files:  [cyan]nearpeak bench compare before.json after.json[/]

  Which commit made a row slower:  [cyan]nearpeak bench bisect v0.1 HEAD --case gelu-512x3072-float32-forward[/]

  Several machines side by side:  [cyan]nearpeak bench report zen3.json zen4.json[/]

Exit codes: 1 a wrong result, 2 a wrong request, 3 selftest missed a goal, 4 a kernel became slower, 5 noise hides
whether one did, 6 a kernel raised, crashed or did not return, 130 interrupted.
"""


def bench(
    suites: Suites = None,
    full: Full = False,
    dtype: Dtypes = None,
    pattern: Filter = "",
    case: Cases = None,
    sweep: Sweep = "",
    threads: Threads = "",
    shapes: Shapes = None,
    add: Add = None,
    resume: Resume = False,
    caches: Caches = CacheState.WARM,
    profile: Profile = None,
    time_budget: TimeBudget = None,
    isolate: Isolate = True,
    time_limit: TimeLimit = 180.0,
    memory_limit: MemoryLimit = None,
    against: Against = None,
    threshold: Threshold = None,
    json: Json = None,
    html: Html = None,
    markdown: Markdown = None,
    csv: Csv = None,
    readme: Readme = None,
) -> None:
    """Measure the kernels against what you have today, and against what this machine could do.

    Each kernel is first checked against float64, then timed in turns with its baselines (the plain layer, PyTorch's
    own function, torch.compile); its speed is given as ratios, and as a share of the limit that arithmetic and memory
    set. Files go to [bold].nearpeak/results/[/] unless you name them. Ctrl-C keeps the finished rows.
    """
    given = locals()
    require_modules()
    from nearpeak_bench import command

    exit_with(command.run, command.Options.of(**given))


def check(
    pattern: Annotated[str, typer.Option("--filter", help="Only operators whose name contains this.")] = "",
    isolate: Isolate = True,
    time_limit: TimeLimit = 180.0,
) -> None:
    """Check that every operator is exact on this machine: all dtypes, backends and instruction sets, in half a minute.

    The first thing to run on new hardware. Each operator runs on small odd shapes, forward and with its gradients, and
    is held against its definition in float64; it may err as the plain PyTorch layer does, and no more. What crashes is
    shown as such and costs its own cell only. The exit code is 0 if all is exact, 1 if not, 6 after a crash.

    Example:  [cyan]nearpeak check --filter attention[/]
    """
    require_modules()
    from nearpeak_bench import check as checking

    exit_with(checking.run, pattern, isolate, time_limit)


def console() -> rich.console.Console:
    """The terminal; where there is none, as in a log file, wide enough for every column of the tables."""
    found = rich.console.Console()
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = LOG_WIDTH
    return found


def require_modules(*others: str) -> None:
    """Exit with one line where a package is missing that the harness needs, or one of `others`."""
    missing = [name for name in (*MODULES, *others) if importlib.util.find_spec(name) is None]
    if missing:
        extras = "bench,triton" if "triton" in missing else "bench"
        raise _fail(rf"this needs more packages: pip install nearpeak\[{extras}]")


def exit_with(run, *arguments) -> None:
    """Exit with the code that `run` returns, or with one line where the request cannot be served."""
    from nearpeak_bench.exits import UsageError

    try:
        code = run(*arguments, console())
    except UsageError as error:
        raise _fail(rich.markup.escape(str(error))) from None
    raise typer.Exit(code)


def _fail(message: str) -> typer.Exit:
    rich.console.Console(stderr=True).print(f"[red]error:[/] {message}", highlight=False, soft_wrap=True)
    return typer.Exit(2)
