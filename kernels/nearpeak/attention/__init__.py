"""Attention: fused softmax(query key^T) value."""

from .operator import attention
from .sdpa import scaled_dot_product_attention

__all__ = ["attention", "scaled_dot_product_attention"]
