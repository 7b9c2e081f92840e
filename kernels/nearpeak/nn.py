"""Modules of all families, as drop-in replacements for PyTorch's layers of the same names; and positions."""

from .attention.layers import MultiheadAttention
from .embedding import Embedding
from .linear import Linear, QuantizedLinear
from .norm import LayerNorm, RMSNorm
from .positions import (
    LearnedPositions,
    RelativePositionBias,
    SinusoidalPositions,
    alibi_slopes,
    relative_position_bucket,
)

__all__ = [
    "Embedding",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "MultiheadAttention",
    "QuantizedLinear",
    "RMSNorm",
    "RelativePositionBias",
    "SinusoidalPositions",
    "alibi_slopes",
    "relative_position_bucket",
]
