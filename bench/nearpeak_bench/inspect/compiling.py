"""Launches become compilations: what a launcher launches is compiled for a target that need not be there.

The launcher is called with tensors that have no memory (device="meta"), and chooses what is compiled: so what is read
is what runs. An autotuned kernel, which would be timed to choose, is compiled in every one of its configurations.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

from nearpeak import triton_launch
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .targets import Target


class Case(NamedTuple):
    """One call of a launcher, on tensors without memory."""

    name: str
    launch: Callable[[], object]
    wide: bool = False  # whether its kernels must load and store 16 bytes at once
    matrix: bool = False  # whether it must use matrix instructions


class Compiled(NamedTuple):
    """What Triton made of one launch; configuration: the autotuner's, if one chose."""

    kernel: Any
    configuration: str


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
def _compiling_for(target: Target) -> Iterator[list[Compiled]]:
    """Inside, every launch compiles its kernel for `target` instead, and adds it to the list."""
    compiled: list[Compiled] = []
    configurations = [""]
    run = JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **options):
        made = run(kernel, *arguments, grid=grid, warmup=True, **options)
        compiled.append(Compiled(made, configurations[-1]))

    def every_configuration(autotuner, *arguments, **options):
        for config in autotuner.configs:
            configurations.append(_text(config))
            # What is tuned is not the caller's to say.
            autotuner.fn.run(*arguments, **{**options, **config.all_kwargs()})
            configurations.pop()

    with (
        mock.patch.object(driver, "_active", _CompilingDriver(target)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(Autotuner, "run", every_configuration),
        mock.patch.object(triton_launch, "describe", return_value=target.device),
    ):
        yield compiled


def _text(config) -> str:
    """What an autotuner's configuration sets."""
    return " ".join(f"{name}={value}" for name, value in config.all_kwargs().items() if name != "num_ctas" or value > 1)


def compile_launches(case: Case, target: Target) -> list[Compiled]:
    """What `case` launches, compiled for `target`, in order."""
    with _compiling_for(target) as compiled:
        case.launch()
    return compiled


PREFIX = "inspect_"


def cases_of(names: dict[str, Any]) -> list[Case]:
    """The cases in a user's file: its functions without arguments whose names start with PREFIX."""
    return [
        Case(name.removeprefix(PREFIX), function)
        for name, function in names.items()
        if name.startswith(PREFIX) and inspect.isfunction(function) and not inspect.signature(function).parameters
    ]
