"""Linear layers: matrix products with a weight, in floating point or quantised."""

from .gguf import read_gguf
from .layers import Linear, QuantizedLinear
from .operator import linear
from .quantized import quantized_linear
from .weights import QuantizedWeight, quantize_weight

__all__ = ["Linear", "QuantizedLinear", "QuantizedWeight", "linear", "quantize_weight", "quantized_linear", "read_gguf"]
