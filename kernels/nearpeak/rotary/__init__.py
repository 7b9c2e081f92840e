"""Rotary position embedding."""

from .operator import apply_rotary

__all__ = ["apply_rotary"]
