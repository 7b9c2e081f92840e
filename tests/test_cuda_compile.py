"""Every CUDA kernel compiles for every target without a GPU, and its machine code is what it should be."""

import pathlib
import re
import runpy
import shutil
import subprocess
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton's wheel carries the disassembler")

from nearpeak_bench.inspect import sass
from nearpeak_bench.inspect.code import tool

ROOT = pathlib.Path(__file__).parent.parent
BUILD = runpy.run_path(str(ROOT / "setup.py"))
SOURCES = [source for source in BUILD["cuda_sources"]() if source.suffix == ".cu"]
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no CUDA compiler (nvcc)")

# The others run before a release.
QUICK = ("90", "100")
TARGETS = [pytest.param(t, id=f"sm_{t}", marks=() if t in QUICK else pytest.mark.slow) for t in BUILD["CUDA_TARGETS"]]


class Kernel(NamedTuple):
    name: str
    stack: int  # bytes of a thread that are not in registers
    instructions: list[str]

    def accesses(self, kind: str) -> set[int]:
        """Bytes of its accesses to global memory; kind: "LDG" or "STG"."""
        return {sass.access_bytes(name) for name in self.instructions if name.startswith(kind)}

    def vector(self) -> int:
        """Elements of a pack: the first number among the template's arguments; 1 for kernels without."""
        return int(next(iter(re.findall(r"[<, ](\d+)[,>]", self.name)), 1))


def compiled(source, target, folder) -> list[Kernel]:
    cubin = folder / "kernels.cubin"
    run(NVCC, *BUILD["NVCC_FLAGS"], "-cubin", f"-arch=sm_{target}", str(source), "-o", str(cubin))
    usage = run(tool("cuobjdump"), "--dump-resource-usage", str(cubin))
    stacks = {
        name: int(stack) + int(local)
        for name, stack, local in re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", usage)
    }
    sections = re.split(r"^\.text\.(\w+):$", run(tool("nvdisasm"), "-c", "-novliw", str(cubin)), flags=re.MULTILINE)
    names = run("c++filt", *sections[1::2]).splitlines()
    return [
        Kernel(name, stacks[mangled], [each.name for each in sass.parse(code)])
        for name, mangled, code in zip(names, sections[1::2], sections[2::2], strict=True)
    ]


def run(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.parent.name)
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(source, target, tmp_path):
    kernels = compiled(source, target, tmp_path)
    assert any(kernel.vector() > 1 for kernel in kernels)
    for kernel in kernels:
        assert kernel.stack == 0, f"{kernel.name} keeps {kernel.stack} bytes outside registers"
        assert not [name for name in kernel.instructions if name.startswith(("LDL", "STL"))], kernel.name
        if kernel.vector() > 1:
            assert max(kernel.accesses("LDG")) == 16, f"{kernel.name} loads {kernel.accesses('LDG')} bytes"
            # This one stores two numbers a row.
            if "backward_row_sums" not in kernel.name:
                assert max(kernel.accesses("STG")) == 16, f"{kernel.name} stores {kernel.accesses('STG')} bytes"
