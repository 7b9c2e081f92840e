"""The rule of exactness, judged over several draws of the same case.

A single small draw cannot compare maxima: of few large elements, one plain layer rounds some better by chance. In
float32, eager attention and a copy of it that only sums in another order were measured up to 6 times apart in the
largest error of a gradient, and on average of 8 draws never beyond the rule. So errors are averaged over draws
before they are compared; and the one unit in the last place that a maximum may add is the largest element's.
"""

from typing import NamedTuple

import torch
from exactness import MAXIMUM_RATIO, MEAN_RATIO

DRAWS = 8


class Errors(NamedTuple):
    mean: float
    maximum: float


class Standard(NamedTuple):
    """What each output of a function is held against."""

    exact: torch.Tensor
    plains: list[Errors]
    # One unit in the last place at the scale of the root mean square, and of the largest element.
    steps: Errors


def standards(plains, exacts):
    """One Standard per output.

    exacts: one tuple of tensors per draw. plains: the same for each plain layer that users have.
    """
    result = []
    for index, exact in enumerate(map(torch.stack, zip(*exacts, strict=True))):
        draws = [torch.stack([outputs[index] for outputs in layer]) for layer in plains]
        step = torch.finfo(draws[0].dtype).eps
        scale, largest = _averages(exact.where(exact.isfinite(), 0.0).square())
        steps = Errors(scale**0.5 * step, largest**0.5 * step)
        result.append(Standard(exact, [_errors(layer, exact) for layer in draws], steps))
    return result


def assert_as_exact(results, standards):
    """Assert the rule for every output: as exact as one of the plain layers. results: one tuple per draw."""
    outputs = map(torch.stack, zip(*results, strict=True))
    for index, (output, standard) in enumerate(zip(outputs, standards, strict=True)):
        name, exact = f"result[{index}]", standard.exact
        assert output.shape == exact.shape, f"{name}: shape {tuple(output.shape)}, expected {tuple(exact.shape)}"
        assert not output.isnan().any(), f"{name}: {int(output.isnan().sum())} of {output.numel()} elements are NaN"
        infinite = exact.isinf()
        assert torch.equal(output[infinite].double(), exact[infinite]), f"{name}: infinities differ"
        mine = _errors(output, exact)
        assert any(_allowed(mine, plain, standard.steps) for plain in standard.plains), (
            f"{name}: {mine}, plain layers {standard.plains}, one unit in the last place {standard.steps}"
        )


def _allowed(mine, plain, steps):
    mean = MEAN_RATIO * plain.mean + steps.mean
    return mine.mean <= mean and mine.maximum <= MAXIMUM_RATIO * plain.maximum + steps.maximum


def _errors(outputs, exact):
    finite = exact.isfinite()
    return Errors(*_averages((outputs.double() - exact).abs().where(finite, 0.0)))


def _averages(draws):
    """The mean, and the average over draws (the first dimension) of the largest element."""
    if draws.numel() == 0:
        return 0.0, 0.0
    return float(draws.mean()), float(draws.flatten(1).amax(1).mean())
