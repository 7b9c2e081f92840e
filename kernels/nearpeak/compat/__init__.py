"""Interfaces of other libraries, served by nearpeak: their names, their signatures, their meaning.

nearpeak.compat.flash_attn      the functions of flash-attn 2.8, on any device
"""

from . import flash_attn

__all__ = ["flash_attn"]
