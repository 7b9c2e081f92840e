"""What a run found, and its JSON: one row per case, in it one measurement per implementation, with every sample."""

import dataclasses
import datetime
import json
import pathlib

from .peaks import Peaks
from .timing import Samples
from .verdicts import Ratio, Spread

FORMAT = 2
# What a measurement's status can say of a kernel that gave no result.
BROKEN = ("failed", "crashed", "timed out")


@dataclasses.dataclass
class Measurement:
    """One implementation in one case.

    backend: which of nearpeak's backends serves a candidate, with its instruction set; empty for a baseline
    status: "ok"; "wrong" (the result is less exact than the rule allows: no time is taken); "failed" (it raised);
        "crashed" or "timed out" (it took its process down, or never returned); "absent" (it needs a package that is
        not installed)
    note: why it is not ok, or what is to be known beside the time: outliers, drift, a baseline's inexactness
    error_mean, error_max: absolute errors against float64
    share: the physical limit's time over the median time
    extra_memory: peak bytes of a call beside inputs and outputs; None where not measured
    ratios: how many times faster than each baseline
    compile_cold, compile_cached: seconds that the first call took beyond a later one, where it compiled (compiling.py)
    """

    implementation: str
    baseline: bool
    backend: str
    status: str = "ok"
    note: str = ""
    error_mean: float | None = None
    error_max: float | None = None
    samples: Samples | None = None
    spread: Spread | None = None
    share: float | None = None
    extra_memory: int | None = None
    ratios: dict[str, Ratio] = dataclasses.field(default_factory=dict)
    compile_cold: float | None = None
    compile_cached: float | None = None


@dataclasses.dataclass
class Row:
    """One case. limit_seconds is the least time that the hardware allows, and bound says by what; flops and bytes are
    what one call must do at least. Plain errors are None where the whole row was lost. template is the shape with the
    names of `parameters` in braces; threads is None where PyTorch chose their number; cold: caches were emptied before
    each sample; command repeats the row alone."""

    suite: str
    case: str
    operator: str
    shape: str
    dtype: str
    direction: str
    plain_error_mean: float | None
    plain_error_max: float | None
    limit_seconds: float | None
    bound: str | None
    measurements: list[Measurement]
    flops: float | None = None
    bytes: float | None = None
    template: str = ""
    parameters: dict = dataclasses.field(default_factory=dict)
    threads: int | None = None
    cold: bool = False
    command: str = ""

    def candidates(self) -> list[Measurement]:
        return [m for m in self.measurements if not m.baseline]

    def baselines(self) -> list[Measurement]:
        return [m for m in self.measurements if m.baseline]


@dataclasses.dataclass
class Results:
    """A run. noise: what one call may differ from itself by on this machine, as a fraction."""

    machine: dict
    peaks: Peaks | None = None
    noise: float | None = None
    rows: list[Row] = dataclasses.field(default_factory=list)
    model: dict | None = None
    complete: bool = False
    created: str = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    )

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Results":
        data = json.loads(text)
        if data.pop("format", None) != FORMAT:
            raise ValueError(f"these results are not of format {FORMAT}: run the benchmark again")
        peaks = data.pop("peaks")
        rows = [row_of(row) for row in data.pop("rows")]
        return cls(peaks=peaks and _peaks(peaks), rows=rows, **data)


def row_of(data: dict) -> Row:
    """A row of what dataclasses.asdict made of it."""
    return Row(**{**data, "measurements": _measurements(data["measurements"])})


def _peaks(data: dict) -> Peaks:
    # JSON turned the footprints into strings.
    by_footprint = {name: {int(k): v for k, v in data[name].items()} for name in ("copy", "read")}
    return Peaks(data["multiply_add"], **by_footprint)


def _measurements(data: list[dict]) -> list[Measurement]:
    found = []
    for each in data:
        samples, spread = each["samples"], each["spread"]
        ratios = {name: Ratio(**value) for name, value in each["ratios"].items()}
        rebuilt = {"samples": samples and Samples(**samples), "spread": spread and Spread(**spread), "ratios": ratios}
        found.append(Measurement(**{**each, **rebuilt}))
    return found


def write(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all, so that an interruption never leaves half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text)
    beside.replace(path)
