"""The cases of `nearpeak bench` under pytest-benchmark: `pytest bench/ -k rms_norm`.

Implementations of one case form a group; each is judged for exactness before it is timed. Ratios measured in
interleaved rounds are `nearpeak bench`'s own: here the implementations run one after the other.
"""

import functools

import pytest
import torch
from nearpeak_bench import runner, suites
from nearpeak_bench.results import Measurement

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)
def examiner_of(case):
    """The truth of a case, kept for its next implementation."""
    torch.compiler.reset()
    return runner.Examiner(case, DEVICE)


def _parameters():
    for _, case in suites.select(suites.SUITES):
        for name in case.operator.implementations:
            yield pytest.param(case, name, id=f"{case.name}-{name.replace(' ', '-')}")


@pytest.mark.parametrize(("case", "name"), list(_parameters()))
def test_speed(case, name, benchmark):
    implementation = case.operator.implementations[name]
    measurement = Measurement(name, implementation.baseline, backend="")
    call = examiner_of(case).examine(implementation, measurement)
    if measurement.status == "absent":
        pytest.skip(measurement.note)
    assert call is not None, f"{measurement.status}: {measurement.note}"
    benchmark.group = case.name
    benchmark.extra_info.update(error_mean=measurement.error_mean, error_max=measurement.error_max)
    if DEVICE.type == "cuda":
        benchmark(lambda: (call(), torch.cuda.synchronize()))
    else:
        benchmark(call)
