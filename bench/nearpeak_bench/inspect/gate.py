"""Conditions under which a build fails: `--fail-on spills`, `--fail-on "registers>128"`."""

import re
from typing import NamedTuple

from ..exits import UsageError
from .code import Code

MEASURES = {
    "registers": lambda code: code.registers,
    "spilled": lambda code: code.spilled,
    "shared": lambda code: code.shared,
    "occupancy": lambda code: 100 * code.occupancy.share,
    "cycles": lambda code: code.loop.bound_cycles,
}
UNITS = {"spilled": " bytes", "shared": " bytes", "occupancy": " %"}
WORSE = "worse"
WORDS = {"spills": "spilled>0"}
PATTERN = re.compile(rf"({'|'.join(MEASURES)})\s*([<>])\s*(\d+(?:\.\d+)?)$")


class Condition(NamedTuple):
    """A measure above or below a limit; of a comparison's verdict the measure is WORSE."""

    text: str
    measure: str
    above: bool = False
    limit: float = 0.0

    def holds(self, code: Code) -> bool:
        value = MEASURES[self.measure](code)
        return value > self.limit if self.above else value < self.limit


def conditions_of(texts: tuple[str, ...]) -> list[Condition]:
    """Of "spills", "worse", "registers>128", "occupancy<25" and the like, also several with commas between."""
    parts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    return [_condition(part) for part in parts]


def _condition(text: str) -> Condition:
    if text == WORSE:
        return Condition(text, WORSE)
    match = PATTERN.match(WORDS.get(text, text))
    if match is None:
        raise UsageError(
            f"--fail-on {text}: choose from {', '.join((*WORDS, WORSE))}, or a limit of {', '.join(MEASURES)}, as in "
            '"registers>128"'
        )
    measure, sign, limit = match.groups()
    return Condition(text, measure, sign == ">", float(limit))


def violations(conditions: list[Condition], codes: list[Code]) -> list[str]:
    """A line for each kernel that meets a condition."""
    return [
        f"{condition.text}: {code.name} ({code.case}) on {code.target} has "
        f"{MEASURES[condition.measure](code):.4g}{UNITS.get(condition.measure, '')}"
        for condition in conditions
        if condition.measure != WORSE
        for code in codes
        if condition.holds(code)
    ]
