"""Positions of tokens in plain PyTorch: embeddings that are added to the input, and biases of attention."""

from .bias import RelativePositionBias, alibi_slopes, relative_position_bucket
from .embeddings import LearnedPositions, SinusoidalPositions

__all__ = [
    "LearnedPositions",
    "RelativePositionBias",
    "SinusoidalPositions",
    "alibi_slopes",
    "relative_position_bucket",
]
