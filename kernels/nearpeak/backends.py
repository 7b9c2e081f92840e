"""Which backends exist here, why one is missing, which one serves a call, and how a user forces one.

PyTorch's dispatcher does the choosing: every nearpeak operator has one kernel per dispatch key.

    key CPU                         the C++ kernels (backend `cpu`), or Triton's where its interpreter is on
    key CUDA                        the Triton kernels (backend `triton`), or the C++ ones (backend `cuda`) where the
                                    user forces them or Triton is missing; see operators.py
    key CompositeExplicitAutograd   the definition in plain PyTorch (backend `reference`): every other device

This module loads what the machine has, and holds the one override that a user may set.
"""

import contextlib
import ctypes
import importlib.util
import os
import pathlib
from collections.abc import Iterator

import torch

# Backends of the operations that have no CUDA C++ kernel, and of all.
WITHOUT_CUDA = ("cpu", "triton")
NAMES = (*WITHOUT_CUDA, "cuda", "reference")

# Kernels accumulate in float32, so float64 is served by the reference, which keeps it.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_NO_GPU = "no GPU that torch can use"

_forced: str | None = None
_reasons: list[str] | None = None


class _NativeLibrary:
    """The C++ extension: loaded once, with the reason kept where it cannot be."""

    def __init__(self):
        self.handle = None
        self.missing = self._load()

    def _load(self) -> str | None:
        if TRITON_INTERPRETED:
            return "TRITON_INTERPRET=1 gives the CPU to Triton's interpreter in this process: unset it"
        folder = pathlib.Path(__file__).parent
        files = sorted(folder.glob("_native*.so"))
        if not files:
            return "the C++ extension was not built: install a C++17 compiler (g++ or clang++) and reinstall nearpeak"
        try:
            torch.ops.load_library(files[0])
        except OSError as error:
            return f"the C++ extension does not load into torch {torch.__version__}: {error}; reinstall nearpeak"
        self.handle = ctypes.CDLL(str(files[0]))
        for name in ("nearpeak_isa", "nearpeak_isas_built", "nearpeak_isas_supported"):
            getattr(self.handle, name).restype = ctypes.c_char_p
        requested = os.environ.get("NEARPEAK_ISA")
        if requested:
            self.select_isa(requested)
        return None

    def built_for_cuda(self) -> bool:
        return hasattr(self.handle, "nearpeak_cuda_version")

    def names(self, function: str) -> list[str]:
        return getattr(self.handle, function)().decode().split() if self.handle else []

    def select_isa(self, name: str) -> None:
        if self.handle.nearpeak_select_isa(name.encode()) != 0:
            usable = ", ".join(self.names("nearpeak_isas_supported"))
            raise ValueError(f"NEARPEAK_ISA={name!r} cannot run here; this build and processor have: {usable}")


native = _NativeLibrary()


def isa() -> str | None:
    """The instruction set that the C++ kernels run with, or None without the extension."""
    return native.names("nearpeak_isa")[0] if native.handle else None


def isas_built() -> list[str]:
    """Instruction sets that this build of the C++ extension contains, simplest first."""
    return native.names("nearpeak_isas_built")


def isas_supported() -> list[str]:
    """Instruction sets of this build that this processor can run, simplest first."""
    return native.names("nearpeak_isas_supported")


