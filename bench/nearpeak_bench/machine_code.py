"""What the compilers make of our Triton kernels, read off the machine code of every target; no GPU is needed.

`python -m nearpeak_bench.machine_code` prints the whole table: registers, spilled bytes, shared memory, matrix
instructions, and the widest loads and stores. The launchers themselves choose what is compiled: they are called with
tensors that have no memory, and their launches become compilations, so that what is checked is what runs.
"""

import contextlib
import itertools
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
import triton
from nearpeak import triton_launch
from nearpeak.attention import triton_attention
from nearpeak.feedforward import reference as feedforward
from nearpeak.feedforward import triton_feedforward
from nearpeak.norm import triton_norm
from nearpeak.rotary import triton_rotary
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class Target(NamedTuple):
    name: str
    compiler: GPUTarget
    device: triton_launch.Device
    shared_limit: int  # bytes of shared memory that one program may use
    matrix: str  # the matrix instruction of 16-bit types


# Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 whitepaper.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), triton_launch.Device(80, 108), 163 * 1024, r"HMMA"),
        Target("sm_86", GPUTarget("cuda", 86, 32), triton_launch.Device(86, 84), 99 * 1024, r"HMMA"),
        Target("sm_89", GPUTarget("cuda", 89, 32), triton_launch.Device(89, 128), 99 * 1024, r"HMMA"),
        Target("sm_90", GPUTarget("cuda", 90, 32), triton_launch.Device(90, 132), 227 * 1024, r"HGMMA|HMMA"),
        Target("sm_100", GPUTarget("cuda", 100, 32), triton_launch.Device(100, 148), 227 * 1024, r"UTC\w*MMA|HMMA"),
        Target("sm_120", GPUTarget("cuda", 120, 32), triton_launch.Device(120, 170), 99 * 1024, r"HMMA"),
        Target(
            "gfx942", GPUTarget("hip", "gfx942", 64), triton_launch.Device("gfx942", 304, 64), 64 * 1024, r"v_mfma\w*"
        ),
    )
}


class Case(NamedTuple):
    """One call of a launcher, on tensors without memory."""

    name: str
    launch: Callable[[], object]
    wide: bool = False  # whether its kernels must load and store 16 bytes at once
    matrix: bool = False  # whether it must use matrix instructions


class Code(NamedTuple):
    """What one compiled kernel takes."""

    case: Case
    target: Target
    kernel: str
    warps: int
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    instructions: int
    matrix: int
    load: int  # bytes of the widest access to global memory
    store: int


