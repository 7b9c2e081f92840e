"""How long one iteration of a loop keeps each pipe of a processor busy, and the bound that follows.

    cycles of a pipe = sum over its instructions of (warps x threads of a warp / threads' instructions a clock)

and for matrix products operations / rate, for data paths bytes / width. No iteration can be faster than its busiest
pipe, whatever else overlaps; latencies and stalls come on top. Both sides of a branch inside of the loop are counted.

Global memory is held apart: what one program reads, caches may serve. `cached` is the share of its traffic that they
have to serve for the pipes to be the bound.
"""

import collections
import dataclasses

from .instructions import ISSUE, MATRIX, OTHER, Instruction
from .targets import Target

# Instructions of these classes run on the same units.
PIPES = {
    "float": "fma",
    "packed float": "fma",
    "integer multiply": "fma",
    "special": "xu",
    "double": "fp64",
    "half": "half",
    "alu": "alu",
    "vector": "valu",
    "transcendental": "valu",
    "scalar": "salu",
}
NAMES = (MATRIX, "fma", "alu", "xu", "half", "fp64", "lsu", "valu", "salu", "lds", "vmem", ISSUE)


def pipe_of(instruction: Instruction) -> str:
    """The pipe that an instruction runs on, or OTHER."""
    group = instruction.use.group
    return PIPES.get(group, group)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One iteration of the hottest loop by one program; of a kernel without a loop, the whole program."""

    looped: bool
    instructions: int  # of a warp
    mix: dict[str, int]  # instructions by operation, most frequent first
    counts: dict[str, int]  # instructions by pipe
    cycles: dict[str, float]  # of one processor, by pipe
    flops: int  # of matrix products
    loaded: int  # bytes of global memory
    stored: int
    memory_cycles: float  # of the processor's share of the board's bandwidth
    bound: str  # the busiest pipe
    bound_cycles: float
    cached: float  # the share of the traffic that caches must serve for `bound` to be the bound
    unknown: int  # instructions whose size is not in the code, which are not counted


def estimate(instructions: list[Instruction], looped: bool, target: Target, warps: int) -> Estimate:
    """What `instructions`, an iteration or a whole program, ask of one processor."""
    rates, lanes = target.rates, target.device.lanes
    cycles: dict[str, float] = collections.defaultdict(float)
    for each in instructions:
        use, times = each.use, 1 if each.use.once else warps
        cycles[ISSUE] += times / rates.issue
        if use.group in rates.threads:
            cycles[PIPES[use.group]] += times * lanes / rates.threads[use.group]
        if use.flops:
            cycles[MATRIX] += times * use.flops / rates.matrix[use.kind]
        if use.path:
            cycles[use.path] += times * use.moved / rates.bytes[use.path]

    def total(of) -> int:
        return sum(of(each.use) * (1 if each.use.once else warps) for each in instructions)

    loaded, stored = total(lambda use: use.loaded), total(lambda use: use.stored)
    memory_cycles = (loaded + stored) / rates.memory
    bound = max(cycles, key=cycles.get)
    counts = collections.Counter(pipe_of(each) for each in instructions)
    return Estimate(
        looped=looped,
        instructions=len(instructions),
        mix=dict(collections.Counter(each.stem for each in instructions).most_common()),
        counts={name: counts[name] for name in (*NAMES, OTHER) if counts[name]},
        cycles={name: cycles[name] for name in NAMES if cycles[name]},
        flops=total(lambda use: use.flops),
        loaded=loaded,
        stored=stored,
        memory_cycles=memory_cycles,
        bound=bound,
        bound_cycles=cycles[bound],
        cached=max(0.0, 1 - cycles[bound] / memory_cycles) if memory_cycles else 0.0,
        unknown=sum(each.use.unknown for each in instructions),
    )
