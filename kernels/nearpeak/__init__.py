"""nearpeak: fused Transformer kernels for PyTorch, with the same numbers as the plain layers."""

from . import compat, nn
from .attention import (
    BlockMask,
    ScoreMod,
    attention,
    create_block_mask,
    masks,
    merge_attention,
    scaled_dot_product_attention,
    trace_score_mod,
)
from .backends import use_backend, use_isa
from .embedding import embedding
from .explain import explain
from .feedforward import activation, geglu, reglu, swiglu
from .linear import GgufWeight, QuantizedWeight, linear, lora_linear, quantize_weight, quantized_linear, read_gguf
from .norm import layer_norm, qk_norm, rms_norm
from .patching import GgufReport, PatchReport, QuantizationReport, load_gguf, patch, patched, quantize, unpatch
from .rotary import apply_rotary, rotary_frequencies, rotary_tables
from .version import __version__

__all__ = [
    "BlockMask",
    "GgufReport",
    "GgufWeight",
    "PatchReport",
    "QuantizationReport",
    "QuantizedWeight",
    "ScoreMod",
    "__version__",
    "activation",
    "apply_rotary",
    "attention",
    "compat",
    "create_block_mask",
    "embedding",
    "explain",
    "geglu",
    "layer_norm",
    "linear",
    "load_gguf",
    "lora_linear",
    "masks",
    "merge_attention",
    "nn",
    "patch",
    "patched",
    "qk_norm",
    "quantize",
    "quantize_weight",
    "quantized_linear",
    "read_gguf",
    "reglu",
    "rms_norm",
    "rotary_frequencies",
    "rotary_tables",
    "scaled_dot_product_attention",
    "swiglu",
    "trace_score_mod",
    "unpatch",
    "use_backend",
    "use_isa",
]
