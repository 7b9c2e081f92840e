"""How many programs of a kernel fit on one processor at the same time, and what keeps more from fitting.

Registers are dealt out to whole warps, on NVIDIA as on AMD in steps of 8 a thread, each quarter of the processor having
its own: CUDA Occupancy Calculator (in Nsight Compute); CDNA 3 instruction set guide, "VGPR allocation".
"""

from typing import NamedTuple

from .targets import Target

REGISTER_STEP, QUARTERS, SHARED_STEP = 8, 4, 128


class Occupancy(NamedTuple):
    programs: int  # on one processor; 0: one alone does not fit
    share: float  # of the warps that the processor has room for
    limiter: str


def occupancy(target: Target, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> Occupancy:
    """warps of a program, registers of a thread, bytes of shared memory and columns of tensor memory of a program."""
    limits = target.limits
    of_a_warp = _rounded_up(max(registers, 1), REGISTER_STEP) * target.device.lanes
    with_registers = limits.registers // QUARTERS // of_a_warp * QUARTERS
    fits = {"warps": limits.warps // warps, "programs": limits.programs, "registers": with_registers // warps}
    if shared:
        fits["shared memory"] = limits.shared // (_rounded_up(shared, SHARED_STEP) + limits.reserved)
    if tensor_memory and limits.tensor_memory:
        fits["tensor memory"] = limits.tensor_memory // tensor_memory
    limiter = min(fits, key=fits.get)
    return Occupancy(fits[limiter], fits[limiter] * warps / limits.warps, limiter)


def _rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step
