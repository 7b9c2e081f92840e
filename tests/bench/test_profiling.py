"""The profilers: what they are started with, what they see, and what is said where they cannot run."""

import json
import os
import shutil
import threading

import pytest
import torch
from nearpeak_bench import profiled, profiling, suites
from nearpeak_bench.cases import Variant
from toys import invoke

CASE = "overhead_rms_norm-64-elements-float32-forward"
FAKE = """#!/bin/sh
echo "$@" >> {log}
{body}
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a program into PATH, alone, that notes how it was called; returns what it noted."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(name, body="exit 0"):
        path, log = folder / name, tmp_path / "calls"
        path.write_text(FAKE.format(log=log, body=body))
        path.chmod(0o755)
        return lambda: log.read_text().splitlines()

    return put


def test_torch_profiler_shows_operators_and_writes_a_trace(toy_suite, tmp_path):
    result = invoke("bench", "norm", "--filter", "doubling-10", "--profile", "torch")
    assert result.exit_code == 0, result.output
    assert "aten::mul" in result.stdout
    (trace,) = (tmp_path / profiling.FOLDER).iterdir()
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mul" in names
    assert "aten::add" not in names, "baselines, and checks, are left out"


def test_perf_counts_and_samples_a_process_that_tells_it_when(toy_suite, tool):
    calls = tool("perf", 'case $1 in report) echo "  90.00%  python  a_hot_function";; *) echo "7 cycles" >&2;; esac')
    result = invoke("bench", "norm", "--filter", "doubling-10", "--profile", "perf")
    assert result.exit_code == 0, result.output
    stat, record, report = calls()
    for command in (stat, record):
        assert "--delay=-1 --control fifo:" in command
        assert "-m nearpeak_bench.profiled [[], [], []] doubling-10-float32-forward nearpeak 2" in command
    assert (stat.split()[0], record.split()[0], report.split()[0]) == ("stat", "record", "report")
    assert record.split("--output ")[1].split()[0] == report.split("--input ")[1].split()[0]
    assert "7 cycles" in result.stdout
    assert "a_hot_function" in result.stdout


def test_ncu_looks_between_the_marks_only(toy_suite, tool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    calls = tool("ncu", "echo 'Duration 3 us'")
    result = invoke("bench", "norm", "--filter", "doubling-10", "--threads", "1", "--profile", "ncu")
    assert result.exit_code == 0, result.output
    profile, details = calls()
    assert profile.startswith("--profile-from-start off --set full ")
    state = '[[], [], [["doubling-10-float32-forward", "", 1, false]]]'
    assert f"-m nearpeak_bench.profiled {state} doubling-10-1-thread-float32-forward nearpeak" in profile
    assert details.split()[:2] == ["--import", profile.split("--export ")[1].split()[0]]
    assert "Duration 3 us" in result.stdout


@pytest.mark.parametrize(
    ("profiler", "program", "message"),
    [
        pytest.param("perf", None, "perf is not here: install linux-perf", id="no perf"),
        pytest.param("perf", "echo 'see perf_event_paranoid' >&2; exit 255", "sudo sysctl kernel", id="forbidden"),
        pytest.param("perf", "echo 'KeyError: 7\n0 sys' >&2; exit 1", "process failed: KeyError: 7", id="child fails"),
        pytest.param("perf", "echo 'out of luck' >&2; exit 1", "perf failed: out of luck", id="perf fails"),
        pytest.param("ncu", "exit 0", "ncu needs a GPU that torch can use", id="no GPU"),
    ],
)
def test_profiler_that_cannot_run_gets_one_line_that_says_what_to_do(toy_suite, tool, profiler, program, message):
    if profiler == "ncu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if program:
        tool(profiler, program)
    result = invoke("bench", "norm", "--profile", profiler)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("program", "message"),
    [(None, "ncu is not here: install"), ("echo '==ERROR== ERR_NVGPUCTRPERM: no'; exit 1", "ncu failed: ERR_NVGPU")],
)
def test_ncu_that_is_missing_or_not_permitted_is_said(toy_suite, tool, monkeypatch, program, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if program:
        tool("ncu", program)
    result = invoke("bench", "norm", "--profile", "ncu")
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize("option", [["--json", "a.json"], ["--caches", "cold"], ["--against", "last"]])
def test_options_that_a_profile_cannot_serve_are_refused(toy_suite, option):
    result = invoke("bench", "norm", "--profile", "torch", *option)
    assert (result.exit_code, "--profile times nothing" in result.stderr) == (2, True)


def test_kernel_runs_between_the_commands_alone(tmp_path):
    control, acknowledge = tmp_path / "control", tmp_path / "acknowledge"
    os.mkfifo(control)
    os.mkfifo(acknowledge)
    events = []

    def perf():
        with open(control) as commands, open(acknowledge, "w") as answers:
            for command in commands:
                events.append(command.strip())
                print("ack", file=answers, flush=True)

    watching = threading.Thread(target=perf)
    watching.start()
    profiled.between_commands(lambda: events.append("call"), 0.01, str(control), str(acknowledge))
    watching.join(timeout=30)
    assert (events[0], events[-1]) == ("enable", "disable")
    assert set(events[1:-1]) == {"call"}


def test_state_of_a_process_survives_its_command_line(tmp_path):
    state = suites.State([tmp_path / "mine.py"], ("gpt2",), (Variant("a", "S=5", 2, True), Variant("b")))
    assert profiled.state_from_json(profiled.state_to_json(state)) == state


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
def test_perf_itself_finds_the_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(profiling, "SECONDS", 0.2)
    monkeypatch.setattr(suites, "varied", {})
    monkeypatch.chdir(tmp_path)
    result = invoke("bench", "--case", CASE, "--profile", "perf")
    assert result.exit_code == 0, result.output
    assert "task-clock" in result.stdout
    assert "python" in result.stdout
