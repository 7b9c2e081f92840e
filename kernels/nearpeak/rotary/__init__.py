"""Rotary position embedding."""

from .frequencies import RotaryFrequencies, rotary_frequencies
from .operator import apply_rotary
from .tables import rotary_tables

__all__ = ["RotaryFrequencies", "apply_rotary", "rotary_frequencies", "rotary_tables"]
