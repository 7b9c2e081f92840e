"""`nearpeak inspect`: choose kernels and targets, compile, show tables, write files, hold against conditions."""

import dataclasses
import pathlib

import rich.console
import rich.progress
import torch
import triton
from nearpeak import triton_launch

from .. import suites, table
from ..exits import CRASHED, GATE, INTERRUPTED, REGRESSION, UsageError
from ..results import write
from . import comparison, gate, ours, page, tables
from .code import compile_case
from .compiling import PREFIX, Case, cases_of
from .results import Failure, Results
from .targets import TARGETS, Target

COMPARE, ALL = "compare", "all"
DEFAULT_TARGET = "sm_90"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for; paths of None: no such file."""

    names: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    full: bool = False
    pattern: str = ""
    against: pathlib.Path | None = None
    fail_on: tuple[str, ...] = ()
    json: pathlib.Path | None = None
    html: pathlib.Path | None = None
    markdown: pathlib.Path | None = None


def run(options: Options, console: rich.console.Console) -> int:
    """Do what `options` ask for and return the exit code (../exits.py)."""
    conditions = gate.conditions_of(options.fail_on)
    if options.names[:1] == (COMPARE,):
        if len(options.names) != 3:
            raise UsageError("compare takes two files of results: nearpeak inspect compare before.json after.json")
        _refuse_unread(options)
        before, after = (comparison.load(pathlib.Path(name)) for name in options.names[1:])
        return _compared(before, after, conditions, options, console)
    if any(condition.measure == gate.WORSE for condition in conditions) and not options.against:
        raise UsageError("--fail-on worse needs a run to be held against: --against FILE")
    if triton.knobs.runtime.interpret:
        raise UsageError("Triton's interpreter makes no machine code: unset TRITON_INTERPRET")
    targets = _targets(options.targets)
    found = _inspect(_cases(options.names, options), targets, console)
    _show(found, console)
    if options.against and found.complete:
        code = _compared(_earlier(options, targets, console), found, conditions, options, console)
    else:
        _write(options, console, {"json": Results.to_json, "html": page.to_html, "markdown": _to_markdown}, found)
        code = _judge(found, conditions, console)
    return code if found.complete else INTERRUPTED


def _refuse_unread(options: Options) -> None:
    """UsageError for an option that compare would leave unread: its files say what was compiled."""
    unread = {"--target": options.targets, "--full": options.full, "--filter": options.pattern,
              "--against": options.against}  # fmt: skip
    for option, given in unread.items():
        if given:
            raise UsageError(f"compare does nothing with {option}: leave it out")


def _targets(names: tuple[str, ...]) -> list[Target]:
    """The targets of these names; without any, this machine's GPU, or one that is widespread."""
    if ALL in names:
        return list(TARGETS.values())
    for name in names:
        if name not in TARGETS:
            raise UsageError(f"unknown target {name!r}: choose from {', '.join((*TARGETS, ALL))}")
    return [TARGETS[name] for name in dict.fromkeys(names or [_own_target()])]


def _own_target() -> str:
    if not torch.cuda.is_available():
        return DEFAULT_TARGET
    architecture = triton_launch.describe(torch.device("cuda")).architecture
    name = f"sm_{architecture}" if isinstance(architecture, int) else architecture
    return name if name in TARGETS else DEFAULT_TARGET


def _cases(names: tuple[str, ...], options: Options) -> list[Case]:
    """Those of the families and files that are named, or of all families."""
    own = ours.every_case() if options.full else ours.common_cases()
    cases = [] if names else own
    for name in names:
        if name in ours.FAMILIES:
            cases = cases + [case for case in own if ours.family_of(case) == name]
        elif name.endswith(".py"):
            cases = cases + _cases_of_file(pathlib.Path(name))
        else:
            raise UsageError(f"unknown kernels {name!r}: choose from {', '.join(ours.FAMILIES)}, or a Python file")
    chosen = [case for case in cases if options.pattern in case.name]
    if not chosen:
        hint = "" if options.full else ", or --full for more cases"
        raise UsageError(f"no case matches {options.pattern!r}: try a shorter --filter{hint}")
    return chosen


