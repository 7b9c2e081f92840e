"""Builds the CUDA kernels for the host, where csrc/cuda/emulation.h runs their blocks, and puts them under the CPU key.

So the very source that runs on a GPU is judged like every other kernel, through the public functions.
"""

import contextlib
import os
import pathlib
import runpy
import shutil
import subprocess

import torch
from torch.utils import cpp_extension

ROOT = pathlib.Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++")
CUDA_SOURCES = runpy.run_path(str(ROOT / "setup.py"))["cuda_sources"]()
SOURCES = [ROOT / "csrc/cpu/tensors.cpp", *(source for source in CUDA_SOURCES if source.name != "version.cpp")]
# The operators that each kernel serves.
OPERATORS = {
    "rms_norm": ("rms_norm", "rms_norm_inference"),
    "add_rms_norm": ("add_rms_norm", "add_rms_norm_inference"),
    "rms_norm_out": ("rms_norm_out",),
    "rms_norm_backward": ("rms_norm_backward",),
    "apply_rotary": ("apply_rotary", "apply_rotary_inference"),
    "apply_rotary_": ("apply_rotary_",),
}


def build(folder):
    """Compile the library into `folder` and return its path. NEARPEAK_SANITIZE names sanitizers, as for setup.py."""
    library = folder / "libnearpeak_emulated.so"
    sanitizers = os.environ.get("NEARPEAK_SANITIZE")
    command = [COMPILER, "-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
    # Packs are read from memory of other types, as CUDA's compiler lets them.
    command += ["-fno-strict-aliasing", "-DNEARPEAK_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g1"] if sanitizers else []
    command += [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    command += [str(source) for source in SOURCES] + ["-o", str(library)]
    command += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run(command, check=True, env=environment)
    return library


@contextlib.contextmanager
def serving():
    """Serve nearpeak's calls on CPU tensors by the emulated kernels inside the block."""
    with torch.library._scoped_library("nearpeak", "IMPL") as library:
        for kernel, names in OPERATORS.items():
            for name in names:
                library.impl(name, getattr(torch.ops.nearpeak_cuda, kernel).default, "CPU", allow_override=True)
        yield
