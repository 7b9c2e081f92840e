"""Modules of all families, as drop-in replacements for PyTorch's layers of the same names."""

from .linear import Linear
from .norm import RMSNorm

__all__ = ["Linear", "RMSNorm"]
