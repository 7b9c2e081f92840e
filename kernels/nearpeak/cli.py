"""The command `nearpeak`: what this machine can run, and what the kernels are worth on it."""

import rich.table
import typer

from . import backends, cli_bench, cli_inspect, system

main = typer.Typer(
    help="Fused Transformer kernels for PyTorch: what runs here, and how fast.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


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
    cli_bench.console().print(shown, highlight=False)


main.command()(cli_bench.check)
main.command(epilog=cli_bench.EXAMPLES)(cli_bench.bench)
main.command()(cli_inspect.inspect)

if __name__ == "__main__":
    main()
