"""`nearpeak bench bisect GOOD BAD --case ROW`: which commit made a row slower, or wrong?

Two temporary work trees are made, so that the user's own is left alone: one stays at GOOD, in the other `git bisect
run` walks through the commits. Each is built and run against GOOD, in turns (duel.py). Where BAD is slower than GOOD, a
commit is bad whose interval lies wholly on BAD's side of the middle between the two, sqrt(BAD / GOOD), which is far
from either's noise; where BAD is wrong or crashes, a commit is bad that does so too.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import rich.console
import rich.progress

from . import bisection_step, compare, duel, suites, verdicts
from .bisection_step import PREFIX, Search, build, git, told
from .exits import UNSTABLE, UsageError
from .options import Options

# Two processes of the same code were up to 10 % apart (rms_norm of 16x768, a call of 10 us, on a busy Zen 4).
PROCESS_MARGIN = 0.1


def run(options: Options, thresholds: dict[str, float], console: rich.console.Console) -> int:
    """Do what the command line asks for, and return the exit code."""
    if len(options.names) != 3:
        raise UsageError("bisect takes two commits: nearpeak bench bisect GOOD BAD --case ROW")
    top = pathlib.Path(git(pathlib.Path.cwd(), "rev-parse", "--show-toplevel"))
    kernel, files = "nearpeak", []
    for path in options.add:
        (_, kernel), *others = suites.add(path).implementations
        if others or len(options.add) > 1:
            raise UsageError("bisect follows one kernel: --add one file that registers one")
        if not path.resolve().is_relative_to(top.resolve()):
            raise UsageError(f"{path} must lie in {top}, whose commits are bisected")
        files.append(str(path.resolve().relative_to(top.resolve())))
    if not files and not (top / "kernels" / "nearpeak").exists():
        raise UsageError(f"{top} is not nearpeak's repository: --add the file there that holds your kernel")
    case = suites.only(options.cases, options.pattern, kernel)
    contest = duel.Contest(case.name, kernel, files, options.time_limit)
    margin = thresholds.get(case.operator.name, thresholds.get(compare.ANY))
    return find(top, *options.names[1:], contest, margin or PROCESS_MARGIN, console)


def find(
    top: pathlib.Path, good: str, bad: str, contest: duel.Contest, margin: float, console: rich.console.Console
) -> int:
    """Show the first bad commit of the repository `top`; 0, or UNSTABLE where noise or broken commits hide it."""
    good, bad = (git(top, "rev-parse", "--verify", f"{name}^{{commit}}") for name in (good, bad))
    with _work_trees(top, good, bad) as (base, walking):
        with console.status("building both commits"):
            for name, tree in (("GOOD", base), ("BAD", walking)):
                if reason := build(tree):
                    raise UsageError(f"{name} does not build: {reason}")
        with console.status(f"{contest.case}: BAD against GOOD"):
            middle = _middle(base, walking, contest, margin, console)
        search = Search(str(base), contest, margin, middle)
        file = base.parent / "search.json"
        file.write_text(json.dumps(dataclasses.asdict(search)))
        git(walking, "bisect", "start", bad, good)
        suspects = _walk(walking, file, console)
    one_of = " one of these: the others cannot be built or run, or noise hides it" if len(suspects) > 1 else ""
    console.print(f"[bold]{contest.case}: the first bad commit is{one_of}[/]", highlight=False, soft_wrap=True)
    for commit in suspects:
        shown = git(top, "show", "--stat", "--format=%H%n%an, %ad%n%s", commit)
        console.print(shown, highlight=False, markup=False, soft_wrap=True)
    return UNSTABLE if one_of else 0


@contextlib.contextmanager
def _work_trees(top: pathlib.Path, *commits: str) -> Iterator[list[pathlib.Path]]:
    """Checkouts of the commits that share `top`'s objects, and are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="nearpeak-bisect-") as folder:
        trees = [pathlib.Path(folder).resolve() / str(number) for number in range(len(commits))]
        try:
            for tree, commit in zip(trees, commits, strict=True):
                git(top, "worktree", "add", "--detach", str(tree), commit)
            yield trees
        finally:
            for tree in trees:
                with contextlib.suppress(UsageError):
                    git(top, "worktree", "remove", "--force", str(tree))


def _middle(base, walking, contest: duel.Contest, margin: float, console: rich.console.Console) -> float | None:
    """What to look for; UsageError where BAD is no worse than GOOD."""
    try:
        outcome = duel.fight(base, walking, contest, margin, lambda change: change.verdict != verdicts.NOISY)
    except duel.Gone as gone:
        status, note = gone.args
        raise UsageError(f"GOOD itself is {status} in {contest.case}: {note}: choose an older one") from None
    if outcome.status == duel.UNUSABLE:
        raise UsageError(f"BAD cannot be run in {contest.case}: {outcome.note}")
    console.print(f"BAD: {told(outcome)}", highlight=False)
    if outcome.change is None:
        return None
    if outcome.change.verdict != verdicts.SLOWER:
        raise UsageError(
            f"BAD is not slower than GOOD in {contest.case}, but {outcome.change.verdict}: {told(outcome)}; "
            "try a smaller --threshold, or another row"
        )
    return math.sqrt(outcome.change.value)


def _walk(tree: pathlib.Path, file: pathlib.Path, console: rich.console.Console) -> list[str]:
    """Run `git bisect run`, show what each commit is, and return what can be the first bad one, newest first."""
    step = [sys.executable, "-m", bisection_step.__name__, str(file)]
    # At most; git's own count leaves skipped commits out.
    left = git(tree, "rev-list", "--count", "--bisect").strip()
    steps = max(1, math.ceil(math.log2(int(left) + 1)) + 1)
    with rich.progress.Progress(console=console, transient=True) as bar:
        task = bar.add_task("bisecting", total=steps)
        command = ["git", "bisect", "run", *step]
        with subprocess.Popen(
            command, cwd=tree, env=duel.environment(tree), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            for line in process.stdout:
                if line.startswith(PREFIX):
                    console.print(line.removeprefix(PREFIX).strip(), highlight=False, markup=False, soft_wrap=True)
                    bar.advance(task)
    return git(tree, "rev-list", "refs/bisect/bad", "--not", "--glob=refs/bisect/good-*").splitlines()
