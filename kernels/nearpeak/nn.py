"""Modules of all families, as drop-in replacements for PyTorch's layers of the same names."""

from .attention.layers import MultiheadAttention
from .linear import Linear
from .norm import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "Linear", "MultiheadAttention", "RMSNorm"]
