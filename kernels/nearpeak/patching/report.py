"""What `patch` replaced in a model, and what it left alone and why."""

from dataclasses import dataclass

TITLE = "nearpeak.patch"


@dataclass(frozen=True)
class Entry:
    """Modules of one class that fared alike."""

    kind: str  # "linear", "norm", "feedforward", "rotary", "attention" or "other"
    layer: str  # the class's name
    count: int
    detail: str  # what serves them now, or why they were left alone


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did to a model; prints as a table.

    >>> report = nearpeak.patch(model)
    >>> print(report)
    >>> report.count("norm")
    """

    replaced: tuple[Entry, ...]
    left_alone: tuple[Entry, ...]

    def count(self, kind: str) -> int:
        """How many modules of a kind ("linear", "norm", "feedforward", "rotary", "attention") were replaced."""
        return sum(entry.count for entry in self.replaced if entry.kind == kind)

    def _rows(self):
        for heading, entries in (("replaced", self.replaced), ("left alone", self.left_alone)):
            for entry in entries:
                yield heading, entry.kind, f"{entry.count} x {entry.layer}", entry.detail

    def __str__(self) -> str:
        rows = list(self._rows())
        if not self.replaced:
            rows.insert(0, ("replaced", "nothing", "", "no layer of this model is one that nearpeak serves"))
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join((TITLE, *map(str.rstrip, lines)))

    def __rich__(self):
        from rich.table import Table

        replaced = sum(entry.count for entry in self.replaced)
        table = Table("", "kind", "layers", "", title=f"{TITLE}: {replaced} layers replaced")
        for heading, kind, layers, detail in self._rows():
            table.add_row(heading, kind, layers, detail, style=None if heading == "replaced" else "dim")
        return table
