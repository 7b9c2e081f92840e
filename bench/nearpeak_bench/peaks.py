"""What the hardware can do, measured at the start of a run: the limit that every row is held against.

    limit of a call = max(flops / peak multiply-add rate of the dtype, traffic / bandwidth)

Bandwidth is measured at several footprints, because caches are faster than memory, and a row is held against the
footprint nearest to its own. A smaller one gets at least a larger one's rate: the busier the machine, the less of a
short measurement is left. Each peak is the best that anything here reaches: the C++ extension's loops, or
PyTorch's matmul, copy and sum.
"""

import ctypes
import dataclasses
import math
from collections.abc import Callable

import torch
from nearpeak import backends

from .cases import Work
from .timing import best_seconds, clock_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FOOTPRINTS = tuple(2**power for power in (15, 17, 19, 21, 23, 25, 26, 27, 28))
MATMUL_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Operations per second by dtype name; bytes/s by footprint in bytes, a copy counting what it reads and writes."""

    multiply_add: dict[str, float]
    copy: dict[int, float]
    read: dict[int, float]

    def limit(self, work: Work, dtype: torch.dtype, cold: bool = False) -> tuple[float, str]:
        """The least seconds that `work` can take here, and what binds it: "compute" or "memory". cold: it finds nothing
        in a cache, so that memory's bandwidth holds however few its bytes are."""
        compute = work.flops / self.multiply_add[work.arithmetic or _name(dtype)]
        read, written = work.read * dtype.itemsize, work.written * dtype.itemsize
        # As much is read as is written at the rate of a copy, and what is read beyond that at the rate of reading.
        copied = 2 * min(read, written)
        rest = read + written - copied
        footprint = max(self.copy) if cold else read + written
        memory = copied / _nearest(self.copy, footprint) + rest / _nearest(self.read, footprint)
        return max((compute, "compute"), (memory, "memory"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _nearest(rates: dict[int, float], footprint: float) -> float:
    return rates[min(rates, key=lambda size: abs(math.log(size / max(footprint, 1))))]


def _native(name: str, argument: object, kind: type) -> float:
    """What the extension's function measures; 0 without the extension or the function."""
    try:
        function = getattr(backends.native.handle, name)
    except AttributeError:
        return 0.0
    function.restype, function.argtypes = ctypes.c_double, [kind]
    return function(argument)


def _native_multiply_add(name: str) -> float:
    return _native("nearpeak_peak_multiply_add", name.encode(), ctypes.c_char_p)


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of torch.matmul, on matrices that grow until one product takes long enough to be typical."""
    clock, size = clock_of(device), 128
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = best_seconds(lambda a=a, b=b, out=out: torch.matmul(a, b, out=out), clock, samples=3)
        if seconds > MATMUL_SECONDS or size == 8192:
            return 2 * size**3 / seconds
        size *= 2


def _bandwidth(footprint: int, device: torch.device) -> tuple[float, float]:
    """(copy, read) in bytes/s by PyTorch, the data being `footprint` bytes altogether."""
    clock = clock_of(device)
    data = torch.ones(footprint // 4, device=device)
    source, target = data.chunk(2)
    copy = footprint / best_seconds(lambda: target.copy_(source), clock)
    return copy, footprint / best_seconds(lambda: data.sum(), clock)


def _never_below_larger(rates: dict[int, float]) -> dict[int, float]:
    """Each footprint's rate, or a larger one's where that is higher."""
    return {footprint: max(rates[other] for other in rates if other >= footprint) for footprint in rates}


def measure(device: torch.device, progress: Callable[[str], None] = lambda what: None) -> Peaks:
    """Measure all peaks; `progress` is told what is measured next."""
    on_cpu = device.type == "cpu"
    multiply_add, copy, read = {}, {}, {}
    for dtype in DTYPES:
        progress(f"peak multiply-add rate, {_name(dtype)}")
        native = _native_multiply_add(_name(dtype)) if on_cpu else 0.0
        multiply_add[_name(dtype)] = max(native, _matmul_rate(dtype, device))
    # Narrow types can always be widened, so their peak is float32's at least, even where torch's matmul is naive.
    multiply_add = {name: max(rate, multiply_add["float32"]) for name, rate in multiply_add.items()}
    multiply_add["int8"] = max(*multiply_add.values(), _native_multiply_add("int8") if on_cpu else 0.0)
    for footprint in FOOTPRINTS:
        progress(f"bandwidth at {footprint // 1024} KiB")
        copy[footprint], read[footprint] = _bandwidth(footprint, device)
        if on_cpu:
            native_copy = _native("nearpeak_peak_copy", footprint // 2, ctypes.c_int64)
            native_read = _native("nearpeak_peak_read", footprint, ctypes.c_int64)
            copy[footprint], read[footprint] = max(copy[footprint], native_copy), max(read[footprint], native_read)
    return Peaks(multiply_add, _never_below_larger(copy), _never_below_larger(read))
