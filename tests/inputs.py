"""Inputs of the tests: seeded tensors, layouts in memory that users have, and random cases for properties."""

from typing import NamedTuple

import hypothesis
import pytest
import torch

DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, id="float16"),
]


class Examples(NamedTuple):
    """How many random cases a property is tested on, and on how many draws of each exactness is judged."""

    cases: int
    draws: int


# Of many cases some are degenerate: the more there are, the more draws each needs.
EXAMPLES = [
    pytest.param(Examples(cases=12, draws=8), id="quick"),
    pytest.param(Examples(cases=100, draws=64), id="wide", marks=pytest.mark.slow),
]


def case_name(case):
    """What a case, a named tuple, has beside its defaults: its name among a test's parameters."""
    return "-".join(f"{name}={value}" for name, value in case._asdict().items() if value != case._field_defaults[name])


def some_by_default(cases, step, name=case_name):
    """Every step-th case; the others are run before a release. For Triton's interpreter, which takes seconds a case."""
    return [
        pytest.param(case, id=name(case), marks=() if index % step == 0 else pytest.mark.slow)
        for index, case in enumerate(cases)
    ]


def randn(*shape, dtype=torch.float32, seed=0, magnitude=1.0):
    """Normal random numbers that depend on shape and seed only, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * magnitude).to(dtype)


def misaligned(tensor):
    """The same numbers at an odd offset of a larger storage: no vector load is aligned."""
    storage = tensor.new_empty(tensor.numel() + 1)
    return storage[1:].view(tensor.shape).copy_(tensor)


def sequence_first(tensor):
    """(batch, heads, sequence, dim) stored as (batch, sequence, heads, dim), as flash-attn and projections do."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def padded(tensor):
    """The same numbers as the middle part of longer rows: dense in the last dimension, and nowhere else."""
    wide = tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] + 3)
    return wide[..., 1:-2].copy_(tensor)


def every_second(tensor):
    """The same numbers with gaps of one element in the last dimension."""
    wide = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1])
    return wide[..., ::2].copy_(tensor)


def laid_out_like(tensor, like):
    """Whether tensor is dense, its outer dimensions in memory in the order of like's strides, its last innermost."""
    order = sorted(range(like.dim() - 1), key=like.stride, reverse=True)
    return tensor.permute(*order, tensor.dim() - 1).is_contiguous()


def for_all(examples, **strategies):
    """Run the decorated check at once on random cases; they are the same ones in every run."""
    settings = hypothesis.settings(max_examples=examples.cases, deadline=None, derandomize=True)

    def run(check):
        settings(hypothesis.given(**strategies)(check))()

    return run
