"""How long compiling takes: the first call of torch.compile's code, or of a Triton kernel, with all that precedes it.

    cold      nothing of it lay in the compiler's cache on disk
    cached    its files did; what remains is tracing and loading, which every new process pays

Which of both a first call was, the compilers tell: Inductor counts what its cache had and had not, Triton tells a
listener. Of torch.compile the cached time is measured too where it is asked for, after the timing: it takes a second or
more a row.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator

import torch

from .cases import Case, Implementation
from .results import Measurement


@dataclasses.dataclass
class Tally:
    """seconds: of a first call; compiled, loaded: how many graphs and kernels the caches on disk lacked, and had."""

    seconds: float = 0.0
    compiled: int = 0
    loaded: int = 0

    def note(self, measurement: Measurement) -> None:
        """Keep the time, if anything was compiled, as what it is."""
        if self.compiled:
            measurement.compile_cold = self.seconds
        elif self.loaded:
            measurement.compile_cached = self.seconds


@contextlib.contextmanager
def watched() -> Iterator[Tally]:
    """Counts, and when it ends tells, what was compiled within."""
    tally, (hits, misses) = Tally(), _inductor_counts()
    with _listening_to_triton(tally):
        start = time.perf_counter()
        yield tally
        tally.seconds = time.perf_counter() - start
    hits_now, misses_now = _inductor_counts()
    tally.loaded += hits_now - hits
    tally.compiled += misses_now - misses


def again(case: Case, implementation: Implementation, inputs: dict) -> Tally:
    """The first call once more, with its files in the cache. What the process has compiled is forgotten."""
    torch.compiler.reset()
    with watched() as tally:
        case.bind(implementation.prepare, inputs)()
    return tally


def _inductor_counts() -> tuple[int, int]:
    """Hits and misses of its cache so far."""
    if "torch._dynamo.utils" not in sys.modules:
        # It takes seconds to import, and nothing was compiled without it.
        return 0, 0
    counters = torch._dynamo.utils.counters["inductor"]
    return counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"]


@contextlib.contextmanager
def _listening_to_triton(tally: Tally) -> Iterator[None]:
    triton = sys.modules.get("triton")
    if triton is None:
        yield
        return
    before = triton.knobs.compilation.listener

    def listen(*, cache_hit, **others):
        if cache_hit:
            tally.loaded += 1
        else:
            tally.compiled += 1
        if before:
            before(cache_hit=cache_hit, **others)

    triton.knobs.compilation.listener = listen
    try:
        yield
    finally:
        triton.knobs.compilation.listener = before
