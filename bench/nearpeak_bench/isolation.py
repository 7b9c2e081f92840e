"""One case at a time in the worker: an implementation that takes its process down costs its own line only.

Whose turn it was when the process was lost says who is at fault. The case runs again without it, so that the others
get their times; where it was nobody's turn, the whole row is lost.
"""

from collections.abc import Callable

from . import runner, suites, worker
from .cases import Case
from .peaks import Peaks
from .results import Measurement, Row


def run_case(
    process: worker.Worker | worker.Here,
    suite: str,
    case: Case,
    settings: runner.Settings,
    peaks: Peaks | None,
    say: Callable[[str], None],
) -> Row:
    """runner.run_case in the process, as often as implementations are lost."""
    lost: dict[str, worker.Lost] = {}
    while True:
        try:
            return process.call(_run, suite, case.name, settings, peaks, lost, say=say)
        except worker.Lost as loss:
            if loss.turn in lost or loss.turn not in case.operator.implementations:
                return _lost_row(suite, case, loss)
            lost[loss.turn] = loss
            say(f"{loss.turn} {loss.status}: again without it")


def _run(watch: worker.Watch, suite: str, name: str, settings, peaks, lost) -> Row:
    return runner.run_case(suite, suites.find(name), settings, peaks, watch, lost)


def _lost_row(suite: str, case: Case, loss: worker.Lost) -> Row:
    measurements = [
        Measurement(name, each.baseline, "", status=loss.status, note=f"outside of any implementation: {loss.note}")
        for name, each in case.operator.implementations.items()
    ]
    return Row(
        suite=suite, case=case.name, operator=case.operator.name, shape=case.shape, dtype=case.dtype_name,
        direction=case.direction, plain_error_mean=None, plain_error_max=None, limit_seconds=None, bound=None,
        measurements=measurements, template=case.operator.shape,
        parameters=dict(case.parameters), threads=case.variant.threads, cold=case.variant.cold,
    )  # fmt: skip
