"""How one module gets another `forward` without any other module noticing.

The instance's class becomes a subclass of its class that differs in `forward` alone. Parameters, hooks, names and
isinstance checks stay what they are, copies and replicas of the module work, torch.compile's guards see the
change, and giving the class back undoes it. (A `forward` set on the instance would be bound to the original in
every replica.)
"""

from collections.abc import Callable

import torch

ORIGINAL = "_nearpeak_original"


def serving_subclass(base: type, forward: Callable, factory: Callable, arguments: tuple) -> type:
    """A subclass of `base`, under its name, with another `forward`.

    factory, arguments: a module-level function and what makes it return this very class again, for pickle, which
    cannot find a class that shares its name with another.
    """

    def reduce(module, protocol):
        state = super(serving, module).__reduce_ex__(protocol)[2:]
        return _empty_instance, (factory, arguments), *state

    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"forward": forward, "__reduce_ex__": reduce, ORIGINAL: base}
    serving = type(base)(base.__name__, (base,), {**names, **own})
    return serving


def original_class(module: torch.nn.Module) -> type | None:
    """The class that the module had before it got a serving one; None if its class is not a serving one."""
    return vars(type(module)).get(ORIGINAL)


def _empty_instance(factory: Callable, arguments: tuple) -> torch.nn.Module:
    serving = factory(*arguments)
    return serving.__new__(serving)


def why_not_swappable(module: torch.nn.Module) -> str | None:
    """Why another class would not change what the module computes, or None if it would."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance, as accelerate's hooks do"
    return None
