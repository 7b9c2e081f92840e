"""One kernel, compiled for one target: what it takes, how many programs fit, and what its hottest loop costs."""

import dataclasses
import pathlib
import re
import subprocess
import tempfile

import triton

from . import amdgcn, loops, pipes, sass
from .compiling import Case, Compiled, compile_launches
from .instructions import MATRIX, Instruction
from .occupancy import Occupancy, occupancy
from .targets import Target


@dataclasses.dataclass(frozen=True)
class Listing:
    """The machine code itself, and the indices of its hottest loop."""

    instructions: list[Instruction]
    hot: list[int]


@dataclasses.dataclass(frozen=True)
class Code:
    """What one compiled kernel takes. launch: which of its case's launches; configuration: the autotuner's, if any."""

    case: str
    target: str
    kernel: str
    launch: int
    configuration: str
    warps: int
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    instructions: int
    matrix: int  # instructions
    load: int  # bytes of the widest access to global memory
    store: int
    occupancy: Occupancy
    loop: pipes.Estimate
    listing: Listing | None = None  # of one that was compiled here, not read from a file

    @property
    def key(self) -> tuple:
        """What names it in two runs."""
        return self.case, self.target, self.launch, self.configuration

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.configuration}".strip()

    @property
    def fits(self) -> bool:
        """Whether one program alone can run on the target."""
        return self.occupancy.programs > 0


def compile_case(case: Case, target: Target) -> list[Code]:
    """Compile what `case` launches for `target`, and read the machine code."""
    return [_read(case, target, index, each) for index, each in enumerate(compile_launches(case, target))]


def _read(case: Case, target: Target, launch: int, compiled: Compiled) -> Code:
    kernel = compiled.kernel
    read = _read_amd if target.compiler.backend == "hip" else _read_nvidia
    instructions, registers, spilled = read(kernel)
    hot = loops.hottest(instructions)
    iteration = [instructions[index] for index in hot] or instructions
    metadata = kernel.metadata
    tensor_memory = getattr(metadata, "tmem_size", 0)
    uses = [each.use for each in instructions]
    return Code(
        case=case.name,
        target=target.name,
        kernel=metadata.name,
        launch=launch,
        configuration=compiled.configuration,
        warps=metadata.num_warps,
        registers=registers,
        spilled=spilled,
        shared=metadata.shared,
        instructions=len(instructions),
        matrix=sum(use.group == MATRIX for use in uses),
        load=max((use.width for use in uses if use.loaded), default=0),
        store=max((use.width for use in uses if use.stored), default=0),
        occupancy=occupancy(target, metadata.num_warps, registers, metadata.shared, tensor_memory),
        loop=pipes.estimate(iteration, bool(hot), target, metadata.num_warps),
        listing=Listing(instructions, hot),
    )


def tool(name: str) -> str:
    """Path of one of the NVIDIA programs that Triton's wheel carries."""
    return str(pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_nvidia(kernel) -> tuple[list[Instruction], int, int]:
    """Instructions, registers and spilled bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(tool("cuobjdump"), "--dump-resource-usage", file.name)
        code = _run(tool("nvdisasm"), "-c", "-novliw", "-g", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return sass.parse(code), numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def _read_amd(kernel) -> tuple[list[Instruction], int, int]:
    code = kernel.asm["amdgcn"]

    def metadata(key):
        return int(re.search(rf"\.{key}:\s+(\d+)", code).group(1))

    return amdgcn.parse(code), metadata("vgpr_count"), metadata("private_segment_fixed_size")
