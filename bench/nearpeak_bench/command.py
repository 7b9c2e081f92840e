"""`nearpeak bench`: choose cases, measure the machine, run, show tables, write files."""

import dataclasses
import itertools
import pathlib
import time

import rich.console
import rich.progress
import torch

from . import compare, machine, noise, peaks, report, results, runner, selftest, suites, table
from .exits import INTERRUPTED, WRONG, UsageError

SELFTEST, COMPARE = "selftest", "compare"
NAMES = (*suites.SUITES, "model", "all", SELFTEST, COMPARE)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FOLDER = pathlib.Path(".nearpeak/results")
QUICK_BUDGET, FULL_BUDGET = 1.5, 5.0


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for; a budget of None means the default, paths of None the default folder."""

    names: tuple[str, ...] = ()
    full: bool = False
    dtypes: tuple[str, ...] = ()
    pattern: str = ""
    budget: float | None = None
    add: tuple[pathlib.Path, ...] = ()
    shapes: tuple[str, ...] = ()
    json: pathlib.Path | None = None
    html: pathlib.Path | None = None
    markdown: pathlib.Path | None = None

    @classmethod
    def of(cls, suites, dtype, time_budget, add, shapes, **others) -> "Options":
        """From what the command line calls them."""
        return cls(
            tuple(suites or ()), dtypes=tuple(dtype or ()), budget=time_budget, add=tuple(add or ()),
            shapes=tuple(shapes or ()), **others,
        )  # fmt: skip


def _choose(options: Options) -> tuple[bool, list]:
    """Whether to run the model benchmark, and the cases to run."""
    for name in options.names:
        if name not in NAMES:
            raise UsageError(f"unknown suite {name!r}: choose from {', '.join(NAMES)}")
    for name in options.dtypes:
        if name not in DTYPES:
            raise UsageError(f"unknown dtype {name!r}: choose from {', '.join(DTYPES)}")
    if options.budget is not None and not options.budget > 0:
        raise UsageError(f"the time budget must be more than 0 seconds, not {options.budget:g}")
    with_model = "model" in options.names or "all" in options.names
    wanted = [name for name in suites.SUITES if name in options.names]
    if "all" in options.names or not options.names:
        wanted = list(suites.SUITES)
    dtypes = [DTYPES[name] for name in options.dtypes]
    cases = suites.select(wanted, full=options.full, dtypes=dtypes, pattern=options.pattern)
    if wanted and not cases:
        hint = "" if options.full else ", or --full for more cases"
        raise UsageError(f"no case of {', '.join(wanted)} matches: try a shorter --filter or other --dtype{hint}")
    return with_model, _narrowed(cases, options) if options.add else cases


def run(options: Options, console: rich.console.Console) -> int:
    """Run what `options` ask for and return the exit code: 0, WRONG if a kernel was wrong, or INTERRUPTED."""
    if SELFTEST in options.names:
        if len(options.names) > 1:
            raise UsageError("selftest runs alone: nearpeak bench selftest")
        return selftest.run(console)
    if options.names[:1] == (COMPARE,):
        return _compare(options.names[1:], console)
    for path in options.add:
        console.print(f"{path} adds {suites.add(path)}", highlight=False, soft_wrap=True)
    if options.shapes:
        suites.use_shapes(options.shapes)
    with_model, cases = _choose(options)
    found = results.Results(machine.describe())
    console.print(_machine_line(found.machine))
    try:
        if with_model:
            found.model = _run_model(console, quick=not options.full, alone=not cases)
        if cases:
            _run_cases(cases, options, found, console)
        found.complete = True
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted: keeping what was finished.")
    if found.rows:
        if len({row.suite for row in found.rows}) > 1 or not found.complete:
            console.print(table.to_rich(table.summary_table(found.rows), console))
        console.print(f"[dim]{table.EXPLANATION}")
    if found.model and found.rows:
        console.print(table.to_rich(table.model_table(found.model), console))
    if found.rows or found.model:
        _write(found, options, console)
    if not found.complete:
        return INTERRUPTED
    candidates = (candidate for row in found.rows for candidate in row.candidates())
    return WRONG if any(candidate.status in ("wrong", "failed") for candidate in candidates) else 0


def _compare(paths: tuple[str, ...], console: rich.console.Console) -> int:
    if len(paths) != 2:
        raise UsageError("compare takes two files of results: nearpeak bench compare before.json after.json")
    try:
        return compare.run(console, *map(pathlib.Path, paths))
    except ValueError as error:
        raise UsageError(str(error)) from None


def _narrowed(cases: list, options: Options) -> list:
    """With files of the user's: without the name of a suite, only the cases of operators that they add to."""
    theirs = {operator for addition in suites.added for operator, _ in addition.implementations}
    if not options.names:
        cases = [(suite, case) for suite, case in cases if case.operator in theirs]
    reached = {case.operator for _, case in cases}
    for addition in suites.added:
        if not any(operator in reached for operator, _ in addition.implementations):
            raise UsageError(
                f"{addition.path.name} adds {addition}, which no chosen case runs: name its suite, or leave the suite, "
                "--filter and --dtype out"
            )
    return cases


