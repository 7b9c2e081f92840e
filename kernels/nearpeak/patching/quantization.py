"""`quantize`: gives the linear layers of a whole model weights of 8 or 4 bits."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from ..linear import Linear, QuantizedLinear
from ..linear.input_rounding import check_input_bits
from ..linear.weights import check_options
from .linears import is_linear

TITLE = "nearpeak.quantize"


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer that was replaced."""

    name: str
    error: float  # relative: ||dequantised - weight|| / ||weight||; with samples, norms of what x makes of both
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` did to a model; prints as a table.

    A layer's error is that of its weight, or where samples were given that of its result, each as if the features of
    its input did not depend on one another.

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
    model: torch.nn.Module,
    bits: int = 8,
    group_size: int = 64,
    symmetric: bool = True,
    skip: Iterable[str] = (),
    samples: Iterable = (),
    input_bits: int | None = None,
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
        samples: inputs that the model is called with, each a tensor, a tuple of arguments or a mapping of named ones.
            Each layer's scales are then chosen for what they show its input to be (`quantize_weight`'s importance); a
            layer that no sample reaches is rounded as without.
        input_bits: 8 to round the layers' inputs too, at each call, and multiply integers, which is faster; as
            `nearpeak.quantized_linear` takes it.

    Returns:
        the replaced layers with their errors, and those left alone and why; print it.

    Raises:
        TypeError: model or skip of another type. ValueError: an option that is not served, a name in skip that no
        linear layer has, or a weight with infinities or NaN. What the model raises for a sample.

    >>> print(nearpeak.quantize(model, bits=4, group_size=32, skip=["lm_head"], samples=[torch.tensor([[2, 17, 42]])]))
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(skip, str):
        raise TypeError(f"skip must be a collection of names, not the string {skip!r}")
    check_options(bits, group_size)
    check_input_bits(input_bits)
    skip = tuple(skip)
    linears = {name: module for name, module in model.named_modules() if name and _is_linear(module)}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(f"skip names no linear layer of this model: {pattern!r}")
    replaced, left_alone, layers = [], [], {}
    importances = _importances(model, linears.values(), samples)
    for name, module in linears.items():
        if (reason := _why_not(name, module, group_size, skip)) is not None:
            left_alone.append((name, reason))
            continue
        importance = importances.get(module)
        layer = QuantizedLinear.from_linear(module, bits, group_size, symmetric, importance, input_bits)
        layers[module] = layer.train(module.training)
        error = _error(module, layer, importance)
        replaced.append(QuantizedLayer(name, error, module.weight.nbytes, layer.weight.nbytes))
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
def _importances(model, modules, samples):
    """The mean square of each input feature over all samples, of the modules that they reach."""
    squares, counts, handles = {}, Counter(), []

    def note(module, arguments, named):
        x = arguments[0] if arguments else named["input"]
        x = x.detach().reshape(-1, x.shape[-1]).double()
        squares[module] = squares.get(module, 0.0) + x.square().sum(0)
        counts[module] += len(x)

    try:
        handles += [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
        for sample in samples:
            if isinstance(sample, Mapping):
                model(**sample)
            else:
                model(*sample) if isinstance(sample, tuple) else model(sample)
    finally:
        for handle in handles:
            handle.remove()
    return {module: total / counts[module] for module, total in squares.items() if counts[module]}


@torch.no_grad()
def _error(module, layer, importance):
    weight = module.weight.double()
    each = 1.0 if importance is None else importance.sqrt()
    norm = (weight * each).norm()
    return float(((layer.weight.dequantize(torch.float64) - weight) * each).norm() / norm) if norm else 0.0


def put(model: torch.nn.Module, layers: dict[torch.nn.Module, torch.nn.Module]) -> None:
    """Every place that holds a key of `layers` gets its value, once all are made: an error leaves the model whole."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child in layers:
                setattr(parent, name, layers[child])
