"""Normalisation: RMSNorm and LayerNorm, with fused residual addition."""

from .layers import LayerNorm, RMSNorm
from .operator import layer_norm, rms_norm
from .qk_norm import qk_norm

__all__ = ["LayerNorm", "RMSNorm", "layer_norm", "qk_norm", "rms_norm"]
