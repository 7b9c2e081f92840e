"""Linear layers: matrix products with a weight, in floating point or quantised."""

from .gguf_blocks import GgufWeight
from .gguf_file import read_gguf
from .gguf_layers import GgufEmbedding, GgufLinear
from .layers import Linear, QuantizedLinear
from .lora import lora_linear
from .lora_layers import LoRALinear
from .operator import linear
from .quantized import quantized_linear
from .weights import QuantizedWeight, quantize_weight

__all__ = [
    "GgufEmbedding",
    "GgufLinear",
    "GgufWeight",
    "Linear",
    "LoRALinear",
    "QuantizedLinear",
    "QuantizedWeight",
    "linear",
    "lora_linear",
    "quantize_weight",
    "quantized_linear",
    "read_gguf",
]
