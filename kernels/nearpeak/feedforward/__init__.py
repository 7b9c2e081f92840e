"""Feed-forward activations, alone or gating a second input."""

from .operator import activation, geglu, reglu, swiglu

__all__ = ["activation", "geglu", "reglu", "swiglu"]
