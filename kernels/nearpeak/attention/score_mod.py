"""Scores of the user's own: what a function makes of each score, as a program that kernels run.

A `score_mod(score, batch, head, query, key)` says what becomes of a score, as in torch's FlexAttention. It is run once
on single numbers, and `trace_score_mod` writes down what it does to them: a few dozen instructions, of which the C++
kernels run each on vectors of scores while these lie in the first-level cache. The derivative is made of the same
instructions (score_derivative.py); gradients flow through the score, and not into tensors that the function looks up.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from .score_derivative import differentiate
from .score_instructions import ARGUMENTS, MOST_VALUES, WIDTH, Program, Value, encoded
from .score_translation import Translator


class ScoreMod(NamedTuple):
    """What a function makes of each score. Made by `trace_score_mod`.

    rows: five numbers for each instruction. The last row says which values are the new score and its derivative with
        respect to the old one, and how many instructions the new score alone needs.
    program: the rows as the kernels are given them, (instructions + 1, 5) of int64 on the CPU.
    tensors: those that the function looks at, contiguous, float32 (float64 where they are) or int32.

    >>> def relative(score, batch, head, query, key):
    ...     return score + 0.1 * (key - query)
    >>> score_mod = nearpeak.trace_score_mod(relative)
    >>> query = torch.randn(1, 2, 20, 64)
    >>> out = nearpeak.attention(query, query, query, score_mod=score_mod)
    """

    rows: tuple[tuple[int, ...], ...]
    program: torch.Tensor
    tensors: tuple[torch.Tensor, ...]


def trace_score_mod(score_mod: Callable | None = None, mask_mod: Callable | None = None) -> ScoreMod:
    """Write down what functions do to one score, for `nearpeak.attention`.

    Args:
        score_mod: takes the score (scaled, and capped where there is a softcap) and four numbers: the batch entry, the
            query's head, and the places of query and key in their tensors. Returns the new score. It may look tensors
            up by these numbers. What they hold is read when `attention` is called, and they get no gradient: a bias
            does. Branches are torch.where; integers have 32 bits.
        mask_mod: takes the four numbers alone, and returns a boolean, False where the query may not look at the key.

    Returns:
        a `ScoreMod`. Tracing takes milliseconds: make it once.

    Raises:
        TypeError: a function returns no tensor of one element. NotImplementedError: an operation that no instruction
        is of, more of them than the kernels hold, or a tensor that wants a gradient.

    FlexAttention: Dong et al. 2024, https://arxiv.org/abs/2412.05496.

    >>> slopes = nearpeak.nn.alibi_slopes(8)
    >>> score_mod = nearpeak.trace_score_mod(lambda score, b, h, q, k: score - slopes[h] * (q - k).abs())
    >>> score_mod = nearpeak.trace_score_mod(mask_mod=nearpeak.masks.causal)
    """
    program = Program()
    score = program.argument("score")
    if score_mod is not None:
        score = program.as_float(_traced(score_mod, program, ARGUMENTS))
    if mask_mod is not None:
        allowed = program.as_truth(_traced(mask_mod, program, ARGUMENTS[1:]))
        score = program.emit("select", "float", allowed, score, program.constant(float("-inf")))
    count = len(program.instructions)
    derivative = differentiate(program, score)
    if len(program.kinds) > MOST_VALUES:
        raise NotImplementedError(
            f"score_mod takes {len(program.kinds)} values with its derivative, more than the {MOST_VALUES} that "
            "kernels hold: pass what does not depend on the score as a bias"
        )
    rows = *map(encoded, program.instructions), (score.number, derivative.number, count, 0, 0)
    return ScoreMod(rows, torch.tensor(rows, dtype=torch.int64), tuple(program.tensors))


def of_functions(score_mod: Callable | ScoreMod | None, mask_mod: Callable | None) -> ScoreMod:
    """What `attention` was given as a program."""
    if isinstance(score_mod, ScoreMod):
        if mask_mod is not None:
            raise ValueError("mask_mod must be given to trace_score_mod, where score_mod is a ScoreMod")
        return score_mod
    for name, function in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, not {type(function).__name__}")
    return trace_score_mod(score_mod, mask_mod)


def check(program, tensors, device):
    if program is None:
        return
    if program.dtype is not torch.int64 or program.dim() != 2 or program.shape[1] != WIDTH or program.shape[0] == 0:
        raise TypeError("score_program must be a ScoreMod's, made by nearpeak.trace_score_mod")
    for tensor in tensors or ():
        if tensor.device != device:
            raise ValueError(f"score_mod must look up tensors on query's device, {device}, not on {tensor.device}")


def _traced(function, program, arguments) -> Value:
    examples = [torch.zeros(1, dtype=torch.float32 if name == "score" else torch.int64) for name in arguments]
    wants_gradients = torch.is_grad_enabled()
    with torch.no_grad():
        graph = make_fx(lambda *numbers: function(*numbers))(*examples)  # functions may have more parameters
    return Translator(graph, program, wants_gradients).result(arguments)
