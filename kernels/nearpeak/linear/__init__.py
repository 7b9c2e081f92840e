"""Linear layers: matrix products with a weight."""

from .layers import Linear
from .operator import linear

__all__ = ["Linear", "linear"]