def _cases_of_file(path: pathlib.Path) -> list[Case]:
    if cases := cases_of(suites.execute(path)):
        return cases
    raise UsageError(
        f"{path} has no case: define a function {PREFIX}NAME() that launches a kernel on tensors of device='meta'"
    )


def _inspect(cases: list[Case], targets: list[Target], console: rich.console.Console) -> Results:
    """Compile all cases for all targets, until all are done or the user interrupts."""
    found = Results()
    pairs = [(case, target) for case in cases for target in targets]
    progress = rich.console.Console(stderr=True)
    try:
        for case, target in rich.progress.track(pairs, "compiling", console=progress, transient=True):
            try:
                found.codes += _compiled(case, target)
            except Exception as error:
                # Whatever a user's launcher or the compiler raises costs its own row only.
                found.failures.append(Failure(case.name, target.name, _reason(error)))
        found.complete = True
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted: keeping what was compiled")
    return found


def _compiled(case: Case, target: Target) -> list:
    codes = compile_case(case, target)
    if not codes:
        raise RuntimeError(f"{case.name} launches no Triton kernel: call one on tensors of device='meta'")
    return codes


def _reason(error: BaseException) -> str:
    """One line: the first cause, since a compiler's error in a called function comes wrapped in the caller's."""
    while error.__cause__:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def _show(found: Results, console: rich.console.Console) -> None:
    for each in tables.tables_of(found):
        console.print(table.to_rich(each, console))
    console.print(f"[dim]{tables.EXPLANATION} {tables.LOOPS_EXPLANATION}", highlight=False)


def _judge(found: Results, conditions: list[gate.Condition], console: rich.console.Console) -> int:
    broken = gate.violations(conditions, found.codes)
    for line in broken:
        console.print(f"[red]--fail-on[/] {line}", highlight=False, soft_wrap=True)
    if found.failures or not all(code.fits for code in found.codes):
        return CRASHED
    return GATE if broken else 0


def _earlier(options: Options, targets: list[Target], console: rich.console.Console) -> Results:
    """What --against names: results in a file, or another file of kernels."""
    if options.against.suffix != ".py":
        return comparison.load(options.against)
    return _inspect(_cases((str(options.against),), options), targets, console)


def _compared(before: Results, after: Results, conditions, options: Options, console: rich.console.Console) -> int:
    found = comparison.Comparison.of(before, after)
    console.print(table.to_rich(tables.comparison_table(found), console))
    for line in _remarks(found):
        console.print(line, highlight=False)
    renderers = {
        "json": lambda found: found.after.to_json(),
        "html": page.comparison_to_html,
        "markdown": _comparison_to_markdown,
    }
    _write(options, console, renderers, found)
    code = _judge(after, conditions, console)
    if not code and found.worse and any(condition.measure == gate.WORSE for condition in conditions):
        return REGRESSION
    return code


def _remarks(found: comparison.Comparison) -> list[str]:
    verdicts = [change.verdict for change in found.changes]
    counts = (f"{verdicts.count(each)} {each}" for each in (comparison.WORSE, comparison.BETTER, comparison.SAME))
    remarks = [", ".join(counts)]
    for names, where in ((found.only_before, "after"), (found.only_after, "before")):
        if names:
            remarks.append(f"not {where}: {', '.join(names)}")
    return remarks


def _write(options: Options, console: rich.console.Console, renderers: dict, found) -> None:
    for name, render in renderers.items():
        if path := getattr(options, name):
            try:
                write(path, render(found))
                console.print(f"wrote {path}", highlight=False, soft_wrap=True)
            except OSError as error:
                console.print(f"[red]could not write {path}: {error.strerror or error}", soft_wrap=True)


def _to_markdown(found: Results) -> str:
    head = f"## nearpeak inspect, {found.created}\n\nTriton {found.triton}\n\n"
    return f"{head}{table.to_markdown(tables.tables_of(found))}\n{tables.EXPLANATION} {tables.LOOPS_EXPLANATION}\n"


def _comparison_to_markdown(found: comparison.Comparison) -> str:
    remarks = "\n\n".join(_remarks(found))
    return f"## nearpeak inspect compare\n\n{remarks}\n\n{table.to_markdown([tables.comparison_table(found)])}"
