"""The journal of a run: finished rows, kept on disk one by one, so that whatever ends a run costs the present row only.

One line of JSON for the run (what was asked, the machine, its peaks), then one per row. A run that ends deletes its
journal; `nearpeak bench --resume` goes on with the newest that is left.
"""

import dataclasses
import json
import os
import pathlib

from . import results
from .exits import UsageError

ENDING = ".unfinished.jsonl"


class Journal:
    """The journal that is written."""

    def __init__(self, path: pathlib.Path, options: dict, found: results.Results):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        run = {**dataclasses.asdict(found), "rows": [], "format": results.FORMAT}
        lines = [{"options": options, "run": run}, *map(dataclasses.asdict, found.rows)]
        results.write(path, "".join(json.dumps(line) + "\n" for line in lines))

    def append(self, row: results.Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


def last(folder: pathlib.Path) -> tuple[pathlib.Path, dict, results.Results]:
    """The newest unfinished run: its journal, what was asked, and what was found until it ended."""
    paths = sorted(folder.glob(f"*{ENDING}"))
    if not paths:
        raise UsageError(f"there is no unfinished run in {folder} to resume: start one with nearpeak bench")
    path = paths[-1]
    try:
        head, *lines = path.read_text().splitlines()
        head = json.loads(head)
        found = results.Results.from_json(json.dumps(head["run"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is no journal of this version ({error}): delete it") from None
    for line in lines:
        try:
            found.rows.append(results.row_of(json.loads(line)))
        except ValueError:
            # Half a line, the last: the run was killed while it wrote.
            break
    return path, head["options"], found
