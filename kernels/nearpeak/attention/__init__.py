"""Attention: fused softmax(query key^T) value."""

from . import torch_provider
from .operator import attention
from .sdpa import scaled_dot_product_attention

torch_provider.register()

__all__ = ["attention", "scaled_dot_product_attention"]
