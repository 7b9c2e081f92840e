"""The modules that stand in for torch.nn.Linear."""

import torch

from .epilogue import kind_of
from .input_rounding import check_input_bits
from .operator import linear
from .quantized import quantized_linear
from .weights import QuantizedWeight, check_options, quantize_weight


def options_repr(activation, input_bits=None):
    options = {"activation": activation, "input_bits": input_bits}
    return "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` served by `nearpeak.linear`: same constructor, same state dict, same numbers.

    Args:
        activation: what follows the layer, as `nearpeak.activation` names it; None for nothing.
        all others: as torch.nn.Linear takes them.

    Raises:
        ValueError: an activation that is not served.

    >>> layer = nearpeak.nn.Linear(640, 2048, dtype=torch.bfloat16, activation="gelu")
    >>> y = layer(torch.randn(2, 10, 640, dtype=torch.bfloat16))
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, activation=None):
        kind_of(activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self.activation)


class QuantizedLinear(torch.nn.Module):
    """A linear layer with a weight of 8 or 4 bits, served by `nearpeak.quantized_linear`.

    Made empty, to load a state dict into, or from what there is: `from_linear`, `from_weight`. The state dict holds
    the tensors of QuantizedWeight (`codes`, `scales` and, unless symmetric, `zeros`) and `bias`; all of them are kinds
    that safetensors stores. `layer.to(dtype)` casts the bias alone.

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear takes them; dtype is the bias's.
        bits, group_size, symmetric: as `nearpeak.quantize_weight` takes them.
        activation: as nearpeak.nn.Linear takes it.
        input_bits: as `nearpeak.quantized_linear` takes it.

    Raises:
        ValueError: an option that is not served, or in_features that group_size does not divide.

    >>> layer = nearpeak.nn.QuantizedLinear.from_linear(torch.nn.Linear(640, 2048), bits=4)
    >>> y = layer(torch.randn(2, 10, 640))
    """

    def __init__(
        self, in_features, out_features, bias=True, *, bits=8, group_size=64, symmetric=True, activation=None,
        input_bits=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        check_options(bits, group_size)
        check_input_bits(input_bits)
        kind_of(activation)
        self.activation, self.input_bits = activation, input_bits
        if in_features <= 0 or in_features % group_size:
            raise ValueError(f"in_features must be a multiple of group_size {group_size}, not {in_features}")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        groups = out_features, in_features // group_size
        codes = torch.zeros(out_features, in_features * bits // 8, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.zeros(groups, device=device, dtype=torch.float32))
        zeros = None if symmetric else torch.zeros(groups, dtype=torch.uint8, device=device)
        self.register_buffer("zeros", zeros)
        values = torch.nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", values)

    @classmethod
    def from_linear(
        cls,
        module: torch.nn.Linear,
        bits: int = 8,
        group_size: int = 64,
        symmetric: bool = True,
        importance: torch.Tensor | None = None,
        input_bits: int | None = None,
    ) -> "QuantizedLinear":
        """The layer with module's weight quantised, its own bias, and its activation if it is a nearpeak.nn.Linear.

        Raises what `nearpeak.quantize_weight` raises.
        """
        activation = module.activation if isinstance(module, Linear) else None
        weight = quantize_weight(module.weight, bits, group_size, symmetric, importance)
        return cls.from_weight(weight, module.bias, activation, input_bits)

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        input_bits: int | None = None,
    ) -> "QuantizedLinear":
        """The layer of a weight that is quantised already; tensors are shared, not copied."""
        layer = cls(
            weight.in_features, weight.out_features, bits=weight.bits, group_size=weight.group_size,
            symmetric=weight.zeros is None, activation=activation, input_bits=input_bits, bias=bias is not None,
            device="meta",
        )  # fmt: skip
        layer.codes, layer.scales, layer.zeros, _ = weight
        if bias is not None:
            layer.bias = bias if isinstance(bias, torch.nn.Parameter) else torch.nn.Parameter(bias)
        return layer

    @property
    def weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.codes, self.scales, self.zeros, self.bits)

    @property
    def group_size(self) -> int:
        return self.in_features // self.scales.shape[1]

    def _apply(self, function, recurse=True):
        """As any module, but for a cast of the scales, which would change the weight."""
        scales = self.scales
        super()._apply(function, recurse)
        if self.scales.dtype is not torch.float32:
            self.scales = scales.to(self.scales.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_linear(x, self.weight, self.bias, activation=self.activation, input_bits=self.input_bits)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}, symmetric={self.zeros is None}"
            + options_repr(self.activation, self.input_bits)
        )
