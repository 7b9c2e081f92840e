"""Rotary embedding inside attention modules that call a global function `apply_rotary_pos_emb`, as all of Hugging
Face's do.

Every model of an architecture looks up the same global, so replacing that would change all of them. Instead a
served module's `forward` is its class's code over a copy of those globals, in which this one name means ours.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import backends
from ..rotary import apply_rotary
from ..rotary.reference import apply_rotary as reference_apply_rotary
from .classes import serving_subclass

NAME = "apply_rotary_pos_emb"

# Tells conventions apart, and is no measure of exactness: see norms.py.
SAME_FORMULA = 1e-5


class Form(NamedTuple):
    """What an `apply_rotary_pos_emb` was found to compute."""

    interleaved: bool  # which elements make a pair: neighbours, or one of each half
    halves_repeat: bool  # in its tables of full width each angle stands once in each half, or else twice in a row
    partial: bool = False  # tables narrower than head_dim turn a head's first elements and leave the others

    @property
    def detail(self) -> str:
        return "nearpeak.apply_rotary" + (", interleaved" if self.interleaved else "")


@functools.cache
def serving_class(base: type, original: Callable, form: Form) -> type:
    """The subclass of the attention class `base` whose forward turns query and key by `nearpeak.apply_rotary`."""
    forward = _rebuilt(base.forward, _replacement(original, form))
    return serving_subclass(base, forward, serving_class, (base, original, form))


def _rebuilt(function: types.FunctionType, replacement: Callable) -> types.FunctionType:
    """`function`, and the decorators around it, over globals in which NAME means `replacement`."""
    names, closure = function.__globals__, function.__closure__
    inner = None if NAME in function.__code__.co_names else _rebuilt(function.__wrapped__, replacement)
    if inner is None:
        names = {**names, NAME: replacement}
        # torch.compile takes the globals of a function that has a __name__ for its module's, and guards on those.
        names.pop("__name__", None)
    else:
        closure = tuple(types.CellType(inner) if _holds(cell, function.__wrapped__) else cell for cell in closure)
    rebuilt = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    rebuilt.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(rebuilt, function)
    del rebuilt.__wrapped__
    if inner is not None:
        rebuilt.__wrapped__ = inner
    return rebuilt


def _holds(cell: types.CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False


def _replacement(original: Callable, form: Form) -> Callable:
    @functools.wraps(original)
    def apply_rotary_pos_emb(q, k, cos, sin, *others, **named):
        if others or named or not _fits(q, k, cos, sin, form):
            backends.because(f"the call of {NAME} has a form that the kernels do not serve: {original.__module__} does")
            return original(q, k, cos, sin, *others, **named)
        rotary_dim = cos.shape[-1]
        if form.interleaved and form.halves_repeat:
            cos, sin = cos[..., : rotary_dim // 2], sin[..., : rotary_dim // 2]
        return apply_rotary(q, k, cos, sin, interleaved=form.interleaved, rotary_dim=rotary_dim)

    return apply_rotary_pos_emb


def _fits(q, k, cos, sin, form: Form) -> bool:
    """Whether `nearpeak.apply_rotary` means the same as Hugging Face's function for these arguments."""
    if not q.dim() == k.dim() == 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    batch, _, sequence, head_dim = q.shape
    return (
        q.dtype is k.dtype is cos.dtype is sin.dtype
        and k.shape[0] == batch
        and k.shape[2:] == q.shape[2:]
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == sequence
        and (cos.shape[2] == head_dim or (form.partial and 0 < cos.shape[2] < head_dim))
        and q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
    )


def calls_rotary(module: torch.nn.Module) -> bool:
    """Whether the module's forward, or what it wraps, calls a global `apply_rotary_pos_emb`."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and NAME in code.co_names


def original_of(module: torch.nn.Module) -> Callable | None:
    """The function that the module's forward calls, where that forward can be rebuilt over other globals.

    Decorators around it are rebuilt too, as long as each keeps what it wraps in its closure, as functools.wraps has it.
    """
    function = type(module).forward
    while isinstance(function, types.FunctionType):
        if NAME in function.__code__.co_names:
            return function.__globals__.get(NAME)
        inner = getattr(function, "__wrapped__", None)
        if not any(_holds(cell, inner) for cell in function.__closure__ or ()):
            return None
        function = inner
    return None


@torch.no_grad()
def form_of(function: Callable) -> Form | None:
    """What `function` was found to compute; None if it is another function."""
    for form in (Form(False, True), Form(True, False), Form(True, True)):
        if _computes(function, form, head_dim=8, rotary_dim=8):
            return form._replace(partial=_computes(function, form, head_dim=12, rotary_dim=8))
    return None


def _computes(function: Callable, form: Form, head_dim: int, rotary_dim: int) -> bool:
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, head_dim, generator=random, device="cpu") for heads in (2, 1))
    angles = torch.rand(1, 3, rotary_dim // 2, generator=random, device="cpu")
    table = torch.cat((angles, angles), dim=-1) if form.halves_repeat else angles.repeat_interleave(2, dim=-1)
    expected = reference_apply_rotary(q, k, angles.cos(), angles.sin(), form.interleaved, False, rotary_dim)
    try:
        q_turned, k_turned = function(q, k, table.cos(), table.sin())
    except Exception:  # an unknown function may raise anything
        return False
    return _same(q_turned, expected[0]) and _same(k_turned, expected[1])


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=SAME_FORMULA, atol=SAME_FORMULA)
