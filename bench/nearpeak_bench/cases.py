"""What a benchmark is made of, as data.

    Operator         one operation: how inputs are made, what the right result is, what the work costs, who does it
    Implementation   one way to compute it, ours or a baseline: prepare(**inputs) gives the call that is timed
    Case             one operator at one shape, in one dtype, in one direction: "forward", "backward", or "training",
                     which is both in one call

An operator and its implementations are written like this (see norm.py):

    rms_norm = Operator("rms_norm", shape="{rows}x{width}", inputs=..., reference=..., plain=..., work=...)

    @rms_norm.implementation("nearpeak")
    def _(x, weight):
        return lambda: nearpeak.rms_norm(x, weight)
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

# Of the inputs that are timed, and of those on which candidates are checked again afterwards.
SEED, FRESH_SEED = 0, 100
# Of a few elements one layer rounds some better by chance: then so many draws are judged together (exactness.py).
DRAW_SEEDS = range(101, 109)


class Absent(Exception):
    """Raised by a prepare function: this machine, or this case, is not one that the implementation serves, and why."""


# Every operator that was made, in its order.
OPERATORS: list["Operator"] = []


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that one call must do: operations, elements read and elements written.

    arithmetic: what the operations are on, if not the case's dtype: "int8"
    """

    flops: float
    read: float
    written: float
    arithmetic: str | None = None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """prepare(**inputs) does what is not timed (masks, buffers, compilation) and returns the call that is timed.

    baseline: what users have today, which ours is held against
    compiled: torch.compile makes it, which takes seconds before the first call
    same_result: it computes the operator's result (False for a yardstick such as torch.relu)
    """

    name: str
    prepare: Callable[..., Callable[[], Any]]
    baseline: bool = False
    compiled: bool = False
    same_result: bool = True


@dataclasses.dataclass(eq=False)
class Operator:
    """One operation.

    shape: template that names a case's parameters for people
    inputs: inputs(random, **parameters) gives the keyword arguments of everything below; random(*shape) gives a
        normally distributed tensor in the case's dtype
    reference: the definition; its result on the inputs in float64 is the truth
    plain: the plain PyTorch layer, whose error is the measure for others' errors
    work: for every direction that is benchmarked, a function of the parameters that gives Work
    kernels: for the same directions, or those that only `nearpeak check` runs, the torch operator that serves ours, to
        say by which backend; "" where plain PyTorch does
    differentiable: the inputs whose gradients "backward" and "training" compute
    inplace: results are written into the inputs, so each implementation gets inputs of its own
    """

    name: str
    shape: str
    inputs: Callable[..., dict[str, Any]]
    reference: Callable[..., Any]
    plain: Callable[..., Any]
    work: Mapping[str, Callable[..., Work]]
    kernels: Mapping[str, str]
    differentiable: tuple[str, ...] = ()
    inplace: bool = False
    implementations: dict[str, Implementation] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        OPERATORS.append(self)

    def implementation(self, name: str, **options) -> Callable:
        """Decorator that registers a `prepare` function; options are Implementation's fields."""

        def register(prepare):
            self.implementations[name] = Implementation(name, prepare, **options)
            return prepare

        return register


class Variant(NamedTuple):
    """How a case was made of another (variants.py). base: that one's name; sweep: "S=256", or empty; threads: None for
    as many as PyTorch takes; cold: its data are in no cache when a sample begins."""

    base: str = ""
    sweep: str = ""
    threads: int | None = None
    cold: bool = False


UNVARIED = Variant()


def conditions(threads: int | None, cold: bool) -> str:
    """What a shape ends in."""
    counted = f" {threads} thread{'s' if threads > 1 else ''}" if threads else ""
    return counted + (" cold" if cold else "")


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    operator: Operator
    parameters: Mapping[str, Any]
    dtype: torch.dtype
    direction: str = "forward"
    quick: bool = False
    variant: Variant = UNVARIED

    @property
    def shape(self) -> str:
        return self.operator.shape.format(**self.parameters) + conditions(self.variant.threads, self.variant.cold)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"{self.operator.name}-{self.shape.replace(' ', '-')}-{self.dtype_name}-{self.direction}"

    @contextlib.contextmanager
    def in_its_threads(self) -> Iterator[None]:
        """PyTorch uses as many threads as the case asks for, and afterwards as many as before."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.variant.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def work(self) -> Work | None:
        work = self.operator.work.get(self.direction)
        return work and work(**self.parameters)

    def inputs(self, device: torch.device, seed: int = SEED) -> dict[str, Any]:
        """The same inputs at every call with one seed."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        made = self.operator.inputs(random, **self.parameters)
        return map_tensors(lambda tensor: tensor.to(device), made)

    def bind(self, prepare: Callable[..., Callable[[], Any]], inputs: dict[str, Any]) -> Callable[[], Any]:
        """The call to be timed: an implementation's forward on `inputs`, its backward alone, or both."""
        operator = self.operator
        if operator.inplace:
            inputs = map_tensors(torch.clone, inputs)
        if self.direction == "forward":
            return prepare(**inputs)
        inputs = dict(inputs)
        for name in operator.differentiable:
            inputs[name] = inputs[name].detach().requires_grad_()
        wanted = [inputs[name] for name in operator.differentiable]
        call = prepare(**inputs)
        outputs = as_tuple(call())
        gradients = self._upstream(outputs)
        if self.direction == "training":
            return lambda: torch.autograd.grad(as_tuple(call()), wanted, gradients)
        return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)

    def _upstream(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Gradients of the outputs: the same values for every implementation, and for the truth in float64."""
        generator = torch.Generator().manual_seed(SEED + 1)
        return tuple(
            torch.randn(*output.shape, generator=generator).to(self.dtype).to(output.device, output.dtype)
            for output in outputs
        )

    def truth(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """The reference's result in float64."""
        wide = map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, inputs)
        return as_tuple(self.bind(lambda **inputs: lambda: self.operator.reference(**inputs), wide)())

    def plain(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """The plain layer's result in the case's dtype."""
        return as_tuple(self.bind(lambda **inputs: lambda: self.operator.plain(**inputs), inputs)())


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def map_tensors(function: Callable, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: function(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def compiled(function: Callable) -> Callable:
    """`torch.compile` of a whole function for one shape, its backward callable more than once."""
    # Donated buffers are freed by the first backward; the timed one runs many times on one graph.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, fullgraph=True, dynamic=False)
