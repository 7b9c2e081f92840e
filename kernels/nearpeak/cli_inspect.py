"""The command `nearpeak inspect`: its options, and its way into `nearpeak_bench`."""

from typing import Annotated

import typer

from .cli_bench import CHOICE, FILES, Filter, Full, Markdown, Path, exit_with, require_modules

GATE = "Comparison, and conditions for CI"

Kernels = Annotated[
    list[str] | None,
    typer.Argument(
        help="norm, rotary, feedforward, embedding, linear, attention, or a Python file with kernels of yours; without "
        "a name all of ours. compare BEFORE AFTER: what differs between two files written with --json, as by two "
        "versions of Triton."
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942, or all; by default this machine's GPU, else sm_90. "
        "May be repeated.",
        rich_help_panel=CHOICE,
    ),
]
Against = Annotated[
    Path,
    typer.Option(
        help="Show side by side with another Python file, whose functions have the same names, or with the JSON of an "
        "earlier run.",
        rich_help_panel=GATE,
    ),
]
FailOn = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONDITION",
        help="End with exit code 7 where a kernel meets it: spills, or a limit of registers, spilled, shared (bytes), "
        'occupancy (percent) or cycles, as in "registers>128" or "occupancy<25"; with 4 for worse, beside another run. '
        "May be repeated, or several with commas between.",
        rich_help_panel=GATE,
    ),
]
Json = Annotated[Path, typer.Option(help="Where to write every figure, as JSON.", rich_help_panel=FILES)]
Html = Annotated[
    Path, typer.Option(help="Where to write the page with the annotated machine code.", rich_help_panel=FILES)
]


def inspect(
    kernels: Kernels = None,
    target: Targets = None,
    full: Full = False,
    pattern: Filter = "",
    against: Against = None,
    fail_on: FailOn = None,
    json: Json = None,
    html: Html = None,
    markdown: Markdown = None,
) -> None:
    """Show what Triton kernels take on any GPU, read off their machine code; no GPU is needed.

    Registers, spills, shared memory, occupancy and what limits it, matrix instructions, widths of loads and stores, and
    the cycles that an iteration of the hottest loop takes on each pipe, with the bound that follows. [bold]--html[/]
    writes a page with the annotated machine code.

    A file of yours says how its kernels are launched: every function whose name starts with [bold]inspect_[/] is
    called, and what it launches, on tensors of device="meta", is compiled instead of run. An autotuned kernel is
    compiled in every configuration.

      [dim]def inspect_softmax():
          x = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
          softmax\\[(8192,)](x, x, 4096, BLOCK=4096)[/]

    Examples:

      All our kernels, for this GPU or sm_90:  [cyan]nearpeak inspect[/]

      One family for two targets:  [cyan]nearpeak inspect attention --target sm_80 --target gfx942[/]

      A kernel of yours, with its machine code:  [cyan]nearpeak inspect mykernel.py --html mykernel.html[/]

      Two versions of it:  [cyan]nearpeak inspect new.py --against old.py[/]

      A check in CI:  [cyan]nearpeak inspect mykernel.py --target all --fail-on spills[/]

      Two versions of Triton:  [cyan]nearpeak inspect --json before.json[/] in one environment,
      [cyan]--json after.json[/] in the other, then [cyan]nearpeak inspect compare before.json after.json[/]

    Exit codes: 2 a wrong request, 4 worse than the other run (--fail-on worse), 6 a kernel does not compile or cannot
    run, 7 another condition of --fail-on holds, 130 interrupted.
    """
    require_modules("networkx", "triton")
    from nearpeak_bench.inspect import command

    options = command.Options(
        tuple(kernels or ()), tuple(target or ()), full, pattern, against, tuple(fail_on or ()), json, html, markdown
    )
    exit_with(command.run, options)
