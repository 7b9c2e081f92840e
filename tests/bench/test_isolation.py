"""What crashes, hangs or eats memory costs its own line only; interrupted runs keep their rows and go on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import wrecks
from nearpeak_bench import exits, history, isolation, journal, results, runner, suites, worker
from toys import PEAKS, bench, interrupt_second_case, invoke, measurement

# A suite of two cases, peaks and noise that need no measuring, and kernels that go wrong in their own ways.
TOYS = """
import ctypes, os, torch
from nearpeak_bench import noise, peaks, runner, suites
from nearpeak_bench.cases import Case, Operator, Work

toys = Operator(
    name="toys", shape="{size}", inputs=lambda random, size: {"x": random(size)}, reference=lambda x: 2 * x,
    plain=lambda x: x + x, work={"forward": lambda size: Work(size, size, size)},
    kernels={"forward": "rms_norm_inference"},
)
toys.implementation("nearpeak")(lambda x: lambda: 2 * x)
toys.implementation("eager", baseline=True)(lambda x: lambda: x + x)
suites.SUITES["norm"] = [Case(toys, {"size": size}, torch.float32, quick=True) for size in (10, 20)]
noise.measure = lambda device: 0.01
peaks.measure = lambda device, progress: peaks.Peaks(dict.fromkeys(("float32", "bfloat16", "float16"), 1e11),
                                                     {2**20: 1e10}, {2**20: 1e10})
runner.extra_memory = lambda *arguments: None


def late(x, harm):
    calls = []

    def call():
        calls.append(1)
        return harm() if len(calls) > 3 and len(x) == 10 else 2 * x

    return call


def forever():
    while True:
        pass
