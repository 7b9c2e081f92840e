"""`nearpeak bench`: choose cases, measure the machine, run, show tables, write files."""

import dataclasses
import pathlib

import rich.console
import torch

from . import (
    bisection,
    compare,
    history,
    journal,
    machine,
    machines,
    profiling,
    readme,
    repeat,
    report,
    results,
    selftest,
    session,
    suites,
    table,
    variants,
)
from .exits import CRASHED, INTERRUPTED, WRONG, UsageError
from .options import Options

SELFTEST, COMPARE, REPORT, BISECT = "selftest", "compare", "report", "bisect"
NAMES = (*suites.SUITES, "model", "all", SELFTEST, COMPARE, REPORT, BISECT)
# The options that are read by what is no run.
READS = {
    SELFTEST: set(),
    COMPARE: {"thresholds", "markdown", "csv"},
    REPORT: {"markdown", "html", "readme"},
    BISECT: {"thresholds", "cases", "pattern", "add", "time_limit"},
}
SPELLED = {"pattern": "--filter", "cases": "--case", "dtypes": "--dtype", "budget": "--time-budget",
           "thresholds": "--threshold", "isolate": "--no-isolate"}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAST, COLD = "last", "cold"
QUICK_BUDGET, FULL_BUDGET = 1.5, 5.0


def _check_options(options: Options) -> None:
    """UsageError for an option that what was asked for would leave unread."""
    given = {name for name, value in vars(options).items() if value != getattr(Options(), name)} - {"names"}
    name = options.names[0] if options.names[:1] and options.names[0] in READS else None
    unread = given - READS[name] if name else given & {"readme"}
    if "thresholds" in given and not name and not options.against:
        unread.add("thresholds")
    if unread:
        option = SPELLED.get(min(unread), f"--{min(unread).replace('_', '-')}")
        raise UsageError(f"{name or 'a run'} does nothing with {option}: see nearpeak bench --help")


def _choose(options: Options) -> tuple[bool, list]:
    """Whether to run the model benchmark, and the cases to run."""
    for name in options.names:
        if name not in NAMES:
            raise UsageError(f"unknown suite {name!r}: choose from {', '.join(NAMES)}")
    for name in options.dtypes:
        if name not in DTYPES:
            raise UsageError(f"unknown dtype {name!r}: choose from {', '.join(DTYPES)}")
    limits = {"time budget": options.budget, "time limit": options.time_limit, "memory limit": options.memory_limit}
    for name, limit in limits.items():
        if limit is not None and not limit > 0:
            raise UsageError(f"the {name} must be more than 0, not {limit:g}")
    with_model = "model" in options.names or "all" in options.names
    if with_model and (options.varies or options.profile):
        raise UsageError("--sweep, --threads, --caches and --profile are of kernels' cases: leave model and all out")
    cases = _named(options) if options.cases else _matching(options)
    return with_model, _varied(cases, options) if options.varies else cases


def _named(options: Options) -> list:
    """The cases of --case, whichever suites they are in, quick or not."""
    if options.names or options.dtypes or options.pattern:
        raise UsageError("--case names a whole case: leave the suites, --dtype and --filter out")
    return suites.named(options.cases)


def _matching(options: Options) -> list:
    wanted = [name for name in suites.SUITES if name in options.names]
    if "all" in options.names or not options.names:
        wanted = list(suites.SUITES)
    dtypes = [DTYPES[name] for name in options.dtypes]
    cases = suites.select(wanted, full=options.full, dtypes=dtypes, pattern=options.pattern)
    if wanted and not cases:
        hint = "" if options.full else ", or --full for more cases"
        raise UsageError(f"no case of {', '.join(wanted)} matches: try a shorter --filter or other --dtype{hint}")
    return _narrowed(cases, options) if options.add else cases


def _varied(cases: list, options: Options) -> list:
    """The variants of the chosen cases, each once."""
    planned = variants.plan(cases, options.sweep, options.threads, options.caches == COLD)
    made = {}
    for suite, variant in planned:
        case = suites.vary(variant)
        made.setdefault(case.name, (suite, case))
    return list(made.values())


def run(options: Options, console: rich.console.Console) -> int:
    """Do what `options` ask for and return the exit code (exits.py)."""
    if SELFTEST in options.names and len(options.names) > 1:
        raise UsageError("selftest runs alone: nearpeak bench selftest")
    thresholds = compare.thresholds_of(options.thresholds)
    _check_options(options)
    match options.names[:1]:
        case ("selftest",):
            return selftest.run(console)
        case ("compare",):
            return _compare(options, thresholds, console)
        case ("report",):
            return _report(options, console)
        case ("bisect",):
            return bisection.run(options, thresholds, console)
    found = results.Results(machine.describe())
    unfinished = None
    if options.resume:
        unfinished, options, found = _resumed(options, found)
    if options.shapes:
        suites.use_shapes(options.shapes)
    for path in options.add:
        console.print(f"{path} adds {suites.add(path)}", highlight=False, soft_wrap=True)
    with_model, cases = _choose(options)
    console.print(_machine_line(found.machine))
    if options.profile:
        return _profile(options, cases, console)
    finished = {row.case for row in found.rows}
    cases = [(suite, case) for suite, case in cases if case.name not in finished]
    if unfinished:
        console.print(f"{len(finished)} rows are kept, {len(cases)} are left")
    _measure(with_model, cases, options, found, console)
    if unfinished and found.complete:
        unfinished.unlink(missing_ok=True)
    _show(found, console)
    _write(found, options, console)
    if not found.complete:
        return INTERRUPTED
    code = _code_of(found)
    return code or (_against(options.against, found, thresholds, options, console) if options.against else 0)


