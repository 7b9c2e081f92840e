"""Runs cases one after the other in a worker, with a progress bar, a journal, and the tables of finished suites."""

import contextlib
import dataclasses
import itertools
import signal
import time
from collections.abc import Iterator

import rich.console
import rich.markup
import rich.progress
import torch
from nearpeak import system

from . import history, isolation, journal, noise, peaks, repeat, results, runner, table, worker
from .exits import UsageError
from .options import Options

MEMORY_SHARE = 0.8
# Where more rows are wrong, the files have their commands.
MOST_AGAIN = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """budget: seconds of timing per case; time_limit: seconds without a sign of life; memory_limit: bytes, None for
    most of the machine's; isolated: in a process of its own."""

    budget: float
    time_limit: float
    memory_limit: int | None
    isolated: bool


def run(
    cases: list, settings: Settings, options: Options, found: results.Results, console: rich.console.Console
) -> None:
    """Fill `found` with peaks, noise and rows, as far as it lacks them. On Ctrl-C or SIGTERM the journal stays."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = history.FOLDER / (history.stem(found).name + journal.ENDING)
    with _terminable(), _process(settings, device) as process, _progress(console) as bar:
        task = bar.add_task("measuring the machine", total=len(cases))

        def say(what):
            bar.update(task, description=what)

        try:
            measured = process.call(_noise, device, say=say)
            found.noise = max(found.noise or 0.0, measured)
            found.peaks = found.peaks or process.call(_peaks, device, say=say)
        except worker.Lost as loss:
            raise UsageError(f"measuring the machine {loss}; try --no-isolate, or a larger --memory-limit") from None
        console.print(f"noise of this machine: one call differs from itself by up to {100 * found.noise:.1f} %")
        book = journal.Journal(path, options.to_json(), found)
        run_settings = runner.Settings(device, settings.budget, found.noise, cached_compile=options.full)
        for suite, group in itertools.groupby(cases, key=lambda pair: pair[0]):
            try:
                for _, case in group:
                    row = _run_case(process, suite, case, run_settings, found.peaks, bar, task)
                    row.command = repeat.command(case, options)
                    found.rows.append(row)
                    book.append(row)
            finally:
                _show(table.suite_tables(suite, found.rows), console)
    book.delete()


def _show(tables: list[table.Table], console: rich.console.Console) -> None:
    """The tables of a finished suite, and how to run its marked rows again."""
    for each in tables:
        console.print(table.to_rich(each, console))
    again = dict.fromkeys(
        line.command for each in tables for line in each.lines if line.mark != "fine" and line.command
    )
    for command in list(again)[:MOST_AGAIN]:
        console.print(f"[dim]again: {rich.markup.escape(command)}", highlight=False, soft_wrap=True)


def _noise(watch: worker.Watch, device: torch.device) -> float:
    watch.say("measuring the machine's noise")
    return noise.measure(device)


def _peaks(watch: worker.Watch, device: torch.device) -> peaks.Peaks:
    def say(what):
        watch.say(what)
        watch.turn("")

    return peaks.measure(device, say)


def _process(settings: Settings, device: torch.device) -> worker.Worker | worker.Here:
    if not settings.isolated:
        return worker.Here()
    memory = settings.memory_limit
    if memory is None and device.type == "cpu" and (whole := system.memory_bytes()):
        # A GPU's driver maps far more than it uses, so there only the user's own limit counts.
        memory = int(MEMORY_SHARE * whole)
    return worker.Worker(worker.Limits(settings.time_limit, memory))


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """`kill` ends a run as Ctrl-C does, with the finished rows kept and shown."""

    def interrupt(*signal_and_frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _progress(console: rich.console.Console) -> rich.progress.Progress:
    columns = (
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=20),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left:"),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
    )
    return rich.progress.Progress(*columns, console=console, transient=True, speed_estimate_period=600)


def _run_case(process, suite, case, settings, machine_peaks, bar: rich.progress.Progress, task) -> results.Row:
    start = time.perf_counter()

    def say(what):
        bar.update(task, description=f"{case.name}: {what}")

    row = isolation.run_case(process, suite, case, settings, machine_peaks, say)
    bar.advance(task)
    if not bar.console.is_terminal:
        done = f"{bar.tasks[0].completed:.0f}/{bar.tasks[0].total:.0f}"
        bar.console.print(f"{done} {case.name} {time.perf_counter() - start:.1f} s", highlight=False, soft_wrap=True)
    return row
