"""What the command line asks for."""

import dataclasses
import pathlib
import types
import typing


@dataclasses.dataclass(frozen=True)
class Options:
    """A budget of None means the default, paths of None the default folder; thresholds are as the user wrote them.
    time_limit: seconds without a sign of life; memory_limit: GiB."""

    names: tuple[str, ...] = ()
    full: bool = False
    dtypes: tuple[str, ...] = ()
    pattern: str = ""
    shapes: tuple[str, ...] = ()
    add: tuple[pathlib.Path, ...] = ()
    budget: float | None = None
    isolate: bool = True
    time_limit: float = 180.0
    memory_limit: float | None = None
    resume: bool = False
    against: str | None = None
    thresholds: tuple[str, ...] = ()
    json: pathlib.Path | None = None
    html: pathlib.Path | None = None
    markdown: pathlib.Path | None = None
    csv: pathlib.Path | None = None
    readme: pathlib.Path | None = None

    @classmethod
    def of(cls, suites, dtype, time_budget, threshold, **others) -> "Options":
        """From what the command line calls them."""
        renamed = {"names": suites, "dtypes": dtype, "budget": time_budget, "thresholds": threshold, **others}
        lists = {name: tuple(renamed[name] or ()) for name in ("names", "dtypes", "thresholds", "shapes", "add")}
        return cls(**{**renamed, **lists})

    def to_json(self) -> dict:
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, data: dict) -> "Options":
        hints = typing.get_type_hints(cls)
        return cls(**{name: _typed(hints[name], value) for name, value in data.items()})


def _plain(value):
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value.resolve()) if isinstance(value, pathlib.Path) else value


def _typed(hint, value):
    if typing.get_origin(hint) is tuple:
        return tuple(_typed(typing.get_args(hint)[0], each) for each in value)
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    return pathlib.Path(value) if hint is pathlib.Path and value is not None else value