class _CompilingDriver:
    """Stands for the GPU: all that Triton asks of it before it has a kernel."""

    def __init__(self, target: Target):
        self.target = target

    def get_current_device(self):
        return self.target.name  # Triton keeps its compiled kernels by device

    def get_current_target(self):
        return self.target.compiler

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def _compiling_for(target: Target) -> Iterator[list]:
    """Inside, every launch compiles its kernel for `target` instead, and adds it to the list."""
    compiled = []
    run = JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **options):
        compiled.append(run(kernel, *arguments, grid=grid, warmup=True, **options))

    with (
        mock.patch.object(driver, "_active", _CompilingDriver(target)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(triton_launch, "describe", return_value=target.device),
    ):
        yield compiled


def compile_case(case: Case, target: Target) -> list[Code]:
    """Compile what `case` launches for `target`, and read the machine code."""
    with _compiling_for(target) as compiled:
        case.launch()
    read = _read_amd if target.compiler.backend == "hip" else _read_nvidia
    return [
        Code(case, target, kernel.metadata.name, kernel.metadata.num_warps, **read(kernel, target))
        for kernel in compiled
    ]


def tool(name: str) -> str:
    """Path of one of the NVIDIA programs that Triton's wheel carries."""
    return str(pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_nvidia(kernel, target) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(tool("cuobjdump"), "--dump-resource-usage", file.name)
        code = _run(tool("nvdisasm"), "-c", "-novliw", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = nvidia_instructions(code)
    return {
        "registers": numbers["REG"],
        "spilled": numbers["STACK"] + numbers["LOCAL"],
        "shared": kernel.metadata.shared,
        "instructions": len(instructions),
        "matrix": sum(bool(re.match(target.matrix, name)) for name in instructions),
        "load": max(map(nvidia_bytes, filter(re.compile(r"LDG\b|LDGSTS|UTMALDG").match, instructions)), default=0),
        "store": max(map(nvidia_bytes, filter(re.compile(r"STG").match, instructions)), default=0),
    }


def nvidia_instructions(code: str) -> list[str]:
    """The names of the instructions in what nvdisasm prints."""
    return re.findall(r"^\s+(?:/\*\w+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]+).*;", code, re.MULTILINE)


def nvidia_bytes(instruction: str) -> int:
    """LDG.E.128 and STG.E.U16 name their bits; without any they move 32."""
    bits = re.search(r"\.[US]?(8|16|64|128|256)\b", instruction)
    return int(bits.group(1)) // 8 if bits else 4


def _read_amd(kernel, target) -> dict:
    code = kernel.asm["amdgcn"]
    instructions = re.findall(r"^\t((?:[vs]_|global_|buffer_|ds_|flat_|scratch_)\w+)", code, re.MULTILINE)
    loads = [name for name in instructions if re.match(r"(global|buffer)_load", name)]
    stores = [name for name in instructions if re.match(r"(global|buffer)_store", name)]

    def metadata(key):
        return int(re.search(rf"\.{key}:\s+(\d+)", code).group(1))

    return {
        "registers": metadata("vgpr_count"),
        "spilled": metadata("private_segment_fixed_size"),
        "shared": kernel.metadata.shared,
        "instructions": len(instructions),
        "matrix": sum(bool(re.match(target.matrix, name)) for name in instructions),
        "load": max(map(_amd_bytes, loads), default=0),
        "store": max(map(_amd_bytes, stores), default=0),
    }


def _amd_bytes(instruction: str) -> int:
    """global_load_dwordx4 moves four 32-bit words, buffer_store_short two bytes."""
    if words := re.search(r"dwordx?(\d?)", instruction):
        return 4 * int(words.group(1) or 1)
    return 1 if "byte" in instruction else 2


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def norm_case(width: int, dtype: torch.dtype, direction: str, layer: str = "rms_norm", rows: int = 8192) -> Case:
    """direction: "forward", "add" (with a residual) or "backward"; layer: "rms_norm" or "layer_norm"."""
    x, weight = _empty(rows, width, dtype=dtype), _empty(width, dtype=dtype)
    launch = {
        "rms_norm": {
            "forward": lambda: triton_norm.rms_norm(x, weight, 1e-6, 0.0),
            "add": lambda: triton_norm.add_rms_norm(x, x, weight, 1e-6, 1.0),
            "backward": lambda: triton_norm.rms_norm_backward(x, x, weight, x, 1e-6, 1.0),
        },
        "layer_norm": {
            "forward": lambda: triton_norm.layer_norm(x, weight, weight, 1e-5),
            "add": lambda: triton_norm.add_layer_norm(x, x, weight, weight, 1e-5),
            "backward": lambda: triton_norm.layer_norm_backward(x, x, weight, weight, x, 1e-5),
        },
    }[layer][direction]
    wide = width * dtype.itemsize % triton_launch.WIDEST_ACCESS == 0
    return Case(f"{layer} {direction} {width} {_name(dtype)}", launch, wide=wide)


def rotary_case(head_dim: int, dtype: torch.dtype, interleaved: bool, length: int = 2048) -> Case:
    query, key = _empty(1, 32, length, head_dim, dtype=dtype), _empty(1, 8, length, head_dim, dtype=dtype)
    table = _empty(1, length, head_dim // 2, dtype=torch.float32)
    pairs = "interleaved" if interleaved else "halves"
    # The pairs of one position alone are fewer than 16 bytes for each thread of a warp.
    wide = length > 1 and head_dim // 2 * dtype.itemsize % triton_launch.WIDEST_ACCESS == 0
    return Case(
        f"rotary {pairs} {head_dim} {_name(dtype)} {length} positions",
        lambda: triton_rotary.apply_rotary(query, key, table, table, interleaved, False),
        wide=wide,
    )


def feedforward_case(width: int, dtype: torch.dtype, name: str, direction: str) -> Case:
    """direction: "forward" or "backward", of one packed tensor of gate and up."""
    packed, grad, kind = (
        _empty(512, 2 * width, dtype=dtype),
        _empty(512, width, dtype=dtype),
        feedforward.NAMES.index(name),
    )
    launch = {
        "forward": lambda: triton_feedforward.packed_gated_activation(packed, kind, False),
        "backward": lambda: triton_feedforward.packed_gated_activation_backward(grad, packed, kind, False),
    }[direction]
    wide = width * dtype.itemsize % triton_launch.WIDEST_ACCESS == 0
    return Case(f"feedforward {name} {direction} {width} {_name(dtype)}", launch, wide=wide)


def _options(window, softcap) -> str:
    """What differs from a causal call."""
    return "".join((f" window {window}" if window != (None, 0) else "", f" softcap {softcap}" if softcap else ""))


def attention_case(
    head_dim: int, dtype: torch.dtype, length: int = 4096, window=(None, 0), softcap=None, group: int = 4
) -> Case:
    """Causal by default; length 1 is decoding, with split keys and their merge."""
    query = _empty(1, 32, length, head_dim, dtype=dtype)
    key = _empty(1, 32 // group, 4096, head_dim, dtype=dtype)
    return Case(
        f"attention {head_dim} {_name(dtype)} {length} queries{_options(window, softcap)}",
        lambda: triton_attention.attention(query, key, key, *window, head_dim**-0.5, softcap),
        matrix=dtype.itemsize == 2,
    )


def attention_backward_case(
    head_dim: int, dtype: torch.dtype, window=(None, 0), softcap=None, group: int = 4, length: int = 4096
) -> Case:
    """Causal by default."""
    query, lse = _empty(1, 32, length, head_dim, dtype=dtype), _empty(1, 32, length, dtype=torch.float32)
    key = _empty(1, 32 // group, length, head_dim, dtype=dtype)
    return Case(
        f"attention backward {head_dim} {_name(dtype)} group {group}{_options(window, softcap)}",
        lambda: triton_attention.attention_backward(
            query, lse, query, key, key, query, lse, *window, head_dim**-0.5, softcap
        ),
        matrix=dtype.itemsize == 2,
    )


def every_case() -> list[Case]:
    """Every kernel, at widths on both sides of each decision of the launchers."""
    single, bfloat = torch.float32, torch.bfloat16
    norms = [
        norm_case(width, dtype, direction, layer)
        for layer in ("rms_norm", "layer_norm")
        for direction in ("forward", "add", "backward")
        for dtype in (bfloat, single)
        for width in (64, 640, 4096, 8192, 16384, 32768, 65536)
    ]
    rotaries = [
        rotary_case(head_dim, dtype, interleaved, length)
        for interleaved in (False, True)
        for dtype in (bfloat, single)
        for head_dim in (64, 128, 256)
        for length in (2048, 1)
    ]
    options = {"window": ((None, None), (None, 0), (512, 0)), "softcap": (None, 50.0)}
    attentions = [
        attention_case(head_dim, dtype, length, window, softcap)
        for dtype in (bfloat, single)
        for head_dim in (64, 128, 256)
        for window, softcap in itertools.product(*options.values())
        for length in (4096, 1)
    ]
    backwards = [
        attention_backward_case(head_dim, dtype, window, softcap)
        for dtype in (bfloat, single)
        for head_dim in (64, 128, 256)
        for window, softcap in itertools.product(*options.values())
    ]
    feedforwards = [
        feedforward_case(width, dtype, name, direction)
        for name in ("gelu", "silu")
        for direction in ("forward", "backward")
        for dtype in (bfloat, single)
        for width in (14336, 2050)
    ]
    half = torch.float16
    odd = [norm_case(4096, half, "backward"), rotary_case(128, half, False)]
    odd += [attention_case(head_dim, half) for head_dim in (16, 32, 80, 96, 128)]
    odd += [attention_backward_case(head_dim, half) for head_dim in (16, 80)]
    odd += [attention_backward_case(128, bfloat, group=group) for group in (1, 7)]
    return norms + rotaries + feedforwards + attentions + backwards + odd


TABLE_WIDTH = 150  # characters, where the terminal has fewer or there is none


def table(codes: list[Code]) -> Table:
    table = Table(title="Machine code of the Triton kernels (spilled bytes in bold are a fault)")
    columns = (
        "case",
        "kernel",
        "target",
        "warps",
        "registers",
        "spilled",
        "shared",
        "instructions",
        "matrix",
        "load",
        "store",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    for code in codes:
        spilled = f"[bold red]{code.spilled}" if code.spilled else "0"
        numbers = (code.shared, code.instructions, code.matrix, code.load, code.store)
        table.add_row(
            code.case.name,
            code.kernel,
            code.target.name,
            str(code.warps),
            str(code.registers),
            spilled,
            *map(str, numbers),
        )
    return table


def main() -> None:
    console = Console(width=max(Console().width, TABLE_WIDTH))
    pairs = [(case, target) for case in every_case() for target in TARGETS.values()]
    progress = track(pairs, "compiling", console=Console(stderr=True))
    console.print(table([code for case, target in progress for code in compile_case(case, target)]))


if __name__ == "__main__":
    main()