def _machine_line(described: dict) -> str:
    gpus = f", {'; '.join(described['gpus'])}" if described["gpus"] else ""
    kernels = f"nearpeak {described['isa']}" if described["isa"] else "nearpeak without its C++ extension"
    threads = f"{described['threads']} threads"
    return f"{described['processor']}, {threads}, PyTorch {described['torch_capability']}, {kernels}{gpus}"


def _run_model(console: rich.console.Console, quick: bool, alone: bool) -> dict | None:
    """The model benchmark's results; without its packages an error if it runs alone, else a line that says so."""
    from . import model, models

    try:
        return model.run(console, quick)
    except models.Missing as missing:
        if alone:
            raise UsageError(str(missing)) from None
        console.print(f"[yellow]model: left out: {missing}")
        return None


def _run_cases(cases: list, options: Options, found: results.Results, console: rich.console.Console) -> None:
    """Fill `found` with peaks and rows, and show the table of each suite when it is finished."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget = options.budget or (FULL_BUDGET if options.full else QUICK_BUDGET)
    columns = (
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=20),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left:"),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
    )
    with rich.progress.Progress(*columns, console=console, transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task("measuring the machine", total=len(cases))
        bar.update(task, description="measuring the machine's noise")
        found.noise = noise.measure(device)
        found.peaks = peaks.measure(device, lambda what: bar.update(task, description=what))
        console.print(f"noise of this machine: one call differs from itself by up to {100 * found.noise:.1f} %")
        settings = runner.Settings(device, budget, found.noise)
        for suite, group in itertools.groupby(cases, key=lambda pair: pair[0]):
            try:
                for _, case in group:
                    found.rows.append(_run_case(suite, case, settings, found.peaks, bar, task))
            finally:
                if any(row.suite == suite for row in found.rows):
                    console.print(table.to_rich(table.suite_table(suite, found.rows), console))


def _run_case(suite, case, settings, machine_peaks, bar: rich.progress.Progress, task) -> results.Row:
    start = time.perf_counter()

    def say(what):
        bar.update(task, description=f"{case.name}: {what}")

    row = runner.run_case(suite, case, settings, machine_peaks, say)
    bar.advance(task)
    if not bar.console.is_terminal:
        done = f"{bar.tasks[0].completed:.0f}/{bar.tasks[0].total:.0f}"
        bar.console.print(f"{done} {case.name} {time.perf_counter() - start:.1f} s", highlight=False, soft_wrap=True)
    return row


def _write(found: results.Results, options: Options, console: rich.console.Console) -> None:
    stem = FOLDER / found.created.replace(":", "").replace("+0000", "Z")
    files = {
        options.json or stem.with_suffix(".json"): results.Results.to_json,
        options.markdown or stem.with_suffix(".md"): _to_markdown,
        options.html or stem.with_suffix(".html"): report.to_html,
    }
    for path, render in files.items():
        try:
            results.write(path, render(found))
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
        except OSError as error:
            console.print(f"[red]could not write {path}: {error.strerror or error}", soft_wrap=True)


def _to_markdown(found: results.Results) -> str:
    facts = "".join(f"- {name}: {value}\n" for name, value in report.machine_facts(found))
    tables = [*([table.summary_table(found.rows)] if found.rows else []), *report.tables_of(found)]
    return f"## nearpeak bench, {found.created}\n\n{facts}\n{table.to_markdown(tables)}"
