"""Where runs are kept: `.nearpeak/results/<machine>/<time>.json`, so that a run is held against one of its own machine.

<machine> names what decides about speed: processor and its features, threads, instruction sets, GPUs.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterator

from . import results

FOLDER = pathlib.Path(".nearpeak/results")
DECISIVE = ("processor", "features", "threads", "torch_capability", "isa", "gpus")


def fingerprint(machine: dict) -> str:
    """A readable name, and a digest of all that decides."""
    decisive = [machine.get(key) for key in DECISIVE]
    readable = re.sub(r"[^a-z0-9]+", "-", f"{machine.get('processor')} {machine.get('isa')}".lower()).strip("-")
    return f"{readable[:40]}-{hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:8]}"


def stem(found: results.Results) -> pathlib.Path:
    """The path of a run's files, without their endings."""
    return FOLDER / fingerprint(found.machine) / found.created.replace(":", "").replace("+0000", "Z")


def earlier(found: results.Results) -> Iterator[tuple[pathlib.Path, results.Results]]:
    """Earlier runs of the same machine that share a case with this one, newest first."""
    cases = {row.case for row in found.rows}
    for path in sorted(stem(found).parent.glob("*.json"), reverse=True):
        try:
            run = results.Results.from_json(path.read_text())
        except (KeyError, OSError, TypeError, ValueError):
            continue
        if run.created < found.created and cases & {row.case for row in run.rows}:
            yield path, run


def last(found: results.Results) -> pathlib.Path | None:
    """The newest earlier run of the same machine that shares a case with this one."""
    return next((path for path, _ in earlier(found)), None)


@dataclasses.dataclass(frozen=True)
class Course:
    """One kernel in one case over several runs.

    ratios: how many times faster than `baseline`, by run; NaN where a run does not have both
    """

    row: results.Row
    implementation: str
    baseline: str
    ratios: list[float]


def courses(runs: list[results.Results]) -> list[Course]:
    """Of the kernels of the last run that an earlier one has too, each against the last run's fastest baseline."""
    found = []
    by_case = [{row.case: row for row in run.rows} for run in runs]
    for row in runs[-1].rows:
        for candidate in row.candidates():
            if candidate.ratios:
                baseline = min(candidate.ratios, key=lambda name: candidate.ratios[name].value)
                ratios = [_ratio(rows.get(row.case), candidate.implementation, baseline) for rows in by_case]
                if sum(not math.isnan(ratio) for ratio in ratios) > 1:
                    found.append(Course(row, candidate.implementation, baseline, ratios))
    return found


def _ratio(row: results.Row | None, implementation: str, baseline: str) -> float:
    for candidate in row.candidates() if row else ():
        if candidate.implementation == implementation and baseline in candidate.ratios:
            return candidate.ratios[baseline].value
    return math.nan
