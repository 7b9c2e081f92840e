"""Puts nearpeak's kernels into an existing model, and takes them out again.

    report = nearpeak.patch(model)      linear layers, norms, activations, rotary embedding, attention: kernels
    nearpeak.unpatch(model)             the model is exactly what it was
    with nearpeak.patched(model): ...   both, around a block
    report = nearpeak.quantize(model)   linear layers get weights of 8 or 4 bits, for good (quantization.py)
    nearpeak.load_gguf(model, path)     a GGUF file's weights, in the file's own format (gguf.py)

Patching shares weights, never copies them, and no other model in the process changes. Each kind of layer has its file:

    linears.py    torch.nn.Linear
    multihead.py  torch.nn.MultiheadAttention
    norms.py      any module that computes RMSNorm or LayerNorm, recognised by what it computes
    feedforward.py  activations and gated feed-forward layers, likewise
    rotary.py     attention modules that call Hugging Face's `apply_rotary_pos_emb`
    attention.py  transformers models, through transformers' own AttentionInterface and AttentionMaskInterface
    classes.py    how one module gets another `forward`;  configs.py: how one model gets another configuration
"""

from .gguf import GgufReport, load_gguf
from .model import patch, patched, register, unpatch
from .quantization import QuantizationReport, QuantizedLayer, quantize
from .report import PatchReport

__all__ = [
    "GgufReport",
    "PatchReport",
    "QuantizationReport",
    "QuantizedLayer",
    "load_gguf",
    "patch",
    "patched",
    "quantize",
    "register",
    "unpatch",
]