"""

SEGFAULT = "toys.implementation('segfault')(lambda x: late(x, lambda: ctypes.string_at(0)))\n"
HANG = "toys.implementation('hang', baseline=True)(lambda x: late(x, forever))\n"
GREED = "toys.implementation('greed')(lambda x: late(x, lambda: torch.ones(2**42)))\n"
QUIT = "toys.implementation('quit')(lambda x: os._exit(5))\n"
TIME_LIMIT = 8.0


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Writes wrecks.py with the given kernels beside the good ones, in an empty folder, and forgets it afterwards."""
    for name, value in {"added": [], "shaped": [], "SUITES": dict(suites.SUITES)}.items():
        monkeypatch.setattr(suites, name, value)
    from nearpeak_bench import noise, peaks

    for module, name in ((noise, "measure"), (peaks, "measure"), (runner, "extra_memory")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.chdir(tmp_path)

    def write(*kernels):
        (tmp_path / "wrecks.py").write_text(TOYS + "".join(kernels))

    return write


def test_crash_hang_and_greed_cost_their_own_lines_only(toys, tmp_path):
    toys(SEGFAULT, HANG, GREED, QUIT)
    arguments = ["--add", "wrecks.py", "--time-budget", "0.01", "--time-limit", str(TIME_LIMIT), "--json", "a.json"]
    result = invoke("bench", *arguments)
    assert result.exit_code == exits.CRASHED, result.output
    first, second = results.Results.from_json((tmp_path / "a.json").read_text()).rows
    statuses = {each.implementation: each.status for each in first.measurements}
    assert statuses == {
        "nearpeak": "ok", "eager": "ok", "segfault": "crashed", "hang": "timed out", "greed": "failed",
        "quit": "crashed",
    }  # fmt: skip
    assert "SIGSEGV" in measurement(first, "segfault").note
    assert f"{TIME_LIMIT:g} s" in measurement(first, "hang").note
    assert "memory" in measurement(first, "greed").note
    assert "code 5" in measurement(first, "quit").note
    assert measurement(first, "nearpeak").ratios.keys() == {"eager"}
    # The next case starts afresh: what behaves there has its times.
    assert measurement(second, "segfault").ratios.keys() == {"eager", "hang"}
    assert "TIMED OUT" not in result.stdout, "a baseline that is lost stands in the notes and has no line"
    assert "hang timed out" in result.stdout
    assert "CRASHED" in result.stdout


def test_worker_serves_many_calls_and_is_replaced_after_a_loss():
    said = []
    with worker.Worker(worker.Limits(seconds=4.0, memory=2**34)) as process:
        first = process.call(wrecks.breathe, 6.0)
        assert process.call(wrecks.breathe, 0.2) == first != os.getpid()
        with pytest.raises(worker.Lost, match="failed: MemoryError"):
            process.call(wrecks.swell)
        with pytest.raises(worker.Lost, match=r"crashed: .*SIGKILL") as caught:
            process.call(wrecks.fall, say=said.append)
        assert (caught.value.turn, said) == ("", ["about to fall"])
        assert process.call(wrecks.breathe, 0.2) != first
        with pytest.raises(worker.Lost, match="timed out") as caught:
            process.call(wrecks.spin)
        assert caught.value.turn == "spinner"


def test_worker_leaves_no_semaphores_behind():
    with worker.Worker(worker.Limits(seconds=60.0)) as process:
        semaphore = pathlib.Path("/dev/shm", process.call(wrecks.lock))
        assert semaphore.exists()
    assert not semaphore.exists()


def test_loss_outside_of_any_implementation_loses_the_row(doubling):
    class Losing:
        def call(self, *arguments, say):
            raise worker.Lost("crashed", "no reason", "")

    case = suites.Case(doubling, {"size": 10}, torch.float32)
    row = isolation.run_case(Losing(), "norm", case, None, PEAKS, print)
    assert {each.status for each in row.measurements} == {"crashed"}


def test_resume_keeps_finished_rows_and_runs_the_others(toy_suite, monkeypatch, tmp_path):
    ran = interrupt_second_case(monkeypatch)
    result = bench("norm")
    assert result.exit_code == exits.INTERRUPTED
    assert "nearpeak bench --resume" in result.stdout
    (unfinished,) = history.FOLDER.glob(f"*{journal.ENDING}")
    with unfinished.open("a") as file:
        file.write('{"half a li')
    result = invoke("bench", "--resume", "--json", "a.json")
    assert result.exit_code == 0, result.output
    assert ran == ["10", "20", "20"]
    found = results.Results.from_json((tmp_path / "a.json").read_text())
    assert found.complete
    assert [row.shape for row in found.rows] == ["10", "20"]
    assert not list(history.FOLDER.glob(f"*{journal.ENDING}"))


def test_resume_refuses_other_choices_and_other_machines(toy_suite, monkeypatch):
    monkeypatch.setattr(runner, "run_case", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert bench("norm").exit_code == exits.INTERRUPTED
    refused = invoke("bench", "rotary", "--resume")
    assert (refused.exit_code, "leave the other options out" in refused.stderr) == (2, True)
    (unfinished,) = history.FOLDER.glob(f"*{journal.ENDING}")
    head = json.loads(unfinished.read_text())
    head["run"]["machine"]["processor"] = "another"
    unfinished.write_text(json.dumps(head) + "\n")
    refused = invoke("bench", "--resume")
    assert (refused.exit_code, "another machine (another)" in refused.stderr) == (2, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["kill", "kill -9"])
def test_killed_run_keeps_its_rows_and_leaves_no_process_behind(toys, tmp_path, number):
    toys(HANG)
    text = (tmp_path / "wrecks.py").read_text().replace("len(x) == 10", "len(x) == 20")
    tells = "def forever():\n    print(os.getpid(), flush=True)"
    (tmp_path / "wrecks.py").write_text(text.replace("def forever():", tells))
    command = textwrap.dedent("""
        from nearpeak.cli import main
        if __name__ == "__main__":
            main()
    """)
    (tmp_path / "run.py").write_text(command)
    arguments = [sys.executable, "run.py", "bench", "--add", "wrecks.py", "--time-budget", "0.01"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as running:
        worker_id = next(int(line) for line in running.stdout if line.strip().isdigit())
        running.send_signal(number)
        running.stdout.read()
    assert running.returncode == (exits.INTERRUPTED if number == signal.SIGTERM else -number)
    _, _, found = journal.last(tmp_path / history.FOLDER)
    assert [row.shape for row in found.rows] == ["10"]
    for _ in range(600):
        if not alive(worker_id):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived the run")


def alive(process_id):
    try:
        return " Z " not in pathlib.Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False
