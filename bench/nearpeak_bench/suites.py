"""The suites by name, one per family, and the choice of their cases."""

import pathlib
import runpy
from collections.abc import Iterable

import torch

from . import attention, attention_terms, feedforward, layer_norm, linear, norm, overhead, rotary
from .cases import Case

SUITES = {
    "norm": norm.CASES + layer_norm.CASES,
    "rotary": rotary.CASES,
    "feedforward": feedforward.CASES,
    "linear": linear.CASES,
    "attention": attention.CASES + attention_terms.CASES,
    "overhead": overhead.CASES,
}


# Files of the user's that registered implementations; a fresh process runs them again.
added: list[pathlib.Path] = []


def add(path: pathlib.Path) -> None:
    """Run a Python file that registers implementations with our operators."""
    runpy.run_path(str(path))
    added.append(path.resolve())


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


def find(name: str) -> Case:
    """The case of that name."""
    return next(case for cases in SUITES.values() for case in cases if case.name == name)
