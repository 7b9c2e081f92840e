"""What the command line asks for."""

import dataclasses
import enum
import pathlib
import types
import typing

LISTS = ("names", "dtypes", "cases", "thresholds", "shapes", "add")


@dataclasses.dataclass(frozen=True)
class Options:
    """A budget of None means the default, paths of None the default folder; thresholds, sweep and threads are as the
    user wrote them. caches: "warm" or "cold"; profile: a profiler's name; time_limit: seconds without a sign of life;
    memory_limit: GiB."""

    names: tuple[str, ...] = ()
    full: bool = False
    dtypes: tuple[str, ...] = ()
    pattern: str = ""
    cases: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    add: tuple[pathlib.Path, ...] = ()
    sweep: str = ""
    threads: str = ""
    caches: str = "warm"
    profile: str | None = None
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
    def of(cls, suites, dtype, case, time_budget, threshold, **others) -> "Options":
        """From what the command line calls them."""
        renamed = {
            "names": suites, "dtypes": dtype, "cases": case, "budget": time_budget, "thresholds": threshold, **others
        }  # fmt: skip
        renamed |= {name: value.value for name, value in renamed.items() if isinstance(value, enum.Enum)}
        lists = {name: tuple(renamed[name] or ()) for name in LISTS}
        return cls(**{**renamed, **lists})

    @property
    def varies(self) -> bool:
        """Cases are run as others than they are."""
        return bool(self.sweep or self.threads or self.caches != Options.caches)

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
