"""Modules of all families, as drop-in replacements for PyTorch's layers of the same names; and positions."""

from .attention.layers import MultiheadAttention
from .embedding import Embedding
from .linear import GgufEmbedding, GgufLinear, Linear, LoRALinear, QuantizedLinear
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
    "GgufEmbedding",
    "GgufLinear",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "LoRALinear",
    "MultiheadAttention",
    "QuantizedLinear",
    "RMSNorm",
    "RelativePositionBias",
    "SinusoidalPositions",
    "alibi_slopes",
    "relative_position_bucket",
]
