"""Where runs are kept: `.nearpeak/results/<machine>/<time>.json`, so that a run is held against one of its own machine.

<machine> names what decides about speed: processor and its features, threads, instruction sets, GPUs.
"""

import hashlib
import json
import pathlib
import re

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


def last(found: results.Results) -> pathlib.Path | None:
    """The newest earlier run of the same machine that shares a case with this one."""
    cases = {row.case for row in found.rows}
    for path in sorted(stem(found).parent.glob("*.json"), reverse=True):
        try:
            earlier = results.Results.from_json(path.read_text())
        except (KeyError, OSError, TypeError, ValueError):
            continue
        if earlier.created < found.created and cases & {row.case for row in earlier.rows}:
            return path
    return None
