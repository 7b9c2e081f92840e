"""`nearpeak check`: is every operator exact here, in every dtype, on every backend and instruction set of this machine?

Each operator runs on small odd shapes (check_cases.py), forward and with its gradients, on several draws; what
torch.empty returns is filled with NaN before. Its results are judged by the rule of exactness.py: against the
definition in float64, held to what the plain PyTorch layer errs in the same dtype.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

import nearpeak
import rich.console
import rich.progress
import torch
from nearpeak import backends

from . import table, worker
from .cases import OPERATORS, Case, Operator, as_tuple
from .check_cases import SHAPES
from .exactness import errors, why_inexact_over_draws
from .exits import CRASHED, WRONG, UsageError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Errors are judged over this many draws together: of few elements one kernel rounds some worse by chance.
DRAWS = 8
# Its backward is attention's own, on many more keys.
REPEATED = {("attention_decode", "training")}
# Builds for tests hold instruction sets that the processor lacks, emulated: they say nothing of this machine.
EMULATED = "emulated"
EXPLANATION = (
    "Figures: mean error over the plain PyTorch layer's, both against float64, the worst of float32, bfloat16 and "
    f"float16. Up to 1.1 passes (largest error: 1.5), plus one unit in the last place; {DRAWS} draws each."
)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One operator in one direction and dtype on one serving: mean error over the plain layer's, None where the plain
    layer makes none; reason: why it is not exact, or nothing."""

    dtype: str
    serving: str
    ratio: float | None
    reason: str = ""


def servings() -> dict[str, tuple[str, Callable]]:
    """By name: the device, and what forces every call inside of it onto that backend."""

    def cpu(isa):
        @contextlib.contextmanager
        def forced():
            with nearpeak.use_backend("cpu"), nearpeak.use_isa(isa):
                yield

        return forced

    @contextlib.contextmanager
    def reference():
        with nearpeak.use_backend("reference"), _in_one_thread():
            yield

    found = {"reference": ("cpu", reference)}
    if not backends.missing("cpu"):
        found |= {f"cpu {isa}": ("cpu", cpu(isa)) for isa in backends.isas_supported() if EMULATED not in isa}
    for name in ("triton", "cuda"):
        if torch.cuda.is_available() and not backends.missing(name):
            found[name] = ("cuda", lambda name=name: nearpeak.use_backend(name))
    return found


def subjects(pattern: str = "") -> list[tuple[Operator, str]]:
    """(operator, direction) pairs whose name holds the pattern; an operator of several variants is there once."""
    found = {}
    for operator in OPERATORS:
        for direction in operator.kernels:
            if (operator.name, direction) in REPEATED:
                continue
            if operator.name in SHAPES and pattern in f"{operator.name} {direction}":
                found.setdefault((operator.name, direction), operator)
    return [(operator, direction) for (_, direction), operator in found.items()]


def judge(watch: worker.Watch, name: str, direction: str, left_out: frozenset[str] = frozenset()) -> list[Judgement]:
    """All dtypes and servings of one operator."""
    operator = next(operator for operator, each in subjects(name) if (operator.name, each) == (name, direction))
    found = []
    # What torch.empty returns is NaN then: an element that a kernel forgets to write shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for dtype in DTYPES:
        cases = [Case(operator, shape, dtype, direction) for shape in SHAPES[name]]
        for device in sorted({device for device, _ in servings().values()}):
            watch.turn("")
            with _in_one_thread():
                standards = [Standard(case, torch.device(device)) for case in cases]
            for serving, (where, forced) in servings().items():
                if where == device and serving not in left_out:
                    watch.turn(serving)
                    with forced():
                        found.append(_judged(standards, dtype, serving))
    torch.use_deterministic_algorithms(False)
    return found


