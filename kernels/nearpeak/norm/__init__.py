"""Normalisation: RMSNorm with fused residual addition."""

from .layers import RMSNorm
from .operator import rms_norm

__all__ = ["RMSNorm", "rms_norm"]
