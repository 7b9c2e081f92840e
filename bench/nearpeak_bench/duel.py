"""Two checkouts' kernels against each other, in turns: what changed in one case between two commits?

Extensions of two commits cannot live in one process. So each commit gets one (one_case.py), both are there at once, and
take turns of a fraction of a second; within a turn the kernel is held against a baseline, round by round. What both
turns have in common cancels, and so does what the two processes have.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TextIO

from . import verdicts

POLL_SECONDS = 0.5
LEAST_TURNS, MOST_TURNS = 4, 20
# A commit where the case cannot be run at all, for reasons that are not the kernel's.
UNUSABLE = "unusable"


@dataclasses.dataclass(frozen=True)
class Contest:
    """case: its name; kernel: the implementation's; files: those of --add, relative to a checkout; time_limit: seconds
    without an answer after which a process is given up."""

    case: str
    kernel: str
    files: list[str]
    time_limit: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of the second checkout: its kernel's status (results.Measurement's, or UNUSABLE) and why, and how its speed
    relates to the first one's; None where either has no speed."""

    status: str
    note: str
    change: verdicts.Ratio | None = None


class Gone(Exception):
    """A process that gave no answer: its status, and why."""


class _Process:
    """One checkout's kernel, that answers."""

    def __init__(self, process: subprocess.Popen, errors: TextIO, limit: float):
        self._process, self._errors, self._limit = process, errors, limit

    def answer(self) -> dict:
        waited = 0.0
        # Waiting is counted in polls: a machine that slept meanwhile slept for one poll.
        while not select.select([self._process.stdout], [], [], POLL_SECONDS)[0]:
            waited += POLL_SECONDS
            if waited >= self._limit:
                raise Gone("timed out", f"no answer for {self._limit:g} s")
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        if code < 0:
            raise Gone("crashed", signal.Signals(-code).name)
        self._errors.seek(0)
        # Of a traceback the last line at its margin; a message may go on below it, indented.
        lines = [line.strip() for line in self._errors if line.strip() and not line[0].isspace()]
        raise Gone(UNUSABLE, lines[-1] if lines else f"ended with code {code}")

    def turn(self) -> list[float]:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
        return self.answer()["speeds"]


@contextlib.contextmanager
def _started(checkout: pathlib.Path, contest: Contest) -> Iterator[_Process]:
    """The process of a checkout, which ends with the context."""
    command = [sys.executable, "-m", "nearpeak_bench.one_case", contest.case, contest.kernel]
    command += [str(checkout / file) for file in contest.files]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, cwd=checkout, env=environment(checkout), text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        ) as process,
    ):  # fmt: skip
        try:
            yield _Process(process, errors, contest.time_limit)
        finally:
            process.kill()


def environment(checkout: pathlib.Path) -> dict[str, str]:
    """Of a process that runs the checkout's kernels, if it has some, under this harness."""
    roots = [str(checkout / "kernels"), str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    # Two commits' files may have one size and time, by which Python knows what it has compiled.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots)), "PYTHONDONTWRITEBYTECODE": "1"}


def fight(
    first: pathlib.Path,
    second: pathlib.Path,
    contest: Contest,
    margin: float,
    decided: Callable[[verdicts.Ratio], bool],
) -> Outcome:
    """The second checkout's outcome against the first one's, after as many turns as decide it.

    margin: what two processes of one commit may differ by, as a fraction. Raises Gone where the first gives no speed.
    """
    with _started(first, contest) as one, _started(second, contest) as other:
        base = one.answer()
        if base["status"] != "ok":
            raise Gone(base["status"], base["note"])
        try:
            answer = other.answer()
            if answer["status"] != "ok":
                return Outcome(answer["status"], answer["note"])
            return Outcome("ok", "", _change(one, other, margin, decided))
        except Gone as gone:
            return Outcome(*gone.args)


def _change(one: _Process, other: _Process, margin: float, decided: Callable[[verdicts.Ratio], bool]):
    speeds: dict[_Process, list[float]] = {one: [], other: []}
    order = [one, other]
    for turn in range(MOST_TURNS):
        for each in order:
            speeds[each] += each.turn()
        order.reverse()
        change = verdicts.change(speeds[one], speeds[other], margin)
        if turn + 1 >= LEAST_TURNS and decided(change):
            break
    return change