def amd_family() -> int:
    """The family of an AMD processor (25 is Zen 3 and 4, 26 is Zen 5); 0 for others, and without the extension."""
    return native.handle.nearpeak_amd_family() if native.handle else 0


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the C++ kernels with a lower instruction set inside the `with` block (process-wide).

    Raises ValueError where this build or this processor lacks it. The environment variable NEARPEAK_ISA does
    the same for a whole process.

    >>> with nearpeak.use_isa("portable"):
    ...     y = nearpeak.rms_norm(torch.randn(4, 640))
    """
    if native.missing:
        raise RuntimeError(f"there is no instruction set to choose: {native.missing}")
    before = isa()
    native.select_isa(name)
    try:
        yield
    finally:
        native.select_isa(before)


def missing(name: str) -> str | None:
    """Why the backend `name` cannot serve calls on this machine, with the remedy; None if it can."""
    if name == "cpu":
        return native.missing
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        if not TRITON_INTERPRETED and not torch.cuda.is_available():
            return f"{_NO_GPU} (TRITON_INTERPRET=1, set before import, runs it slowly on the CPU)"
        return None
    if name == "cuda":
        if native.missing:
            return native.missing
        if not native.built_for_cuda():
            return (
                "the C++ extension was built without CUDA: install a CUDA build of torch and the CUDA toolkit of the "
                "same major version (nvcc), and reinstall nearpeak"
            )
        return None if torch.cuda.is_available() else _NO_GPU
    if name == "reference":
        return None
    raise ValueError(f"backend must be one of {', '.join(NAMES)}, not {name!r}")


def force(name: str | None) -> None:
    """Serve every call by the backend `name` from now on; None returns to the dispatcher's choice."""
    global _forced
    if name is not None and (reason := missing(name)):
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    _forced = name


def forced(name: str) -> bool:
    """Whether the user forced the backend `name`."""
    return _forced == name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every nearpeak call inside the `with` block by one backend: "cpu", "triton", "cuda" or "reference".

    The override is process-wide. The environment variable NEARPEAK_BACKEND does the same for a whole process.
    Raises ValueError for an unknown name, RuntimeError (with the remedy) where the backend is missing here.

    >>> with nearpeak.use_backend("reference"):
    ...     y = nearpeak.rms_norm(torch.randn(4, 640))
    """
    before = _forced
    force(name)
    try:
        yield
    finally:
        force(before)


def _serving(device: torch.device, kernels: tuple[str, ...]) -> str:
    """The backend that serves an operation on `device`. kernels: the backends that have kernels for it."""
    if device.type == "cpu":
        return "triton" if TRITON_INTERPRETED else "cpu"
    if device.type == "cuda":
        preferred = ("cuda", "triton") if forced("cuda") else ("triton", "cuda")
        return next((name for name in preferred if name in kernels and missing(name) is None), "reference")
    return "reference"


def reference_serves(tensor: torch.Tensor, kernels: tuple[str, ...] = NAMES) -> bool:
    """Whether the plain PyTorch definition serves a call on this tensor.

    kernels: the backends that have kernels for the operation. Raises RuntimeError where the user forced a backend that
    has none or does not serve the tensor's device, and TypeError where it has no kernel for the tensor's dtype.
    """
    if _forced is None:
        if tensor.dtype in KERNEL_DTYPES:
            return False
        because(f"{tensor.dtype} has no kernel: the plain PyTorch reference serves it")
        return True
    if _forced == "reference":
        because("the user forced the backend 'reference'")
        return True
    if _forced not in kernels:
        raise RuntimeError(f"backend {_forced!r} has no kernel for this operation, only {', '.join(kernels)}")
    if tensor.dtype not in KERNEL_DTYPES:
        raise TypeError(f"backend {_forced!r} serves float32, bfloat16 and float16, not {tensor.dtype}")
    if _serving(tensor.device, kernels) != _forced:
        raise RuntimeError(f"backend {_forced!r} does not serve tensors on {tensor.device}")
    return False


def because(reason: str) -> None:
    """Note for `explain` why a call was handed to something other than nearpeak's kernels."""
    if _reasons is not None:
        _reasons.append(reason)


@contextlib.contextmanager
def noting_reasons() -> Iterator[list[str]]:
    """Collect what `because` notes inside the block."""
    global _reasons
    before, _reasons = _reasons, []
    try:
        yield _reasons
    finally:
        _reasons = before


def kernel_name(operator: torch._ops.OpOverload, device: torch.device) -> str:
    """The backend whose kernel the dispatcher runs for `operator` on `device`."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key):
        return "reference"
    name = operator.name().split("::")[1].removesuffix("_inference")
    return _serving(device, NAMES if hasattr(torch.ops.nearpeak_cuda, name) else WITHOUT_CUDA)


# Set but empty means not set, as for NEARPEAK_ISA.
force(os.environ.get("NEARPEAK_BACKEND") or None)
