"""The process that a profiler watches: one kernel of one case, prepared and warmed up before the profiler looks.

    python -m nearpeak_bench.profiled STATE CASE IMPLEMENTATION SECONDS [CONTROL ACKNOWLEDGE]

STATE is suites.State as JSON. With CONTROL and ACKNOWLEDGE, the pipes of `perf --control`, the kernel runs for SECONDS
between "enable" and "disable"; without, it runs once between cudaProfilerStart and cudaProfilerStop.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable

import torch

from . import suites
from .cases import Variant

WARM_UP_CALLS = 3


def state_to_json(state: suites.State) -> str:
    return json.dumps([[str(path) for path in state.files], state.shaped, state.varied])


def state_from_json(text: str) -> suites.State:
    files, shaped, varied = json.loads(text)
    return suites.State([pathlib.Path(path) for path in files], tuple(shaped), tuple(Variant(*each) for each in varied))


def warmed_up(case, implementation: str, device: torch.device) -> Callable[[], object]:
    """The call, after its first ones, which load code and compile."""
    call = case.bind(case.operator.implementations[implementation].prepare, case.inputs(device))
    for _ in range(WARM_UP_CALLS):
        call()
    return call


def between_commands(call: Callable[[], object], seconds: float, control: str, acknowledge: str) -> None:
    """Loop while perf counts: it is told through one pipe, and says in the other that it has heard."""
    with open(control, "w") as commands, open(acknowledge) as answers:

        def tell(command):
            print(command, file=commands, flush=True)
            answers.readline()

        tell("enable")
        calls, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            call()
            calls += 1
        tell("disable")
        print(f"{calls} calls", file=sys.stderr)


def between_marks(call: Callable[[], object]) -> None:
    """Once, on the GPU, within the range that a profiler started with `--profile-from-start off` looks at."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(state: str, case_name: str, implementation: str, seconds: str, *pipes: str) -> None:
    suites.restore(state_from_json(state))
    case = suites.find(case_name)
    with case.in_its_threads():
        call = warmed_up(case, implementation, torch.device("cpu" if pipes else "cuda"))
        if pipes:
            between_commands(call, float(seconds), *pipes)
        else:
            between_marks(call)


if __name__ == "__main__":
    main(*sys.argv[1:])
