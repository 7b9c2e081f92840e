"""The command that repeats one row alone, as it was measured: its case, and the options and environment that decide."""

import os
import shlex

from .cases import Case
from .options import Options

# What chooses kernels and threads, here and in PyTorch.
ENVIRONMENT = ("NEARPEAK_BACKEND", "NEARPEAK_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA",
               "MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS")  # fmt: skip


def command(case: Case, options: Options) -> str:
    """A line for a shell, to be run in the folder in which the run was started."""
    variant = case.variant
    words = ["nearpeak", "bench", "--case", variant.base or case.name]
    for option, value in (("--sweep", variant.sweep), ("--threads", variant.threads)):
        words += [option, str(value)] if value else []
    words += ["--caches", "cold"] if variant.cold else []
    for option, values in (("--shapes", options.shapes), ("--add", options.add)):
        words += [word for value in values for word in (option, str(value))]
    return _line([*words, *_timing(options)])


def model_command(options: Options) -> str:
    """Likewise for all rows of the model benchmark, which are measured together."""
    return _line(["nearpeak", "bench", "model", *(["--full"] if options.full else [])])


def _line(words: list[str]) -> str:
    settings = [f"{name}={shlex.quote(os.environ[name])}" for name in ENVIRONMENT if os.environ.get(name)]
    return " ".join([*settings, shlex.join(words)])


def _timing(options: Options) -> list[str]:
    """What the run was asked for beside the defaults."""
    usual = Options()
    given = {"--time-budget": options.budget, "--memory-limit": options.memory_limit}
    if options.time_limit != usual.time_limit:
        given["--time-limit"] = options.time_limit
    words = [word for option, value in given.items() if value is not None for word in (option, f"{value:g}")]
    if options.full:
        # For its budget and for what it measures beside time: a case that is named runs in any case.
        words.append("--full")
    return words if options.isolate else [*words, "--no-isolate"]
