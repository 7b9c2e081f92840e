"""What one run of `nearpeak inspect` found, and its JSON; the machine code itself is not kept there."""

import dataclasses
import datetime
import json

import nearpeak
import triton

from .code import Code
from .occupancy import Occupancy
from .pipes import Estimate

FORMAT = "nearpeak inspect"


@dataclasses.dataclass(frozen=True)
class Failure:
    """A case that could not be compiled for a target, and why."""

    case: str
    target: str
    reason: str


@dataclasses.dataclass
class Results:
    """codes in the order in which they were compiled; complete: whether every case was."""

    triton: str = triton.__version__
    nearpeak: str = nearpeak.__version__
    created: str = dataclasses.field(default_factory=lambda: f"{datetime.datetime.now():%Y-%m-%d %H:%M}")
    codes: list[Code] = dataclasses.field(default_factory=list)
    failures: list[Failure] = dataclasses.field(default_factory=list)
    complete: bool = False

    def to_json(self) -> str:
        codes = [
            {**vars(code), "occupancy": code.occupancy._asdict(), "loop": vars(code.loop), "listing": None}
            for code in self.codes
        ]
        failures = [vars(failure) for failure in self.failures]
        return json.dumps({"format": FORMAT, **vars(self), "codes": codes, "failures": failures}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Results":
        """Raises KeyError, TypeError or ValueError for what to_json did not write."""
        data = json.loads(text)
        if data.pop("format") != FORMAT:
            raise ValueError("another format")
        codes = [
            Code(**{**code, "occupancy": Occupancy(**code["occupancy"]), "loop": Estimate(**code["loop"])})
            for code in data.pop("codes")
        ]
        failures = [Failure(**failure) for failure in data.pop("failures")]
        return cls(**data, codes=codes, failures=failures)
