"""Cases made of others: one dimension swept, other numbers of threads, cold caches.

    nearpeak bench attention --sweep S=128,256,512,1024     rows that differ in the sequence's length alone
    nearpeak bench norm --threads 1,2                       each row with one thread, and with two
    nearpeak bench norm --caches cold                       nothing of a call's data in any cache when it begins

A dimension is a parameter of the case (rows, width, head_dim, ...), or S, the sequence's length under whatever names
the operator has for it. growth.py fits how the time grows with it.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from nearpeak import system

from .cases import Case, Variant
from .exits import UsageError

SEQUENCE = "S"
LENGTHS = ("queries", "keys", "sequence", "length")


def dimensions(parameters: Mapping[str, object]) -> dict[str, list[str]]:
    """The dimensions by name, and the parameters that each of them sets."""
    sizes = {name: value for name, value in parameters.items() if isinstance(value, int)}
    lengths = {name: sizes[name] for name in LENGTHS if name in sizes}
    found = {name: [name] for name in sizes if name not in lengths}
    if lengths:
        # One query behind many keys stays one: it is the longer that is swept.
        longest = max(lengths.values())
        found[SEQUENCE] = [name for name, value in lengths.items() if value == longest]
    return found


def parse_sweep(text: str) -> tuple[str, list[int]]:
    """(dimension, sizes) of "S=128,256"."""
    name, _, sizes = text.partition("=")
    found = _positive(sizes)
    if not name or not found:
        raise UsageError(f"--sweep {text}: give a dimension and its sizes, as in S=128,256,512 or rows=1,16,256")
    return name, found


def parse_threads(text: str) -> list[int]:
    found, most = _positive(text), system.cores()
    if not found:
        raise UsageError(f"--threads {text}: give numbers of threads, as in 1,2,4")
    if max(found) > most:
        raise UsageError(f"--threads {text}: this process may use {most} cores, so give at most {most}")
    return found


def _positive(text: str) -> list[int]:
    """The numbers between commas, sorted, each once; empty where one is none."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        return []
    return sorted({int(part) for part in parts})


def plan(cases: Iterable[tuple[str, Case]], sweep: str, threads: str, cold: bool) -> list[tuple[str, Variant]]:
    """What becomes of the chosen cases, as (suite, variant) pairs; UsageError where none has the dimension."""
    cases = list(cases)
    counts = parse_threads(threads) if threads else [None]
    if not sweep:
        return [(suite, Variant(case.name, "", count, cold)) for suite, case in cases for count in counts]
    dimension, sizes = parse_sweep(sweep)
    swept = [(suite, case) for suite, case in cases if dimension in dimensions(case.parameters)]
    if not swept:
        known = dict.fromkeys(name for _, case in cases for name in dimensions(case.parameters))
        raise UsageError(
            f"--sweep {sweep}: no chosen case has the dimension {dimension}; those it has: {', '.join(known) or 'none'}"
        )
    return [
        (suite, Variant(case.name, f"{dimension}={size}", count, cold))
        for suite, case in swept
        for size in sizes
        for count in counts
    ]


def make(base: Case, variant: Variant) -> Case:
    """The case that `variant` says, of its base."""
    parameters = dict(base.parameters)
    if variant.sweep:
        dimension, (size,) = parse_sweep(variant.sweep)
        parameters |= dict.fromkeys(dimensions(parameters)[dimension], size)
    return dataclasses.replace(base, parameters=parameters, quick=True, variant=variant)
