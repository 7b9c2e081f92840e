"""Attention: fused softmax(query key^T) value."""

from . import torch_provider
from .merge import merge_attention
from .operator import attention
from .sdpa import scaled_dot_product_attention

torch_provider.register()

__all__ = ["attention", "merge_attention", "scaled_dot_product_attention"]
