"""`quantize`: gives the linear layers of a whole model weights of 8 or 4 bits."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from ..linear import Linear, QuantizedLinear
from ..linear.weights import check_options
from .linears import is_linear

TITLE = "nearpeak.quantize"


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer that was replaced."""

    name: str
    error: float  # of the weight, relative: ||dequantised - weight|| / ||weight||
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` did to a model; prints as a table.

    A layer's error is that of its weight. Inputs that do not depend on one another make y's relative error the same.

    >>> report = nearpeak.quantize(model, group_size=32)
    >>> print(report)
    >>> worst = max(report.replaced, key=lambda layer: layer.error)
    """

    replaced: tuple[QuantizedLayer, ...]
    left_alone: tuple[tuple[str, str], ...]  # name and reason

    def __str__(self) -> str:
        rows = [("layer", "error", "MB before", "after")]
        for layer in self.replaced:
            megabytes = (f"{size / 1e6:.2f}" for size in (layer.bytes_before, layer.bytes_after))
            rows.append((layer.name, f"{layer.error:.2%}", *megabytes))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[0] = max(widths[0], *(len(name) for name, _ in self.left_alone), 0)
        rows += [(name, f"left alone: {reason}", "", "") for name, reason in self.left_alone]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join((TITLE, *map(str.rstrip, lines)))


def quantize(
    model: torch.nn.Module, bits: int = 8, group_size: int = 64, symmetric: bool = True, skip: Iterable[str] = ()
) -> QuantizationReport:
    """Replace the torch.nn.Linear modules of a model by `nearpeak.nn.QuantizedLinear`, in place.

    A module that is used in several places stays one. A weight that other modules share (as an output layer may the
    embedding's) stays as it is for them. Not undone by anything: keep a copy of the float model where it is wanted.
    Quantise before `nearpeak.patch`, which then serves the rest.

    Args:
        model: any torch.nn.Module that holds linear layers.
        bits, group_size, symmetric: as `nearpeak.quantize_weight` takes them.
        skip: names of modules, as `model.named_modules()` gives them, to leave alone; with wildcards as in
            ("lm_head", "*.down_proj").

    Returns:
        the replaced layers with their errors, and those left alone and why; print it.

    Raises:
        TypeError: model or skip of another type. ValueError: an option that is not served, a name in skip that no
        linear layer has, or a weight with infinities or NaN.

    >>> print(nearpeak.quantize(model, bits=4, group_size=32, skip=["lm_head"]))
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(skip, str):
        raise TypeError(f"skip must be a collection of names, not the string {skip!r}")
    check_options(bits, group_size)
    skip = tuple(skip)
    linears = {name: module for name, module in model.named_modules() if name and _is_linear(module)}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(f"skip names no linear layer of this model: {pattern!r}")
    replaced, left_alone, layers = [], [], {}
    for name, module in linears.items():
        if (reason := _why_not(name, module, group_size, skip)) is not None:
            left_alone.append((name, reason))
            continue
        layer = QuantizedLinear.from_linear(module, bits, group_size, symmetric).train(module.training)
        layers[module] = layer
        replaced.append(QuantizedLayer(name, _error(module, layer), module.weight.nbytes, layer.weight.nbytes))
    put(model, layers)
    return QuantizationReport(tuple(replaced), tuple(left_alone))


def _is_linear(module):
    return is_linear(module) or type(module) is Linear


def _why_not(name, module, group_size, skip):
    if any(fnmatchcase(name, pattern) for pattern in skip):
        return "named in skip"
    if module.weight.is_meta:
        return "its weight is on meta, without numbers"
    if module.in_features % group_size or module.in_features == 0:
        return f"group_size {group_size} does not divide its {module.in_features} in_features"
    return None


@torch.no_grad()
def _error(module, layer):
    weight = module.weight.double()
    norm = weight.norm()
    return float((layer.weight.dequantize(torch.float64) - weight).norm() / norm) if norm else 0.0


def put(model: torch.nn.Module, layers: dict[torch.nn.Module, torch.nn.Module]) -> None:
    """Every place that holds a key of `layers` gets its value, once all are made: an error leaves the model whole."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child in layers:
                setattr(parent, name, layers[child])
