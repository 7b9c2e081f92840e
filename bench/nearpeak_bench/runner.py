"""Runs one case: correctness first, then time, then memory."""

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping

import torch
from nearpeak import backends

from . import caches, compiling, timing, verdicts, worker
from .cases import DRAW_SEEDS, FRESH_SEED, SEED, Absent, Case, Implementation, as_tuple
from .exactness import errors, why_inexact, why_inexact_over_draws
from .memory import extra_memory
from .peaks import Peaks
from .results import Measurement, Row

UNWATCHED, NOTHING = worker.Watch(), types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Settings:
    """budget: seconds of timing per case (never fewer than three rounds); noise: the machine's, as a fraction;
    memory: also measure peak memory; cached_compile: also how long torch.compile takes with its files cached."""

    device: torch.device
    budget: float
    noise: float = 0.0
    memory: bool = True
    cached_compile: bool = False


def serving_backend(case: Case, inputs: dict) -> str:
    """Which nearpeak backend serves the case, with its instruction set."""
    tensor = next(t for t in inputs.values() if isinstance(t, torch.Tensor) and t.is_floating_point())  # not ids
    if backends.reference_serves(tensor):
        return "reference"
    operator = getattr(torch.ops.nearpeak, case.operator.kernels[case.direction]).default
    name = backends.kernel_name(operator, tensor.device)
    return f"{name} {backends.isa()}" if name == "cpu" else name


def _worst_errors(results, exact) -> tuple[float, float]:
    """Mean and maximum error, each of the output where it is largest."""
    found = [errors(*pair) for pair in zip(results, exact, strict=True)]
    return max(mean for mean, _ in found), max(maximum for _, maximum in found)


class Examiner:
    """Judges implementations of one case against the truth and the plain layer's error."""

    def __init__(self, case: Case, device: torch.device, seed: int = SEED):
        self.case, self.device, self.inputs = case, device, case.inputs(device, seed)
        self.exact = case.truth(self.inputs)
        self.plain = case.plain(self.inputs)
        self.plain_errors = _worst_errors(self.plain, self.exact)

    def examine(self, implementation: Implementation, measurement: Measurement) -> Callable[[], object] | None:
        """Run once, note errors and verdict in `measurement`, and return the call if its time counts."""
        try:
            with compiling.watched() as tally:
                call = self.case.bind(implementation.prepare, self.inputs)
                result = as_tuple(call())
        except ModuleNotFoundError as error:
            measurement.status, measurement.note = "absent", f"{error.name} is not installed"
            return None
        except Absent as error:
            measurement.status, measurement.note = "absent", str(error)
            return None
        except Exception as error:
            measurement.status, measurement.note = "failed", worker.describe(error)
            return None
        tally.note(measurement)
        if not implementation.same_result:
            return call
        reason = self._why_wrong(implementation, result, measurement)
        if reason and implementation.baseline:
            # It is what users have, so its time counts; that it is less exact is said.
            measurement.note = f"less exact than the plain layer: {reason}"
        elif reason:
            measurement.status, measurement.note = "wrong", reason
            return None
        return call

    def _why_wrong(self, implementation: Implementation, result, measurement: Measurement) -> str | None:
        shapes, expected = ([tuple(t.shape) for t in tensors] for tensors in (result, self.exact))
        if shapes != expected:
            return f"shapes {shapes}, expected {expected}"
        dtypes, expected = ([t.dtype for t in tensors] for tensors in (result, self.plain))
        if dtypes != expected:
            return f"dtypes {dtypes}, expected {expected}"
        measurement.error_mean, measurement.error_max = _worst_errors(result, self.exact)
        reason = why_inexact(result, self.plain, self.exact)
        # A baseline is only told about, and draws take long.
        return reason if implementation.baseline else reason and self._why_wrong_over_draws(implementation, result)

    def _why_wrong_over_draws(self, implementation: Implementation, result) -> str | None:
        draws = [(result, self.plain, self.exact)]
        for seed in DRAW_SEEDS:
            inputs = self.case.inputs(self.device, seed)
            result = as_tuple(self.case.bind(implementation.prepare, inputs)())
            draws.append((result, self.case.plain(inputs), self.case.truth(inputs)))
        stacked = (tuple(map(torch.stack, zip(*each, strict=True))) for each in zip(*draws, strict=True))
        return why_inexact_over_draws(*stacked)


def run_case(
    suite: str,
    case: Case,
    settings: Settings,
    peaks: Peaks | None,
    watch: worker.Watch = UNWATCHED,
    lost: Mapping[str, worker.Lost] = NOTHING,
) -> Row:
    """Everything a row holds but its command; `watch` is told what is done next. lost: implementations that took an
    earlier attempt's process down, and how: they are not run."""
    with case.in_its_threads():
        return _run_case(suite, case, settings, peaks, watch, lost)