def _profile(options: Options, cases: list, console: rich.console.Console) -> int:
    written = (options.json, options.html, options.markdown, options.csv)
    if any(written) or options.against or options.thresholds or options.budget or options.caches == COLD:
        raise UsageError("--profile times nothing: leave --caches, --time-budget, --against, --threshold and files out")
    return profiling.run(options.profile, cases, console)


def _resumed(options: Options, now: results.Results) -> tuple[pathlib.Path, Options, results.Results]:
    """The last unfinished run, as it was asked for; only where files go may be asked anew."""
    path, asked, found = journal.last(history.FOLDER)
    files = {name: getattr(options, name) for name in ("json", "html", "markdown", "csv") if getattr(options, name)}
    if dataclasses.replace(options, resume=False, **dict.fromkeys(files)) != Options():
        raise UsageError("--resume goes on with what was asked for: leave the other options out")
    if history.fingerprint(found.machine) != history.fingerprint(now.machine):
        raise UsageError(f"{path} is of another machine ({found.machine['processor']}): resume it there, or delete it")
    return path, dataclasses.replace(Options.from_json(asked), **files), found


def _measure(with_model: bool, cases: list, options: Options, found: results.Results, console) -> None:
    """Fill `found`, until it is complete or the user interrupts."""
    budget = options.budget or (FULL_BUDGET if options.full else QUICK_BUDGET)
    memory = options.memory_limit and int(options.memory_limit * 2**30)
    settings = session.Settings(budget, options.time_limit, memory, options.isolate)
    try:
        if with_model and not found.model:
            found.model = _run_model(options, console, alone=not cases)
        if cases:
            session.run(cases, settings, options, found, console)
        found.complete = True
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted: keeping what was finished. Go on with: nearpeak bench --resume")


def _show(found: results.Results, console: rich.console.Console) -> None:
    """What concerns the whole run; each suite's table was shown when it was finished."""
    if found.rows:
        if len({row.suite for row in found.rows}) > 1 or not found.complete:
            console.print(table.to_rich(table.summary_table(found.rows), console))
        console.print(f"[dim]{table.EXPLANATION}")
        if absent := table.absent(found.rows):
            console.print(f"[yellow]not compared with:[/] {absent}", highlight=False)
    if found.model and found.rows:
        console.print(table.to_rich(table.model_table(found.model), console))


def _code_of(found: results.Results) -> int:
    statuses = {candidate.status for row in found.rows for candidate in row.candidates()}
    if "wrong" in statuses:
        return WRONG
    return CRASHED if statuses & set(results.BROKEN) else 0


def _compare(options: Options, thresholds: dict[str, float], console: rich.console.Console) -> int:
    if len(options.names) != 3:
        raise UsageError("compare takes two files of results: nearpeak bench compare before.json after.json")
    before, after = (compare.load(pathlib.Path(name)) for name in options.names[1:])
    return _compared(before, after, thresholds, options, console)


def _report(options: Options, console: rich.console.Console) -> int:
    if len(options.names) == 1:
        raise UsageError("report takes files of results: nearpeak bench report zen3.json zen4.json")
    found = machines.gather(pathlib.Path(name) for name in options.names[1:])
    console.print(table.to_rich(machines.operators_table(found), console))
    console.print(f"[dim]{machines.EXPLANATION}")
    if options.readme:
        for path in readme.write(options.readme, found):
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    stem = history.FOLDER.parent / REPORT
    _write_one(options.markdown or stem.with_suffix(".md"), report.machines_to_markdown(found), console)
    _write_one(options.html or stem.with_suffix(".html"), report.machines_to_html(found), console)
    return 0


def _against(name: str, found: results.Results, thresholds, options: Options, console) -> int:
    """Hold this run against a file, or against the last one of this machine."""
    path = history.last(found) if name == LAST else pathlib.Path(name)
    if path is None:
        console.print("[yellow]no earlier run of this machine has these cases: this one is the first")
        return 0
    console.print(f"against {path}", highlight=False, soft_wrap=True)
    # The files that were asked for hold the run itself.
    return _compared(compare.load(path), found, thresholds, Options(), console)


def _compared(before, after, thresholds, options: Options, console) -> int:
    comparison = compare.Comparison.of(before, after, thresholds)
    compare.show(comparison, console)
    for path, text in ((options.markdown, compare.to_markdown(comparison)), (options.csv, compare.to_csv(comparison))):
        if path:
            _write_one(path, text, console)
    return comparison.code


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


def _run_model(options: Options, console: rich.console.Console, alone: bool) -> dict | None:
    """The model benchmark's results; without its packages an error if it runs alone, else a line that says so."""
    from . import model, models

    try:
        return {**model.run(console, quick=not options.full), "command": repeat.model_command(options)}
    except models.Missing as missing:
        if alone:
            raise UsageError(str(missing)) from None
        console.print(f"[yellow]model: left out: {missing}")
        return None


def _write(found: results.Results, options: Options, console: rich.console.Console) -> None:
    """The files that were asked for, and the run's place in the history of this machine."""
    if not (found.rows or found.model):
        return
    stem = history.stem(found)
    files = {
        stem.with_suffix(".json"): results.Results.to_json,
        options.json: results.Results.to_json,
        options.markdown or stem.with_suffix(".md"): report.to_markdown,
        options.html or stem.with_suffix(".html"): report.to_html,
        options.csv: table.to_csv,
    }
    for path, render in files.items():
        if path:
            _write_one(path, render(found), console)


def _write_one(path: pathlib.Path, text: str, console: rich.console.Console) -> None:
    try:
        results.write(path, text)
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    except OSError as error:
        console.print(f"[red]could not write {path}: {error.strerror or error}", soft_wrap=True)
