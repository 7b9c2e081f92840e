"""`nearpeak check`: the exactness of every operator, on every serving of this machine."""

import os

import pytest
import torch
from nearpeak import backends
from nearpeak_bench import check, exits, suites, worker
from nearpeak_bench.cases import Case
from torch.utils._python_dispatch import TorchDispatchMode
from toys import CPU, invoke


def verdicts(name, direction):
    return check.judge(worker.Watch(), name, direction)


def replaced(monkeypatch, name, prepare):
    """`name`'s operator with another kernel in place of ours."""
    operator, _ = check.subjects(name)[0]
    ours = operator.implementations["nearpeak"]
    monkeypatch.setattr(operator, "implementations", dict(operator.implementations))
    operator.implementation("nearpeak")(lambda **inputs: prepare(ours.prepare(**inputs)))


def test_every_operator_of_the_suites_is_checked_in_every_direction():
    cases = [case for cases in suites.SUITES.values() for case in cases if case.operator.work]
    wanted = {(case.operator.name, case.direction) for case in cases}
    assert wanted <= {(operator.name, direction) for operator, direction in check.subjects()}


class Recording(TorchDispatchMode):
    """Notes which of our operators run, inside of gradients too."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(function.name())
        return function(*arguments, **(keywords or {}))


def test_every_operator_of_the_package_is_checked():
    operators = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nearpeak::")}
    assert len(operators) > 30
    with Recording() as recording:
        for operator, direction in check.subjects():
            for shape in check.SHAPES[operator.name]:
                check.Standard(Case(operator, shape, torch.float32, direction), CPU, draws=1).ours()
    assert operators - recording.names == set()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_right_kernels_are_exact_on_every_serving(direction):
    found = verdicts("rms_norm", direction)
    assert {each.serving for each in found} == set(check.servings())
    assert {each.dtype for each in found} == {"fp32", "bf16", "fp16"}
    assert {f"cpu {isa}" for isa in backends.isas_supported() if "emulated" not in isa} <= set(check.servings())
    assert not [each.reason for each in found if each.reason]
    assert all(0 < each.ratio < 1.2 for each in found)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        pytest.param(lambda call: lambda: call() * 1.03, "mean error", id="off"),
        pytest.param(lambda call: lambda: call().new_empty(call().shape), "NaN", id="never written"),
        pytest.param(lambda call: lambda: 1 / 0, "ZeroDivisionError", id="raises"),
    ],
)
def test_wrong_kernels_are_found(monkeypatch, prepare, reason):
    replaced(monkeypatch, "rms_norm", prepare)
    assert all(reason in each.reason for each in verdicts("rms_norm", "forward"))
    result = invoke("check", "--filter", "add_rms_norm_out", "--no-isolate")
    assert result.exit_code == 0, "other operators are as they were"


def test_command_shows_a_wrong_kernel_and_fails(monkeypatch):
    replaced(monkeypatch, "add_rms_norm_out", lambda call: lambda: tuple(2 * each for each in call()))
    result = invoke("check", "--filter", "add_rms_norm_out", "--no-isolate")
    assert result.exit_code == exits.WRONG
    assert "WRONG" in result.stdout
    assert "0 of 1 are exact" in result.stdout


def test_serving_that_crashes_costs_its_own_cell_only(monkeypatch):
    class Crashing(worker.Here):
        def call(self, function, name, direction, left_out, **others):
            if "reference" not in left_out:
                raise worker.Lost("crashed", "SIGSEGV", "reference")
            return super().call(function, name, direction, left_out, **others)

    found, lost = check._survey(Crashing(), "rms_norm_out", "forward")
    line = check._line("rms_norm_out", "forward", found, lost)
    assert line.cells[2] == "CRASHED"
    assert all(float(cell) > 0 for cell in line.cells[3:])
    assert line.mark == "bad"


def test_unknown_operator_gets_one_line():
    result = invoke("check", "--filter", "nothing")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "rms_norm, " in result.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes minutes")
def test_command_in_a_process_of_its_own():
    result = invoke("check", "--filter", "rms_norm_out")
    assert result.exit_code == 0, result.output
    assert "2 of 2 are exact on reference" in result.stdout