def _run_case(suite: str, case: Case, settings: Settings, peaks: Peaks | None, watch, lost) -> Row:
    implementations = case.operator.implementations
    if any(each.compiled for each in implementations.values()):
        # Dynamo keeps a few shapes per function and then runs it uncompiled without a word: start each case afresh.
        torch.compiler.reset()
    watch.say("truth in float64")
    examiner = Examiner(case, settings.device)
    measurements = _measurements(implementations, serving_backend(case, examiner.inputs), lost)
    calls = _checked(examiner, {name: implementations[name] for name in measurements if name not in lost},
                     measurements, watch)  # fmt: skip
    plain_errors = examiner.plain_errors
    del examiner
    watch.say("timing")
    pairs = _pairs(measurements, calls)
    clock = timing.clock_of(settings.device)
    evict = caches.evictor(settings.device) if case.variant.cold else None
    samples = timing.time_interleaved(calls, settings.budget, clock, pairs=pairs, turn=watch.turn, evict=evict)
    calls.clear()
    watch.say("checking again, on fresh inputs")
    _examine_again(case, settings.device, {candidate: measurements[candidate] for _, candidate in pairs}, watch)
    timed = [name for name in samples if measurements[name].status == "ok"]
    work = case.work()
    limit, bound = peaks.limit(work, case.dtype, case.variant.cold) if work and peaks else (None, None)
    for name in timed:
        _fill_in(measurements[name], samples, limit)
        if settings.memory:
            watch.say(f"memory of {name}")
            watch.turn(name)
            measurements[name].extra_memory = extra_memory(case, implementations[name], settings.device)
    if settings.cached_compile:
        _compile_again(case, settings.device, [measurements[name] for name in timed], watch)
    for baseline, candidate in _pairs(measurements, timed):
        seconds = (measurements[name].samples.seconds for name in (baseline, candidate))
        measurements[candidate].ratios[baseline] = verdicts.ratio(*seconds, noise=settings.noise)
    return Row(
        suite=suite, case=case.name, operator=case.operator.name, shape=case.shape, dtype=case.dtype_name,
        direction=case.direction, plain_error_mean=plain_errors[0], plain_error_max=plain_errors[1],
        limit_seconds=limit, bound=bound, measurements=list(measurements.values()),
        flops=work and work.flops, bytes=work and (work.read + work.written) * case.dtype.itemsize,
        template=case.operator.shape, parameters=dict(case.parameters), threads=case.variant.threads,
        cold=case.variant.cold,
    )  # fmt: skip


def _measurements(implementations: Mapping[str, Implementation], backend: str, lost) -> dict[str, Measurement]:
    found = {}
    for name, each in implementations.items():
        found[name] = Measurement(name, each.baseline, "" if each.baseline else backend)
        if name in lost:
            found[name].status, found[name].note = lost[name].status, lost[name].note
    return found


def _checked(examiner, implementations: Mapping[str, Implementation], measurements, watch) -> dict[str, Callable]:
    """The calls whose time counts."""
    calls = {}
    for name, implementation in implementations.items():
        watch.say(f"checking {name}")
        watch.turn(name)
        if call := examiner.examine(implementation, measurements[name]):
            calls[name] = call
    watch.turn("")
    return calls


def _pairs(measurements: dict[str, Measurement], timed: Iterable[str]) -> list[tuple[str, str]]:
    """Every baseline with every candidate."""
    timed = list(timed)
    candidates = [name for name in timed if not measurements[name].baseline]
    return [(name, candidate) for candidate in candidates for name in timed if measurements[name].baseline]


def _examine_again(case: Case, device: torch.device, candidates: dict[str, Measurement], watch) -> None:
    """A kernel may answer from memory, or tire: what was timed must be right on inputs that it has not seen, too."""
    watch.turn("")
    examiner = Examiner(case, device, FRESH_SEED)
    for name, measurement in candidates.items():
        watch.turn(name)
        again = Measurement(name, baseline=False, backend="")
        examiner.examine(case.operator.implementations[name], again)
        if again.status != "ok":
            measurement.status, measurement.note = again.status, f"after timing, on fresh inputs: {again.note}"


def _compile_again(case: Case, device: torch.device, timed: list[Measurement], watch) -> None:
    """How long torch.compile takes with its files cached; last, since what was compiled is forgotten."""
    for measurement in timed:
        implementation = case.operator.implementations[measurement.implementation]
        if implementation.compiled:
            watch.say(f"compile time of {measurement.implementation}")
            watch.turn(measurement.implementation)
            compiling.again(case, implementation, case.inputs(device)).note(measurement)


def _fill_in(measurement: Measurement, samples: dict[str, timing.Samples], limit: float | None) -> None:
    measurement.samples = samples[measurement.implementation]
    measurement.spread = verdicts.spread(measurement.samples.seconds)
    remarks = verdicts.remarks(measurement.samples.seconds)
    measurement.note = "; ".join(filter(None, (measurement.note, remarks)))
    if limit is not None:
        measurement.share = limit / measurement.spread.median
