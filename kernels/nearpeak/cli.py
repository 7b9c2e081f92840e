"""The command `nearpeak`: what this machine can run, and what the kernels are worth on it."""

import importlib.util
import os
import pathlib
from typing import Annotated

import rich.console
import rich.table
import typer

from . import backends, system

BENCH_MODULES = ("jinja2", "matplotlib")
LOG_WIDTH = 120

main = typer.Typer(
    help="Fused Transformer kernels for PyTorch: what runs here, and how fast.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _fail(message: str) -> typer.Exit:
    rich.console.Console(stderr=True).print(f"[red]error:[/] {message}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


def _console() -> rich.console.Console:
    """The terminal; where there is none, as in a log file, wide enough for every column of the tables."""
    console = rich.console.Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = LOG_WIDTH
    return console


@main.command()
def info() -> None:
    """Show versions, processor, instruction sets, GPU, compilers, and which backends run here.

    Each backend that cannot run says what it lacks and how to get it. [bold]NEARPEAK_BACKEND[/] and
    [bold]NEARPEAK_ISA[/] in the environment force a backend or a lower instruction set.

    Example:  [cyan]NEARPEAK_ISA=avx2 nearpeak info[/]
    """
    described = system.describe()
    memory = described["memory_bytes"]
    isas = [f"[bold]{name}[/] (chosen)" if name == backends.isa() else name for name in backends.isas_supported()]
    facts = {
        "nearpeak": described["versions"].pop("nearpeak"),
        **{name: version or "not installed" for name, version in described["versions"].items()},
        "platform": described["platform"],
        "processor": described["processor"],
        "features": " ".join(described["features"]) or "none of interest",
        "cores, threads": f"{described['cores']}, {described['threads']}",
        "memory": f"{memory / 2**30:.1f} GiB" if memory else "unknown",
        "instruction sets built": " ".join(backends.isas_built()) or "none",
        "supported here": " ".join(isas) or "none",
        "PyTorch's instruction set": described["torch_capability"],
        "GPU": "; ".join(described["gpus"]) or "none that torch can use",
        "nvcc": system.nvcc() or "not found (only needed to build CUDA kernels)",
    }
    shown = rich.table.Table.grid(padding=(0, 2))
    for name, value in facts.items():
        shown.add_row(name, value)
    shown.add_section()
    for name in backends.NAMES:
        reason = backends.missing(name)
        shown.add_row(f"backend {name}", f"[red]missing:[/] {reason}" if reason else "[green]available[/]")
    _console().print(shown, highlight=False)


@main.command()
def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            help="norm, rotary, feedforward, linear, attention, overhead, model, or all; without a name all but model. "
            "selftest, alone: whether timings can be believed on this machine. compare BEFORE AFTER: what changed "
            "between two files of results."
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full/--quick", help="Every shape and dtype, or a subset.")] = False,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Only this dtype: float32, bfloat16 or float16. May be repeated.")
    ] = None,
    pattern: Annotated[str, typer.Option("--filter", help="Only cases whose name contains this.")] = "",
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds of timing per case (never fewer than three rounds).")
    ] = None,
    add: Annotated[
        pathlib.Path | None, typer.Option(help="A Python file that registers kernels of yours, to be measured too.")
    ] = None,
    json: Annotated[pathlib.Path | None, typer.Option(help="Where to write every sample, as JSON.")] = None,
    html: Annotated[pathlib.Path | None, typer.Option(help="Where to write the page with tables and charts.")] = None,
    markdown: Annotated[pathlib.Path | None, typer.Option(help="Where to write the tables as Markdown.")] = None,
) -> None:
    """Measure the kernels against what you have today, and against what this machine could do.

    Each kernel is first checked against float64, then timed in turns with its baselines (the plain layer, PyTorch's
    own function, torch.compile); its speed is given as ratios, and as a share of the limit that arithmetic and memory
    set. Files go to [bold].nearpeak/results/[/] unless you name them. Ctrl-C keeps the finished rows.

    Examples:

      All kernels, the quick cases:  [cyan]nearpeak bench[/]

      Two families in one dtype:  [cyan]nearpeak bench norm rotary --dtype bfloat16[/]

      All attention cases of a shape:  [cyan]nearpeak bench attention --full --filter 2048x128[/]

      Real models, unpatched and patched:  [cyan]nearpeak bench model[/]

      Can timings be believed here?  [cyan]nearpeak bench selftest[/]

      A kernel of yours beside ours:  [cyan]nearpeak bench norm --add mykernel.py[/]

      What changed since:  [cyan]nearpeak bench compare before.json after.json[/]

    The exit code is 1 if a kernel's result was wrong, 2 if the request was, 3 if the selftest missed a goal, 4 if
    compare found a kernel slower, 5 if it found none but could not tell of some, 130 after Ctrl-C.
    """
    if any(importlib.util.find_spec(name) is None for name in BENCH_MODULES):
        raise _fail(r"nearpeak bench needs more packages: pip install nearpeak\[bench]")
    from nearpeak_bench import command

    options = command.Options(
        names=tuple(suites or ()),
        full=full,
        dtypes=tuple(dtype or ()),
        pattern=pattern,
        budget=time_budget,
        add=add,
        json=json,
        html=html,
        markdown=markdown,
    )
    try:
        code = command.run(options, _console())
    except command.UsageError as error:
        raise _fail(str(error)) from None
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
