"""How a module is recognised by what it computes: it is run once on a small random input."""

import warnings
from collections.abc import Callable

import torch

# Tells formulas apart, and is no measure of exactness: float32 evaluations of one formula differ by 1e-7, and the
# probe's two formulas, or two values of eps, by more than 1e-2.
SAME_FORMULA = 1e-5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


@torch.no_grad()
def run(forward: Callable, module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor | None:
    """What an unknown module's forward gives, without a trace of it in torch's generator; None if it raises."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
            warnings.simplefilter("ignore")
            return forward(module, *inputs)
    except Exception:  # it may raise anything on an input that is not its own
        return None


def is_same(result: object, expected: torch.Tensor) -> bool:
    if not isinstance(result, torch.Tensor) or result.shape != expected.shape or result.dtype is not expected.dtype:
        return False
    return torch.allclose(result, expected, rtol=SAME_FORMULA, atol=SAME_FORMULA)


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether somebody waits for calls of the module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
