"""Two runs side by side: two files of kernels, or the same kernels by two versions of Triton.

Iterations may differ in size, so the cost of a loop is its cycles by what an iteration does: operations of its matrix
products, else bytes of global memory. The cycles are those of the busiest pipe; of a loop without matrix products,
which reads things once as a rule, at least those of memory. Compilers are deterministic: there is no noise to allow
for, only a tolerance for a few instructions more or less.
"""

import dataclasses
import pathlib

from ..exits import UsageError
from .code import Code
from .pipes import Estimate
from .results import Results

TOLERANCE = 0.01
WORSE, BETTER, SAME = "worse", "better", "same"


@dataclasses.dataclass(frozen=True)
class Change:
    """One kernel before and after; cost: of the loop, after / before."""

    before: Code
    after: Code
    cost: float

    @classmethod
    def of(cls, before: Code, after: Code) -> "Change":
        works = (lambda loop: loop.flops, lambda loop: loop.loaded + loop.stored, lambda loop: 1)
        work = next(work for work in works if work(before.loop) and work(after.loop))
        old, new = (_cycles(code.loop) / work(code.loop) for code in (before, after))
        return cls(before, after, new / old)

    def _where(self, sign: int) -> list[str]:
        """What became worse (sign 1) or better (-1)."""
        changes = {
            "spills": self.after.spilled - self.before.spilled,
            "occupancy": self.before.occupancy.share - self.after.occupancy.share,
            "cost": self.cost - 1 if abs(self.cost - 1) > TOLERANCE else 0.0,
        }
        return [name for name, change in changes.items() if sign * change > 0]

    @property
    def verdict(self) -> str:
        return WORSE if self._where(1) else BETTER if self._where(-1) else SAME

    @property
    def reasons(self) -> str:
        """For a reader: what became worse, and what became better."""
        parts = {WORSE: self._where(1), BETTER: self._where(-1)}
        return "; ".join(f"{word} {', '.join(names)}" for word, names in parts.items() if names)


def _cycles(loop: Estimate) -> float:
    return loop.bound_cycles if loop.flops else max(loop.bound_cycles, loop.memory_cycles)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All kernels that both runs have, and the names of those that one alone has."""

    before: Results
    after: Results
    changes: list[Change]
    only_before: list[str]
    only_after: list[str]

    @classmethod
    def of(cls, before: Results, after: Results) -> "Comparison":
        old, new = ({code.key: code for code in run.codes} for run in (before, after))
        changes = [Change.of(old[key], code) for key, code in new.items() if key in old]
        if not changes:
            raise UsageError(
                "the two have no kernel in common: give the functions of both files the same names, and both runs the "
                "same --target"
            )
        missing = ([f"{code.name} ({code.case}) {code.target}" for key, code in one.items() if key not in other]
                   for one, other in ((old, new), (new, old)))  # fmt: skip
        return cls(before, after, changes, *missing)

    @property
    def worse(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == WORSE]


def load(path: pathlib.Path) -> Results:
    """The results in a file; UsageError with one line that says what is wrong with it."""
    try:
        return Results.from_json(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} holds no results of this version of nearpeak inspect ({error})") from None
