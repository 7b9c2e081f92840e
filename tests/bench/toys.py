"""What the tests of the harness share: peaks, a run of a toy operator, samples, and the command line."""

import numpy as np
import torch
from nearpeak import cli
from nearpeak_bench import peaks, runner
from nearpeak_bench.cases import Case
from typer.testing import CliRunner

CPU = torch.device("cpu")
PEAKS = peaks.Peaks(
    multiply_add={"float32": 1e11, "bfloat16": 2e11, "float16": 2e11},
    copy={2**20: 2e10, 2**26: 1e10},
    read={2**20: 1e10, 2**26: 1e10},
)
SETTINGS = runner.Settings(CPU, budget=0.01, memory=False)


def run(operator, suite="norm", **options):
    case = Case(operator, {"size": 1000}, torch.float32)
    return runner.run_case(suite, case, runner.Settings(**{**vars(SETTINGS), **options}), PEAKS)


def measurement(row, name):
    return next(each for each in row.measurements if each.implementation == name)


def noisy(scale, sigma, rounds=60, seed=1):
    return scale * np.random.default_rng(seed).lognormal(0, sigma, rounds)


def invoke(*arguments):
    return CliRunner().invoke(cli.main, arguments)


def bench(*arguments):
    """In this process, where the toys are, and with hardly any time."""
    return invoke("bench", *arguments, "--no-isolate", "--time-budget", "0.01")


def interrupt_second_case(monkeypatch):
    """Has Ctrl-C come when the second case begins, once; returns the shapes of the cases that began."""
    whole, ran = runner.run_case, []

    def interrupted(suite, case, *rest):
        ran.append(case.shape)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return whole(suite, case, *rest)

    monkeypatch.setattr(runner, "run_case", interrupted)
    return ran
