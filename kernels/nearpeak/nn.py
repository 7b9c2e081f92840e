"""Modules of all families, as drop-in replacements for PyTorch's layers of the same names."""

from .norm import RMSNorm

__all__ = ["RMSNorm"]
