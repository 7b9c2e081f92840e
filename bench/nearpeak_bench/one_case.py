"""One kernel in one case, served line by line to bisection.py: `python -m nearpeak_bench.one_case CASE KERNEL FILE...`

The first line of JSON says whether the kernel is right. After it, each line that comes in is a turn: rounds are timed,
and a line goes out with the speed of each, baseline / kernel (above 1: the kernel is faster), or without a baseline
calls a second. It ends with its input. The files are the user's (nearpeak bench --add).
"""

import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import TextIO

import torch

from . import runner, suites, timing
from .cases import Case
from .results import Measurement

TURN_SECONDS = 0.15


def main(name: str, kernel: str, *files: str) -> None:
    answers = _own_stdout()
    for file in files:
        suites.add(pathlib.Path(file))
    case = suites.find(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measurement, calls = _prepared(case, kernel, device)
    _say(answers, {"status": measurement.status, "note": measurement.note})
    clock = timing.clock_of(device)
    for _ in sys.stdin:
        samples = timing.time_interleaved(calls, TURN_SECONDS, clock)
        own, *baseline = (each.seconds for each in samples.values())
        above = baseline[0] if baseline else [1.0] * len(own)
        _say(answers, {"speeds": [there / here for there, here in zip(above, own, strict=True)]})


def _own_stdout() -> TextIO:
    """What a kernel prints goes to stderr: answers have stdout for themselves."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, answer: dict) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _prepared(case: Case, kernel: str, device: torch.device) -> tuple[Measurement, dict[str, Callable]]:
    """What is to be said of the kernel, and the calls: its own and, if one runs, a baseline's.

    Baselines that torch.compile makes are left out: they cost seconds in every process.
    """
    implementations = case.operator.implementations
    examiner = runner.Examiner(case, device)
    measurement = Measurement(kernel, baseline=False, backend="")
    calls = {kernel: examiner.examine(implementations[kernel], measurement)}
    for name, each in implementations.items():
        if each.baseline and not each.compiled and len(calls) == 1:
            call = examiner.examine(each, Measurement(name, baseline=True, backend=""))
            calls |= {name: call} if call else {}
    return measurement, calls


if __name__ == "__main__":
    main(*sys.argv[1:])
