"""`explain`: which kernels serve a call on this machine, and why.

The call runs on fake tensors, which have shapes, dtypes and devices but no data, under a mode that sees every
operator on its way through PyTorch's dispatcher. So nothing is computed, nothing is changed, and nothing has to be
registered anywhere for a call to be explained.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from . import backends

# SDPA's plain formula is taken apart before the dispatcher shows it; this operator occurs in nothing else.
_SDPA_MATH = "_safe_softmax"


def explain(function: Callable, *args, **kwargs) -> str:
    """Say which nearpeak operators a call runs, on which backend, and which calls go elsewhere and why.

    Args:
        function: anything that can be called: a nearpeak function, a module, a whole patched model.
        args, kwargs: its arguments, which are left as they are.

    Returns:
        text: a line per kind of operator in the order in which they first run, then why calls went elsewhere.

    What a function decides by its tensors' values cannot be followed, since there are none here: such a call is
    explained up to there, and a padding mask given to a transformers model is taken to hide something.

    >>> x = torch.randn(4, 640)
    >>> print(nearpeak.explain(nearpeak.rms_norm, x, torch.ones(640)))
    nearpeak::rms_norm_inference on cpu, float32: C++ kernel, instruction set avx2
    """
    recorder = _Recorder()
    stopped = None
    with backends.noting_reasons() as reasons, _without_data() as fake:
        call, arguments, named = (fake(each) for each in (function, args, kwargs))
        try:
            with recorder:
                call(*arguments, **named)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            stopped = f"stops here: the function reads values of tensors ({error.func}), which only a real call has"
    lines = [_times(count) + line for line, count in (recorder.lines + Counter(reasons)).items()]
    lines += recorder.missing
    if not lines:
        lines = ["no nearpeak operator and no scaled_dot_product_attention runs in this call"]
    return "\n".join([*lines, stopped] if stopped else lines)


def _times(count: int) -> str:
    return f"{count} x " if count > 1 else ""


@contextlib.contextmanager
def _without_data() -> Iterator[Callable]:
    """Run the block on fake tensors; gives the function that makes a fake copy of anything."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(thing):
        try:
            with FakeCopyMode(mode):
                return copy.deepcopy(thing)
        except (TypeError, RuntimeError):  # locks, generators and the like refuse to be copied
            return thing

    with torch.compiler.set_stance("force_eager"), mode:
        yield fake


class _Recorder(TorchDispatchMode):
    """Counts what the nearpeak operators and PyTorch's attention that run have to say."""

    def __init__(self):
        super().__init__()
        self.lines = Counter()
        self.missing = []  # why the reference served a device that has kernels, said once

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        namespace, name = operator.name().split("::")
        line = _line(operator, namespace, name.split(".")[0], args)
        if line is not None:
            self.lines[line] += 1
        if namespace == "nearpeak" and (reason := _missing(operator, _first(args))) not in (None, *self.missing):
            self.missing.append(reason)
        return operator(*args, **(kwargs or {}))


def _line(operator, namespace, name, args) -> str | None:
    if namespace == "aten" and (name.startswith("_scaled_dot_product") or name == _SDPA_MATH):
        what = "torch's scaled_dot_product_attention"
        how = "its plain formula" if name == _SDPA_MATH else f"its kernel {name}"
        return f"{what} on {_where(args)}: {how}"
    if namespace != "nearpeak":
        return None
    return f"nearpeak::{name} on {_where(args)}: {_kernel(operator, _first(args).device)}{_gradient(name)}"


def _first(args) -> torch.Tensor:
    """The first tensor of numbers, not of their places, if there is one."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    return next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0])


def _where(args) -> str:
    tensor = _first(args)
    return f"{tensor.device}, {str(tensor.dtype).removeprefix('torch.')}"


def _kernel(operator, device) -> str:
    kernel = backends.kernel_name(operator, device)
    if kernel == "cpu":
        return f"C++ kernel, instruction set {backends.isa()}"
    if kernel == "triton":
        return "Triton kernel" + (" in Triton's interpreter" if backends.TRITON_INTERPRETED else "")
    return "CUDA C++ kernel" if kernel == "cuda" else "plain PyTorch reference"


def _missing(operator, tensor) -> str | None:
    """Why the backend that has kernels for the tensor's device did not serve it, or None where one did."""
    backend = {"cpu": "cpu", "cuda": "triton"}.get(tensor.device.type)
    if backend is None or backends.kernel_name(operator, tensor.device) != "reference":
        return None
    reason = backends.missing(backend)
    return f"the reference serves {tensor.device.type} here because {reason}" if reason else None


def _gradient(name: str) -> str:
    """Whether the operator was taken that records for autograd: it has a sibling for inference."""
    records = not name.endswith("_inference") and hasattr(torch.ops.nearpeak, f"{name}_inference")
    return ", recorded for gradients" if records else ""