@contextlib.contextmanager
def _in_one_thread() -> Iterator[None]:
    """For plain PyTorch on small tensors: threads that wait for each other took 17 times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _sleeping_threads() -> Iterator[None]:
    """In processes that start meanwhile, threads that wait sleep instead of turning in circles.

    Nothing is timed here, and on two cores that others used too the whole check took 17 s so, 85 s without.
    """
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = before or "passive"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_WAIT_POLICY"]


class Standard:
    """One case's inputs over all draws, their exact results, and the plain layer's."""

    def __init__(self, case: Case, device: torch.device, draws: int = DRAWS):
        self.case = case
        self.draws = [case.inputs(device, seed) for seed in range(draws)]
        with nearpeak.use_backend("reference"):
            self.exact = _stacked(case.truth(inputs) for inputs in self.draws)
        self.plain = _stacked(case.plain(inputs) for inputs in self.draws)

    def ours(self) -> tuple[torch.Tensor, ...]:
        prepare = self.case.operator.implementations["nearpeak"].prepare
        return _stacked(as_tuple(self.case.bind(prepare, inputs)()) for inputs in self.draws)


def _stacked(results: Iterator[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.stack, zip(*results, strict=True)))


def _judged(standards: list[Standard], dtype: torch.dtype, serving: str) -> Judgement:
    ratios, short = [], table.SHORT_DTYPES[str(dtype).removeprefix("torch.")]
    for standard in standards:
        try:
            mine = standard.ours()
            reason = why_inexact_over_draws(mine, standard.plain, standard.exact)
        except Exception as error:
            reason = worker.describe(error)
        if reason:
            return Judgement(short, serving, None, f"{standard.case.shape}: {reason}")
        for own, plain, exact in zip(mine, standard.plain, standard.exact, strict=True):
            if (error := errors(plain, exact)[0]) > 0:
                ratios.append(errors(own, exact)[0] / error)
    return Judgement(short, serving, max(ratios, default=None))


def run(pattern: str, isolate: bool, time_limit: float, console: rich.console.Console) -> int:
    """Show the table, and return the exit code (exits.py)."""
    chosen = subjects(pattern)
    if not chosen:
        raise UsageError(f"no operator's name holds {pattern!r}: {', '.join(SHAPES)}")
    rows, lost_any = [], False
    process = worker.Worker(worker.Limits(time_limit)) if isolate else worker.Here()
    with _sleeping_threads(), process:
        for operator, direction in rich.progress.track(chosen, "checking", console=console, transient=True):
            found, lost = _survey(process, operator.name, direction)
            lost_any |= bool(lost)
            rows.append(_line(operator.name, direction, found, lost))
    names = list(servings())
    console.print(table.to_rich(table.Table("exactness", ["operator", "direction", *names], rows), console))
    console.print(f"[dim]{EXPLANATION}")
    for name in backends.NAMES:
        if reason := backends.missing(name):
            console.print(f"[yellow]not checked here:[/] backend {name}: {reason}", highlight=False)
    bad = sum(line.mark == "bad" for line in rows)
    style = "red" if bad else "green"
    console.print(f"[{style}]{len(rows) - bad} of {len(rows)} are exact on {', '.join(names)}")
    if lost_any:
        return CRASHED
    return WRONG if bad else 0


def _survey(process, name: str, direction: str) -> tuple[list[Judgement], dict[str, worker.Lost]]:
    """All judgements, and the servings that took the process down."""
    lost: dict[str, worker.Lost] = {}
    while True:
        try:
            return process.call(judge, name, direction, frozenset(lost)), lost
        except worker.Lost as loss:
            if loss.turn in lost or not loss.turn:
                return [], dict.fromkeys(servings(), loss)
            lost[loss.turn] = loss


def _line(name: str, direction: str, found: list[Judgement], lost: dict[str, worker.Lost]) -> table.Line:
    cells, notes = [], []
    for serving in servings():
        here = [each for each in found if each.serving == serving]
        wrong = [each for each in here if each.reason]
        notes += [f"{serving}, {each.dtype}: {each.reason}" for each in wrong]
        if serving in lost:
            cells.append(lost[serving].status.upper())
            notes.append(f"{serving}: {lost[serving].note}")
        elif wrong:
            cells.append(f"{' '.join(each.dtype for each in wrong)} WRONG")
        else:
            worst = max((each.ratio for each in here if each.ratio is not None), default=None)
            cells.append("exact" if worst is None else f"{worst:.2f}")
    mark = "bad" if notes else "fine"
    return table.Line([name, direction, *cells], mark, "; ".join(notes))
