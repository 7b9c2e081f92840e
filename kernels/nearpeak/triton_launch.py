"""What the Triton launchers of every family ask: which device a tensor is on, and how wide a memory access may be."""

import contextlib
import functools
import math
from typing import NamedTuple

import torch

WIDEST_ACCESS = 16  # bytes that one thread can load or store at once, on NVIDIA as on AMD

# A multiply and an add become one instruction, rounded once. Stated, since Triton's default changes with its versions.
OPTIONS = {"enable_fp_fusion": True}


class Device(NamedTuple):
    """What tile sizes depend on."""

    architecture: int | str  # 80, 86, 89, 90, 100, 120 (NVIDIA's compute capability) or AMD's name, as "gfx942"
    processors: int  # streaming multiprocessors, or compute units
    lanes: int = 32  # threads of a warp

    def options(self, threads: int) -> dict:
        """Triton's options for a program of so many threads."""
        return {"num_warps": max(1, threads // self.lanes), **OPTIONS}


# Stands for the CPU in Triton's interpreter: few processors, so that small inputs take the paths of large ones.
INTERPRETED = Device(architecture=80, processors=4)


@functools.cache
def describe(device: torch.device) -> Device:
    """What tile sizes depend on, of a device."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(properties.gcnArchName.split(":")[0], properties.multi_processor_count, properties.warp_size)
    return Device(properties.major * 10 + properties.minor, properties.multi_processor_count)


def on(device: torch.device):
    """A context in which Triton launches on `device`: it launches on the current one, whatever the tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def vector_length(itemsize: int, *extents: int) -> int:
    """How many neighbouring elements one access may take: a power of two that divides every width and stride.

    Kernels get widths and strides in units of it, so that the compiler knows what divides them whatever their value,
    and a new width or stride compiles nothing anew. (Triton by itself only tells multiples of 16 apart.)
    """
    return math.gcd(WIDEST_ACCESS // itemsize, *extents)
