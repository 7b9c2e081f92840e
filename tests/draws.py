"""The rule of exactness (nearpeak_bench/exactness.py) over draws of a case, held against several plain layers."""

import os
from typing import NamedTuple

import torch
from exactness import Errors, errors_over_draws, units_over_draws, why_beyond

# Which memory a kernel touches does not depend on the numbers: sanitizers see all in one draw, which is too few to tell
# how exact a kernel is. That the other runs judge.
SANITIZING = os.environ.get("NEARPEAK_SANITIZING") == "1"
# Of most cases, and of those of few rows, whose errors are few.
DRAWS, MOST_DRAWS = (1, 1) if SANITIZING else (8, 64)


class Standard(NamedTuple):
    """What each output of a function is held against."""

    exact: torch.Tensor
    plains: list[Errors]
    units: Errors


def standards(plains, exacts):
    """One Standard per output.

    exacts: one tuple of tensors per draw. plains: the same for each plain layer that users have.
    """
    result = []
    for index, exact in enumerate(map(torch.stack, zip(*exacts, strict=True))):
        draws = [torch.stack([outputs[index] for outputs in layer]) for layer in plains]
        units = units_over_draws(exact, draws[0].dtype)
        result.append(Standard(exact, [errors_over_draws(layer, exact) for layer in draws], units))
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
        if SANITIZING:
            continue
        mine = errors_over_draws(output, exact)
        assert any(why_beyond(mine, plain, standard.units) is None for plain in standard.plains), (
            f"{name}: {mine}, plain layers {standard.plains}, one unit in the last place {standard.units}"
        )
