"""Normalisation: RMSNorm and LayerNorm, with fused residual addition."""

from .layers import LayerNorm, RMSNorm
from .operator import layer_norm, rms_norm

__all__ = ["LayerNorm", "RMSNorm", "layer_norm", "rms_norm"]
