"""What each architecture has: the limits that decide occupancy, and the rates that decide cycles.

Sources, by letter:
  G  CUDA C++ Programming Guide: "Compute Capabilities" (technical specifications) and "Throughput of Native Arithmetic
     Instructions" (results a clock and multiprocessor)
  W  NVIDIA's architecture whitepapers (A100, GA102, Ada, H100, Blackwell, RTX Blackwell) and the boards' data sheets:
     dense matrix rate = peak rate / (multiprocessors x boost clock), rounded to the power of two that it means
  N  Nsight Compute documentation, "Pipelines": which instructions share a pipe
  A  AMD CDNA 3 whitepaper and instruction set guide; ROCm Compute Profiler documentation, "Compute unit"
Boards for gaming (RTX 4090, RTX 5090) multiply 16-bit numbers at half rate where they accumulate in float32 (W).
"""

from typing import NamedTuple

from nearpeak import triton_launch
from triton.backends.compiler import GPUTarget


class Limits(NamedTuple):
    """What the programs on one processor share."""

    registers: int  # 32-bit, of all threads
    warps: int
    programs: int
    shared: int  # bytes
    reserved: int = 0  # bytes of shared memory that the system takes for each program
    tensor_memory: int = 0  # columns


class Rates(NamedTuple):
    """What one processor does in a clock."""

    issue: int  # warps' instructions
    threads: dict[str, int]  # threads' instructions, by class (pipes.py)
    matrix: dict[str, int]  # floating-point or integer operations, by the kind of operands (shapes.py)
    bytes: dict[str, int]  # by data path
    memory: float  # bytes, this processor's share of the board's memory


class Target(NamedTuple):
    name: str
    board: str  # whose clock, memory and number of processors are meant
    compiler: GPUTarget
    device: triton_launch.Device
    limits: Limits
    rates: Rates

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that one program may use."""
        return self.limits.shared - self.limits.reserved


KIB = 1024


def _matrix(half: int, *, narrow: int, double: int, half_accumulator: int | None = None, integer: int | None = None):
    """half: 16-bit operands, float32 sums; narrow: 8-bit ones. TensorFloat-32 runs at half the rate of 16 bits (W)."""
    return {
        "16-bit": half,
        "16-bit, 16-bit sums": half_accumulator or half,
        "tf32": half // 2,
        "8-bit": narrow,
        "int8": integer or narrow,
        "float64": double,
    }


def _nvidia(name, board, processors, limits, floats, halves, doubles, matrix, bandwidth, clock) -> Target:
    """floats, halves, doubles: threads' instructions a clock (G); bandwidth in GB/s and clock in GHz (W)."""
    architecture = int(name.removeprefix("sm_"))
    threads = {
        "float": floats,
        "packed float": floats // 2,
        "integer multiply": 64,
        "alu": 64,
        "special": 16,
        "half": halves,
        "double": doubles,
    }
    memory = bandwidth / processors / clock
    # Four schedulers issue an instruction each; shared memory and L1 have one path of 32 banks of 4 bytes (G).
    rates = Rates(4, threads, matrix, {"lsu": 128}, memory)
    device = triton_launch.Device(architecture, processors)
    return Target(name, board, GPUTarget("cuda", architecture, 32), device, limits, rates)


def _nvidia_limits(warps, programs, shared, tensor_memory=0) -> Limits:
    return Limits(65536, warps, programs, shared * KIB, KIB, tensor_memory)


# A workgroup of several waves counts among at most 16; a SIMD has 512 registers of 64 lanes and 8 waves (A).
_CDNA3_LIMITS = Limits(registers=4 * 512 * 64, warps=32, programs=16, shared=64 * KIB)
_CDNA3_RATES = Rates(
    issue=5,
    threads={"vector": 64, "transcendental": 16, "scalar": 64},
    matrix={"16-bit": 2048, "tf32": 1024, "8-bit": 4096, "int8": 4096, "float32": 256, "float64": 256},
    bytes={"lds": 128, "vmem": 64},
    memory=5300 / 304 / 2.1,
)

TARGETS = {
    target.name: target
    for target in (
        _nvidia("sm_80", "A100 80 GB SXM", 108, _nvidia_limits(64, 32, 164), 64, 128, 32,
                _matrix(2048, narrow=4096, double=128), 2039, 1.41),
        _nvidia("sm_86", "RTX A6000", 84, _nvidia_limits(48, 16, 100), 128, 64, 2,
                _matrix(1024, narrow=2048, double=4), 768, 1.8),
        _nvidia("sm_89", "RTX 4090", 128, _nvidia_limits(48, 24, 100), 128, 64, 2,
                _matrix(512, half_accumulator=1024, narrow=1024, integer=2048, double=4), 1008, 2.52),
        _nvidia("sm_90", "H100 SXM", 132, _nvidia_limits(64, 32, 228), 128, 128, 64,
                _matrix(4096, narrow=8192, double=256), 3352, 1.83),
        _nvidia("sm_100", "B200", 148, _nvidia_limits(64, 32, 228, tensor_memory=512), 128, 128, 64,
                _matrix(8192, narrow=16384, double=128), 8000, 1.85),
        _nvidia("sm_120", "RTX 5090", 170, _nvidia_limits(48, 24, 100), 128, 64, 2,
                _matrix(512, half_accumulator=1024, narrow=1024, integer=2048, double=4), 1792, 2.41),
        Target("gfx942", "MI300X", GPUTarget("hip", "gfx942", 64), triton_launch.Device("gfx942", 304, 64),
               _CDNA3_LIMITS, _CDNA3_RATES),
    )
}  # fmt: skip
