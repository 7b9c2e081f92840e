"""What this machine is: processor, GPU, compilers and versions, for `nearpeak info` and for results of benchmarks."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess

import torch

from . import backends
from .version import __version__

# Processor features that decide which kernels can run, as /proc/cpuinfo spells them.
FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip


def _cpuinfo() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return file.read()
    except OSError:
        return ""


def processor() -> str:
    """The processor's name."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def features() -> list[str]:
    """Those of FEATURES that the processor has."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    present = found.group(1).split() if found else []
    return [name for name in FEATURES if name in present]


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Main memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def gpus() -> list[str]:
    """Name and compute capability of every GPU that torch can use."""
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties]


def nvcc() -> str | None:
    """The CUDA compiler's version, or None without one."""
    path = shutil.which("nvcc")
    if path is None:
        return None
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release ([\d.]+)", output)
    return f"{found.group(1)} ({path})" if found else path


def versions() -> dict[str, str | None]:
    """Versions of nearpeak and of what it stands on; None for what is not installed."""
    found: dict[str, str | None] = {"nearpeak": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe() -> dict:
    """Everything above as one JSON-able dict."""
    return {
        "processor": processor(),
        "features": features(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "isa": backends.isa(),
        "gpus": gpus(),
        "platform": platform.platform(),
        "versions": versions(),
    }
