"""One step of `git bisect run` for bisection.py: is the commit that is checked out good, bad, or not to be told?

    python -m nearpeak_bench.bisection_step SEARCH.json

A process of its own, which imports no torch: it builds the commit, and has it run against the good one (duel.py).
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

from . import duel, verdicts
from .exits import UsageError

# What `git bisect run` takes exit codes for.
GOOD, BAD, SKIP = 0, 1, 125
PREFIX = "nearpeak: "
EXTENSION = "_native*"


@dataclasses.dataclass(frozen=True)
class Search:
    """middle: the change from which on a commit is bad; None where those are bad that give no right result."""

    good: str
    contest: duel.Contest
    margin: float
    middle: float | None


def git(folder: pathlib.Path, *arguments: str) -> str:
    """git's answer; UsageError with its last line where it refuses."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError("bisect needs git: install it") from None
    if done.returncode:
        raise UsageError(f"git {arguments[0]}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return done.stdout.strip()


def build(tree: pathlib.Path) -> str:
    """Build the extension of a checkout that has one; why that fails, or nothing."""
    if not (tree / "setup.py").exists():
        return ""
    for stale in tree.glob(f"kernels/nearpeak/{EXTENSION}"):
        stale.unlink()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    return (done.stderr.strip() or "no message").splitlines()[-1] if done.returncode else ""


def told(outcome: duel.Outcome) -> str:
    """An outcome in words."""
    if outcome.change is None:
        return f"{outcome.status}: {outcome.note}"
    return f"{outcome.change.value:.3g}x GOOD's speed ({outcome.change.lower:.3g}-{outcome.change.upper:.3g})"


def verdict_of(outcome: duel.Outcome, search: Search) -> int:
    """GOOD, BAD or SKIP, as `git bisect run` wants it."""
    if outcome.status == duel.UNUSABLE:
        return SKIP
    if search.middle is None:
        return GOOD if outcome.status == "ok" else BAD
    if outcome.change is None or not _decided(outcome.change, search.middle):
        return SKIP
    return BAD if outcome.change.upper < search.middle else GOOD


def _decided(change: verdicts.Ratio, middle: float) -> bool:
    return change.upper < middle or change.lower > middle


def judge(tree: pathlib.Path, search: Search) -> tuple[int, str]:
    """The commit that is checked out: GOOD, BAD or SKIP, and why."""
    if reason := build(tree):
        return SKIP, f"does not build: {reason}"
    middle = search.middle

    def decided(change):
        return middle is None or _decided(change, middle)

    try:
        outcome = duel.fight(pathlib.Path(search.good), tree, search.contest, search.margin, decided)
    except duel.Gone as gone:
        return SKIP, f"GOOD gave no speed: {': '.join(gone.args)}"
    return verdict_of(outcome, search), told(outcome)


def step(file: str) -> int:
    """One step of `git bisect run`, in the work tree."""
    data = json.loads(pathlib.Path(file).read_text())
    search = Search(**{**data, "contest": duel.Contest(**data["contest"])})
    tree = pathlib.Path.cwd()
    code, reason = judge(tree, search)
    word = {GOOD: "good", BAD: "bad", SKIP: "skipped"}[code]
    print(f"{PREFIX}{git(tree, 'log', '-1', '--format=%h %s')}: {word}, {reason}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(step(*sys.argv[1:]))
