"""The suites by name, one per family, the choice of their cases, and what a user adds: kernels, variants of cases."""

import difflib
import pathlib
import runpy
import sys
import traceback
from collections.abc import Iterable
from typing import NamedTuple

import torch

from . import (
    attention,
    attention_blocks,
    attention_score_mod,
    attention_terms,
    embedding,
    feedforward,
    gguf_linear,
    layer_norm,
    linear,
    linear_epilogue,
    lora_linear,
    norm,
    overhead,
    peers,
    quantized_linear,
    rotary,
    shapes,
    variants,
)
from .cases import OPERATORS, Case, Operator, Variant
from .exits import UsageError

# Imported for what it registers with the families' operators.
PEERS = peers.__name__

SUITES = {
    "norm": norm.CASES + layer_norm.CASES,
    "rotary": rotary.CASES,
    "feedforward": feedforward.CASES,
    "embedding": embedding.CASES,
    "linear": [
        *linear.CASES,
        *linear_epilogue.CASES,
        *lora_linear.CASES,
        *quantized_linear.CASES,
        *gguf_linear.CASES,
    ],
    "attention": attention.CASES + attention_terms.CASES + attention_blocks.CASES + attention_score_mod.CASES,
    "overhead": overhead.CASES,
}


class Addition(NamedTuple):
    """A file of the user's that was run, and the implementations that it registered."""

    path: pathlib.Path
    implementations: list[tuple[Operator, str]]

    def __str__(self):
        return ", ".join(f"{name} of {operator.name}" for operator, name in self.implementations)


# What was added, the models whose shapes are used, and cases made of others: a fresh process is told of all three.
added: list[Addition] = []
shaped: list[str] = []
varied: dict[str, Case] = {}


def add(path: pathlib.Path) -> Addition:
    """Run a Python file that registers implementations with our operators, and say what it registered.

    Raises UsageError where the file cannot be run, registers nothing, or takes a name that is taken.
    """
    before = {operator: dict(operator.implementations) for operator in OPERATORS}
    execute(path)
    found = []
    for operator in OPERATORS:
        known = before.get(operator, {})
        for name, implementation in operator.implementations.items():
            if name in known and known[name] is not implementation:
                raise UsageError(f"{path} registers {name!r} with {operator.name}, which has one: choose another name")
            if name not in known:
                found.append((operator, name))
    if not found:
        raise UsageError(
            f"{path} registers no kernel: decorate a function with one of our operators, as in "
            "@nearpeak_bench.norm.rms_norm.implementation('mine')"
        )
    added.append(Addition(path.resolve(), found))
    return added[-1]


def execute(path: pathlib.Path) -> dict:
    """Run a Python file of the user's and return its names; UsageError, with one line, where it cannot be run."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        # The file may import what lies beside it; last, so that it hides no one else's modules.
        sys.path.append(folder)
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        message = (str(error).strip() or "no message").splitlines()[0]
        lines = [
            f"{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
        ]
        where = f" in line {lines[-1]}" if lines else ""
        remedy = f"`python {path}` shows more"
        if isinstance(error, ModuleNotFoundError):
            remedy = f"install {error.name}, or import it inside of the function, so that its absence costs one row"
        raise UsageError(f"{path} cannot be run: {type(error).__name__}{where}: {message}; {remedy}") from None


def use_shapes(names: tuple[str, ...]) -> None:
    """Replace the cases of all suites by those in the shapes of these models (shapes.py)."""
    made = shapes.cases(names)
    for suite in SUITES:
        SUITES[suite] = made.get(suite, [])
    shaped[:] = names


class State(NamedTuple):
    """What a fresh process needs to know the same cases and implementations."""

    files: list[pathlib.Path]
    shaped: tuple[str, ...]
    varied: tuple[Variant, ...] = ()


def state() -> State:
    return State([addition.path for addition in added], tuple(shaped), tuple(case.variant for case in varied.values()))


def restore(state: State) -> None:
    for path in state.files:
        add(path)
    if state.shaped:
        use_shapes(state.shaped)
    for variant in state.varied:
        vary(variant)


def vary(variant: Variant) -> Case:
    """The case made of another, to be found by its name from now on."""
    case = variants.make(_original(variant.base), variant)
    return varied.setdefault(case.name, case)


def select(
    suites: Iterable[str], *, full: bool = False, dtypes: Iterable[torch.dtype] = (), pattern: str = ""
) -> list[tuple[str, Case]]:
    """(suite, case) pairs: the quick ones or all; dtypes and pattern (part of the case's name) narrow the choice."""
    dtypes = list(dtypes)
    return [
        (suite, case)
        for suite in suites
        for case in SUITES[suite]
        if (full or case.quick) and (not dtypes or case.dtype in dtypes) and pattern in case.name
    ]


def only(names: Iterable[str], pattern: str, kernel: str) -> Case:
    """The one case that is named, or whose name holds the pattern, of those the kernel runs in; else UsageError."""
    chosen = named(names) if names else select(SUITES, full=True, pattern=pattern)
    found = [case for _, case in chosen if kernel in case.operator.implementations]
    if len(found) != 1:
        listed = ", ".join(case.name for case in found[:5]) or "none"
        raise UsageError(f"--case or --filter must leave one row of {kernel}, not {len(found)}: {listed}")
    return found[0]


def named(names: Iterable[str]) -> list[tuple[str, Case]]:
    """(suite, case) pairs of these names, quick or not, in the suites' order; UsageError for one that no case has."""
    names = set(names)
    found = [(suite, case) for suite, cases in SUITES.items() for case in cases if case.name in names]
    for unknown in names - {case.name for _, case in found}:
        everything = [case.name for cases in SUITES.values() for case in cases]
        close = difflib.get_close_matches(unknown, everything, n=1)
        raise UsageError(f"there is no case {unknown!r}" + (f": did you mean {close[0]}?" if close else ""))
    return found


def find(name: str) -> Case:
    """The case of that name."""
    return varied[name] if name in varied else _original(name)


def _original(name: str) -> Case:
    return next(case for cases in SUITES.values() for case in cases if case.name == name)
