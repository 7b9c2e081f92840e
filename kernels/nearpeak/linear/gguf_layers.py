"""Modules over the blocks of a GGUF file: a linear layer, and an embedding."""

import torch

from ..operators import accumulation_dtype
from .epilogue import kind_of
from .gguf_blocks import TYPES, GgufWeight, dequantized
from .input_rounding import check_input_bits
from .layers import options_repr
from .quantized import quantized_linear


class _OnBlocks(torch.nn.Module):
    """What both share: the blocks as a buffer that no state dict holds, since the file does."""

    def __init__(self, weight: GgufWeight):
        super().__init__()
        if not isinstance(weight, GgufWeight):
            raise TypeError(f"weight must be a nearpeak.GgufWeight, not {type(weight).__name__}")
        self.kind = weight.kind
        self.register_buffer("blocks", weight.blocks, persistent=False)

    @property
    def weight(self) -> GgufWeight:
        return GgufWeight(self.blocks, self.kind)


class GgufLinear(_OnBlocks):
    """A linear layer over the blocks of a GGUF file, served by `nearpeak.quantized_linear`.

    The file's bytes are read where they are mapped; they are no part of the state dict.

    Args:
        weight: from `nearpeak.read_gguf`.
        bias: (out_features,), a floating dtype; None for none.
        activation: as nearpeak.nn.Linear takes it.
        input_bits: as `nearpeak.quantized_linear` takes it.

    Raises:
        TypeError: a weight of another type. ValueError: an option that is not served.

    >>> layer = nearpeak.nn.GgufLinear(nearpeak.read_gguf("model.gguf")["blk.0.ffn_up.weight"])
    >>> y = layer(torch.randn(2, 10, layer.in_features))
    """

    def __init__(
        self,
        weight: GgufWeight,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        input_bits: int | None = None,
    ):
        super().__init__(weight)
        kind_of(activation)
        check_input_bits(input_bits)
        self.activation, self.input_bits = activation, input_bits
        is_parameter = bias is None or isinstance(bias, torch.nn.Parameter)
        self.register_parameter("bias", bias if is_parameter else torch.nn.Parameter(bias))

    @property
    def in_features(self) -> int:
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        return self.weight.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_linear(x, self.weight, self.bias, activation=self.activation, input_bits=self.input_bits)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kind={self.kind!r}" + options_repr(self.activation, self.input_bits)
        )


class GgufEmbedding(_OnBlocks):
    """An embedding whose table is the blocks of a GGUF file:  y = scale * table[id], for constant tables.

    Args:
        weight: from `nearpeak.read_gguf`.
        scale: a factor of every row, as Gemma has it.
        dtype: of y; `layer.to(dtype)` changes it.

    Raises:
        TypeError: a weight of another type.

    >>> layer = nearpeak.nn.GgufEmbedding(nearpeak.read_gguf("model.gguf")["token_embd.weight"], scale=640**0.5)
    >>> y = layer(torch.tensor([[2, 17, 42]]))
    """

    def __init__(self, weight: GgufWeight, scale: float = 1.0, dtype: torch.dtype = torch.float32):
        super().__init__(weight)
        # As a buffer, which has the dtype that the module is cast to.
        self.register_buffer("scale", torch.tensor(scale, dtype=dtype, device=weight.blocks.device), persistent=False)

    @property
    def num_embeddings(self) -> int:
        return self.weight.out_features

    @property
    def embedding_dim(self) -> int:
        return self.weight.in_features

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        dtype = accumulation_dtype(self.scale.dtype)
        rows = dequantized(torch.nn.functional.embedding(ids, self.blocks), TYPES[self.kind].number, dtype)
        return (rows * self.scale.to(dtype)).to(self.scale.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, kind={self.kind!r}, scale={self.scale.item():g}"
