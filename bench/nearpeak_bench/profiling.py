"""`nearpeak bench --profile`: where the time of a kernel goes, by the profilers that people know.

    torch    torch.profiler, in this process: a table of operators, and a trace for https://ui.perfetto.dev
    perf     Linux's perf, around a process that runs the kernel alone: counters, and the functions that take the time
    ncu      NVIDIA's Nsight Compute, around a process that marks one call of the kernel

Preparing and warming up are left out: perf starts disabled and is told when to count, ncu looks between the marks only.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable

import rich.console
import torch

from . import profiled, suites, table
from .cases import Case
from .exits import UsageError

FOLDER = pathlib.Path(".nearpeak/profiles")
SECONDS = 2.0
MOST_OPERATORS, MOST_FUNCTIONS = 15, 12
LEAST_PERCENT = 0.5
PERF_INSTALL = "install linux-perf (Debian), linux-tools-generic (Ubuntu) or perf (Fedora)"
PERF_PERMIT = "allow it with: sudo sysctl kernel.perf_event_paranoid=1"
NCU_INSTALL = "install Nsight Compute, a part of the CUDA toolkit, and put ncu into PATH"


def run(profiler: str, cases: list[tuple[str, Case]], console: rich.console.Console) -> int:
    """Profile our kernels, and those that a user added, in all `cases`; the exit code is 0."""
    profile = {"torch": _by_torch, "perf": _by_perf, "ncu": _by_ncu}[profiler]
    {"torch": lambda: None, "perf": _require_perf, "ncu": _require_ncu}[profiler]()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for _, case in cases:
        for name, implementation in case.operator.implementations.items():
            if not implementation.baseline:
                console.rule(f"{case.name} {name}", align="left")
                profile(case, name, console)
    return 0


def _file(case: Case, implementation: str, ending: str) -> pathlib.Path:
    return FOLDER / (re.sub(r"[^\w.:-]+", "-", f"{case.name}-{implementation}") + ending)


def _by_torch(case: Case, implementation: str, console: rich.console.Console) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with case.in_its_threads():
        call = profiled.warmed_up(case, implementation, device)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
    console.print(table.to_rich(_operators(profile.key_averages(), device), console))
    trace = _file(case, implementation, ".trace.json")
    profile.export_chrome_trace(str(trace))
    console.print(f"wrote {trace}: open it at https://ui.perfetto.dev", highlight=False, soft_wrap=True)


def _operators(events: Iterable, device: torch.device) -> table.Table:
    """The operators of one call by their own time, which on a GPU is the kernels'."""
    kind = "device" if device.type == "cuda" else "cpu"
    own, total = f"self_{kind}_time_total", f"{kind}_time_total"
    events = sorted(events, key=lambda event: getattr(event, own), reverse=True)
    whole = sum(getattr(event, own) for event in events) or 1
    lines = [
        table.Line(
            [event.key, str(event.count), table.seconds_text(1e-6 * getattr(event, own)),
             f"{100 * getattr(event, own) / whole:.0f}%", table.seconds_text(1e-6 * getattr(event, total))],
            "fine", "",
        )
        for event in events[:MOST_OPERATORS]
    ]  # fmt: skip
    return table.Table("one call", ["operator", "calls", "own time", "share", "with what it calls"], lines)


def _child(case: Case, implementation: str, *pipes: str) -> list[str]:
    state = profiled.state_to_json(suites.state())
    return [sys.executable, "-m", profiled.__name__, state, case.name, implementation, f"{SECONDS:g}", *pipes]


def _require_perf() -> None:
    if shutil.which("perf") is None:
        raise UsageError(f"--profile perf: perf is not here: {PERF_INSTALL}")


def _by_perf(case: Case, implementation: str, console: rich.console.Console) -> None:
    """Count, then sample."""
    _watched_by_perf(["stat", "--detailed"], case, implementation, console)
    data = str(_file(case, implementation, ".perf.data"))
    _watched_by_perf(["record", "--output", data], case, implementation, console)
    report = ["perf", "report", "--input", data, "--stdio", "--percent-limit", f"{LEAST_PERCENT:g}"]
    found = subprocess.run(report, capture_output=True, text=True, check=False).stdout
    functions = [line.rstrip() for line in found.splitlines() if line.strip() and not line.startswith("#")]
    console.print("\n".join(functions[:MOST_FUNCTIONS]), highlight=False, markup=False)
    console.print(f"more: perf report --input {shlex.quote(data)}", highlight=False, soft_wrap=True)


def _watched_by_perf(how: list[str], case: Case, implementation: str, console: rich.console.Console) -> None:
    """Run perf around the kernel's process and show what it says; it starts without counting (--delay=-1)."""
    with tempfile.TemporaryDirectory() as folder:
        control, acknowledge = (str(pathlib.Path(folder) / name) for name in ("control", "acknowledge"))
        os.mkfifo(control)
        os.mkfifo(acknowledge)
        watching = ["perf", *how, "--delay=-1", "--control", f"fifo:{control},{acknowledge}", "--"]
        ran = _shown([*watching, *_child(case, implementation, control, acknowledge)], console)
    if ran.returncode:
        raise UsageError(f"--profile perf: {_why_perf_failed(ran.stderr)}")
    told = [line for line in ran.stderr.splitlines() if not line.startswith("Events ")]
    console.print("\n".join(told).strip("\n"), highlight=False, markup=False)


def _why_perf_failed(said: str) -> str:
    if re.search(r"perf_event_paranoid|permission|not permitted|access to performance monitoring", said, re.IGNORECASE):
        return f"perf may not count here: {PERF_PERMIT}"
    if raised := re.search(r"^\w*(Error|Exception|StopIteration|Interrupt)\b.*$", said, re.MULTILINE):
        return f"the kernel's process failed: {raised.group()}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"perf failed: {lines[-1] if lines else 'it said nothing'}"


def _require_ncu() -> None:
    if not torch.cuda.is_available():
        raise UsageError("--profile ncu needs a GPU that torch can use: torch and perf profile the CPU")
    if shutil.which("ncu") is None:
        raise UsageError(f"--profile ncu: ncu is not here: {NCU_INSTALL}")


def _by_ncu(case: Case, implementation: str, console: rich.console.Console) -> None:
    output = _file(case, implementation, ".ncu-rep")
    watching = ["ncu", "--profile-from-start", "off", "--set", "full", "--force-overwrite", "--export", str(output)]
    ran = _shown([*watching, *_child(case, implementation)], console)
    if ran.returncode:
        lines = [line for line in (ran.stdout + ran.stderr).splitlines() if "ERROR" in line] or ["it said nothing"]
        raise UsageError(f"--profile ncu: ncu failed: {lines[0].removeprefix('==ERROR== ')}")
    details = ["ncu", "--import", str(output), "--page", "details"]
    shown = subprocess.run(details, capture_output=True, text=True, check=False)
    console.print(shown.stdout.strip("\n"), highlight=False, markup=False)
    console.print(f"wrote {output}: open it with ncu-ui", highlight=False, soft_wrap=True)


def _shown(command: list[str], console: rich.console.Console) -> subprocess.CompletedProcess:
    """Run a command, and say which. Its process finds the modules that this one does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    console.print(f"[dim]$ {shlex.join(command)}", highlight=False, soft_wrap=True)
    with console.status(f"{command[0]} is watching"):
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
