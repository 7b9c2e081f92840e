"""The toys of the harness's tests: an operator, a suite made of it, and results."""

import pytest
import torch
from nearpeak_bench import command, noise, peaks, results, runner, suites, verdicts
from nearpeak_bench.cases import Case, Operator, Work
from toys import PEAKS, measurement, run


@pytest.fixture
def doubling():
    """An operator with one right, one wrong, one raising and one missing implementation, and a baseline."""
    operator = Operator(
        name="doubling",
        shape="{size}",
        inputs=lambda random, size: {"x": random(size)},
        reference=lambda x: 2 * x,
        plain=lambda x: x + x,
        work={"forward": lambda size: Work(size, size, size)},
        kernels={"forward": "rms_norm_inference"},
    )
    operator.implementation("nearpeak")(lambda x: lambda: 2 * x)
    operator.implementation("eager", baseline=True)(lambda x: lambda: x + x)
    return operator


@pytest.fixture
def found(doubling):
    rows = [run(doubling), run(doubling)]
    slow = measurement(rows[1], "nearpeak")
    slow.ratios["eager"] = verdicts.Ratio(0.01, 0.009, 0.011, 1.0, verdicts.SLOWER)
    return results.Results({"processor": "a <processor>", **_machine()}, PEAKS, rows=rows, noise=0.01, complete=True)


def _machine():
    described = command.machine.describe()
    described.pop("processor")
    return described


@pytest.fixture
def toy_suite(doubling, monkeypatch, tmp_path):
    """The suite norm replaced by two small cases, in an empty folder, with peaks that need no measuring."""
    cases = [Case(doubling, {"size": size}, torch.float32, quick=True) for size in (10, 20)]
    monkeypatch.setattr(suites, "SUITES", {**suites.SUITES, "norm": cases})
    monkeypatch.setattr(peaks, "measure", lambda device, progress: PEAKS)
    monkeypatch.setattr(noise, "measure", lambda device: 0.01)
    monkeypatch.setattr(suites, "added", [])
    monkeypatch.setattr(suites, "shaped", [])
    monkeypatch.setattr(suites, "varied", {})
    monkeypatch.setattr(runner, "extra_memory", lambda *arguments: None)
    monkeypatch.chdir(tmp_path)
    return doubling
