"""The command `nearpeak bench`: its options, and its way into the package `nearpeak_bench`."""

import importlib.util
import os
import pathlib
from typing import Annotated

import rich.console
import rich.markup
import typer

MODULES = ("jinja2", "matplotlib")
LOG_WIDTH = 120
CHOICE, TIMING, FILES = "Choice of cases", "Timing", "Files"

Path = pathlib.Path | None

Suites = Annotated[
    list[str] | None,
    typer.Argument(
        help="norm, rotary, feedforward, linear, attention, overhead, model, or all; without a name all but model. "
        "selftest, alone: whether timings can be believed on this machine. compare BEFORE AFTER: what changed "
        "between two files of results."
    ),
]
Full = Annotated[
    bool, typer.Option("--full/--quick", help="Every shape and dtype, or a subset.", rich_help_panel=CHOICE)
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(help="Only this dtype: float32, bfloat16 or float16. May be repeated.", rich_help_panel=CHOICE),
]
Filter = Annotated[str, typer.Option("--filter", help="Only cases whose name contains this.", rich_help_panel=CHOICE)]
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
Json = Annotated[Path, typer.Option(help="Where to write every sample, as JSON.", rich_help_panel=FILES)]
Html = Annotated[Path, typer.Option(help="Where to write the page with tables and charts.", rich_help_panel=FILES)]
Markdown = Annotated[Path, typer.Option(help="Where to write the tables as Markdown.", rich_help_panel=FILES)]


def bench(
    suites: Suites = None,
    full: Full = False,
    dtype: Dtypes = None,
    pattern: Filter = "",
    shapes: Shapes = None,
    add: Add = None,
    time_budget: TimeBudget = None,
    json: Json = None,
    html: Html = None,
    markdown: Markdown = None,
) -> None:
    """Measure the kernels against what you have today, and against what this machine could do.

    Each kernel is first checked against float64, then timed in turns with its baselines (the plain layer, PyTorch's
    own function, torch.compile); its speed is given as ratios, and as a share of the limit that arithmetic and memory
    set. Files go to [bold].nearpeak/results/[/] unless you name them. Ctrl-C keeps the finished rows.

    Examples:

      All kernels, the quick cases:  [cyan]nearpeak bench[/]

      Two families in one dtype:  [cyan]nearpeak bench norm rotary --dtype bfloat16[/]

      All attention cases of a shape:  [cyan]nearpeak bench attention --full --filter 2048x128[/]

      A model's layer, by its dimensions:  [cyan]nearpeak bench --shapes llama3-8b[/]

      Real models, unpatched and patched:  [cyan]nearpeak bench model[/]

      Can timings be believed here?  [cyan]nearpeak bench selftest[/]

      A kernel of yours beside ours:  [cyan]nearpeak bench --add mykernel.py[/]

      What changed since:  [cyan]nearpeak bench compare before.json after.json[/]

    The exit code is 1 if a kernel's result was wrong, 2 if the request was, 3 if the selftest missed a goal, 4 if
    compare found a kernel slower, 5 if it found none but could not tell of some, 130 after Ctrl-C.
    """
    given = locals()
    _require_modules()
    from nearpeak_bench import command

    _exit_with(command.run, command.Options.of(**given))


def console() -> rich.console.Console:
    """The terminal; where there is none, as in a log file, wide enough for every column of the tables."""
    found = rich.console.Console()
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = LOG_WIDTH
    return found


def _require_modules() -> None:
    if any(importlib.util.find_spec(name) is None for name in MODULES):
        raise _fail(r"nearpeak bench needs more packages: pip install nearpeak\[bench]")


def _exit_with(run, *arguments) -> None:
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
