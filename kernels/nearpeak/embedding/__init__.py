"""Embeddings: tokens, positions and segments, with layer normalisation and dropout."""

from .layers import Embedding
from .operator import embedding

__all__ = ["Embedding", "embedding"]
