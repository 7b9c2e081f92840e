"""Attention: fused softmax(query key^T) value."""

from . import masks, torch_provider
from .block_mask import BlockMask, create_block_mask
from .merge import merge_attention
from .operator import attention
from .score_mod import ScoreMod, trace_score_mod
from .sdpa import scaled_dot_product_attention

torch_provider.register()

__all__ = [
    "BlockMask",
    "ScoreMod",
    "attention",
    "create_block_mask",
    "masks",
    "merge_attention",
    "scaled_dot_product_attention",
    "trace_score_mod",
]
