"""How every family defines its operators: once, in PyTorch's dispatcher.

An operator that computes a gradient formula exists twice under one definition:

    nearpeak::name             with the gradient formula; the door takes it where a gradient is wanted
    nearpeak::name_inference   without; Python's gradient machinery costs 3 us a call even where no input needs
                               a gradient, twice the cost of everything else in a small call

Both run the same kernels. The C++ extension registers its kernels for the key CPU by itself as it loads.

Every kernel checks its arguments before it runs: those in Python by the family's `check`, which names what is wrong;
the C++ ones by themselves, in a tenth of the time. Only where a `check`, for its words.

A key of the dispatcher holds one kernel, and two backends serve CUDA devices. So the CUDA C++ kernels are operators of
their own, nearpeak_cuda::name, which the extension registers as it loads; what the key CUDA holds calls them or
Triton's launcher. The choice is made when a call runs: a backend forced later holds for compiled graphs too.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch._functorch.utils import enable_single_level_autograd_function

from . import backends

library = torch.library.Library("nearpeak", "DEF")
cuda_library = torch.library.Library("nearpeak_cuda", "DEF")


def define(
    schema: str,
    *,
    check: Callable,
    reference: Callable,
    shapes: Callable,
    triton: Callable | None = None,
    cuda: bool = False,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Define one operator with everything PyTorch wants to know of it.

    schema: the operator's signature in PyTorch's schema language, without the namespace
    check: takes the operator's arguments, and raises what names the one that does not fit
    reference: the definition in plain PyTorch, which serves every device that has no kernel
    shapes: makes empty outputs of the right shape, for torch.compile and torch.export
    triton: launcher of the Triton kernel
    cuda: whether there is a CUDA C++ kernel
    backward, setup_context: the gradient formula, as torch.library.register_autograd takes them
    """
    name, signature = schema.split("(", 1)
    names = [name] if backward is None else [name, f"{name}_inference"]

    def checked(kernel):
        @functools.wraps(kernel)
        def run(*arguments):
            check(*arguments)
            return kernel(*arguments)

        return run

    gpu_kernel = _gpu_kernel(schema, triton, cuda)
    for each in names:
        library.define(f"{each}({signature}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(each, checked(reference), "CompositeExplicitAutograd")
        if gpu_kernel is not None:
            library.impl(each, checked(gpu_kernel), "CPU" if backends.TRITON_INTERPRETED else "CUDA")
        torch.library.register_fake(f"nearpeak::{each}", checked(shapes), lib=library)
    if backward is None:
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        return
    library.impl(f"{name}_inference", torch.library.fallthrough_kernel, "Autograd")
    library.impl(name, _recorded(name, backward, setup_context), "Autograd")


def _recorded(name: str, backward: Callable, setup_context: Callable) -> Callable:
    """What runs an operator where autograd may record it.

    As torch.library.register_autograd would have it, which looks up every default, builds two objects and dispatches
    a second time from Python: 46 us for a small rms_norm that takes 27 with this.
    """
    operator = getattr(torch.ops.nearpeak, name).default
    defaults = tuple(argument.default_value for argument in operator._schema.arguments)

    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*inputs)
        setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    recorded = type(f"nearpeak_{name}", (torch.autograd.Function,), members)
    recorded_once = type(f"nearpeak_{name}", (torch.autograd.function._SingleLevelFunction,), members)

    def run(*arguments):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            # The dispatcher drops trailing arguments that have their default.
            inputs = *arguments, *defaults[len(arguments) :]
            if torch._C._are_functorch_transforms_active():
                # torch.func calls once for each of its transforms; here for one that records gradients.
                with enable_single_level_autograd_function():
                    return recorded_once.apply(*inputs)
            return recorded.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return run


def _gpu_kernel(schema: str, triton: Callable | None, cuda: bool) -> Callable | None:
    """What serves an operator on CUDA devices: Triton's kernel, or the C++ one where that is forced or alone."""
    cuda_kernel = None
    if cuda:
        name = cuda_library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        cuda_library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        if backends.missing("cuda") is None:
            cuda_kernel = getattr(torch.ops.nearpeak_cuda, name).default
    if triton is None or backends.missing("triton") is not None:
        return cuda_kernel
    if cuda_kernel is None:
        return triton
    return lambda *arguments: (cuda_kernel if backends.forced("cuda") else triton)(*arguments)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on tensors of `dtype`: float64 keeps its own, all others take float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype of the arithmetic."""
    return tensor.to(accumulation_dtype(tensor.dtype))


def empty_laid_out_like(like: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """An empty dense tensor of like's shape (the last dimension `width`, if given) and dtype.

    Its outer dimensions lie in memory in the order of like's strides, largest outermost, its last is innermost: so
    that heads transposed on the way in come out transposed, and the way back is free. The C++ kernels follow the same
    rule (csrc/cpu/tensors.h).
    """
    *outer, last = like.shape
    sizes = [*outer, last if width is None else width]
    order = sorted(range(len(outer)), key=lambda dim: like.stride(dim), reverse=True)
    strides, stride = [1] * len(sizes), 1
    for dim in [len(outer), *reversed(order)]:
        strides[dim] = stride
        stride = stride * max(1, sizes[dim])
    return torch.empty_strided(sizes, strides, dtype=like.dtype, device=like.device)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record a call on these tensors."""
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return torch.is_grad_enabled()
    return False


def autocasts(x: torch.Tensor) -> bool:
    """Whether torch.autocast is on for x's device."""
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    return x.is_cuda and torch.is_autocast_enabled("cuda")


def autocast(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """As torch.autocast treats the arguments of its own function, wherever the kernels would not see it."""
    if tensor is None or tensor.dtype is torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Keep autocast away from a definition's matrix products, which it would do in its own dtype."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else contextlib.nullcontext()


def mark_written(*tensors: torch.Tensor | None) -> None:
    """Tell autograd that a kernel wrote into these tensors, as PyTorch's own in-place operators do."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if t is not None])
