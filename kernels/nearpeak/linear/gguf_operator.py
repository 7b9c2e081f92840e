"""The torch operator of linear layers whose weight is a GGUF file's blocks.

The weight is a constant, as in quantized.py. The kernels are the CPU's: elsewhere the weight is dequantised first.
"""

import torch

from .. import backends, operators
from ..checks import check_floating, check_same
from . import epilogue, reference
from .gguf_blocks import NAMES, TYPES, GgufWeight, dequantized
from .input_rounding import check_input_bits
from .operator import check_bias

KERNELS = ("cpu",)


def _check(x, blocks, bias, kind, residual, activation, keep, input_bits=None):
    check_floating("x", x)
    if not x.dim():
        raise ValueError("x must have at least one dimension")
    if kind not in NAMES:
        raise ValueError(f"kind must be the number of one of {', '.join(TYPES)}, not {kind!r}")
    if not isinstance(blocks, torch.Tensor) or blocks.dtype is not torch.uint8:
        raise TypeError("blocks must be a torch.Tensor of torch.uint8")
    check_same("blocks", blocks, "x", x, "device")
    name, width = NAMES[kind], x.shape[-1]
    block = TYPES[name]
    if width == 0 or width % block.weights:
        raise ValueError(f"x must have whole blocks of {block.weights} features for {name}, not {width} features")
    if blocks.dim() != 2 or blocks.shape[1] != width // block.weights * block.bytes:
        raise ValueError(
            f"blocks must have shape (out_features, {width // block.weights * block.bytes}) for x's {width} features "
            f"in {name}, not {tuple(blocks.shape)}"
        )
    check_bias(bias, x, blocks.shape[0])
    epilogue.check(x, blocks.shape[0], residual, activation)
    check_input_bits(input_bits)


def _save(ctx, inputs, output):
    _, blocks, _, ctx.kind, _, activation, _, _ = inputs
    epilogue.save(ctx, output, activation, blocks)


def _gradient(ctx, grad, _):
    before, blocks = ctx.saved_tensors
    inner = epilogue.gradient_of_product(grad, before, ctx.activation)
    d_x = None
    if ctx.needs_input_grad[0]:
        weight = dequantized(blocks, ctx.kind, operators.accumulation_dtype(grad.dtype)).to(grad.dtype)
        d_x = torch.ops.nearpeak.linear_input_gradient(inner, weight)
    d_bias = torch.ops.nearpeak.linear_bias_gradient(inner) if ctx.needs_input_grad[2] else None
    return d_x, None, d_bias, None, grad if ctx.needs_input_grad[4] else None, None, None, None


operators.define(
    "gguf_linear(Tensor x, Tensor blocks, Tensor? bias, int kind, Tensor? residual, int? activation, bool keep, "
    "int? input_bits=None) -> (Tensor, Tensor)",
    check=_check,
    reference=reference.gguf_linear,
    shapes=lambda x, blocks, bias, kind, residual, activation, keep, input_bits=None: epilogue.shapes(
        x, blocks.shape[0], keep
    ),
    backward=_gradient,
    setup_context=_save,
)

# Looked up once: each attribute of torch.ops costs 0.1 us a call.
_gguf_linear = torch.ops.nearpeak.gguf_linear.default
_gguf_linear_inference = torch.ops.nearpeak.gguf_linear_inference.default


def gguf_linear(x: torch.Tensor, weight: GgufWeight, bias, residual, activation, input_bits) -> torch.Tensor:
    """What quantized_linear does with such a weight; activation: its number."""
    if weight.kind not in TYPES:
        raise ValueError(f"weight's kind must be one of {', '.join(TYPES)}, not {weight.kind!r}")
    arguments = x, weight.blocks, bias, TYPES[weight.kind].number, residual, activation
    try:
        if backends.reference_serves(x, kernels=KERNELS):
            _check(*arguments, False, input_bits)
            return reference.gguf_linear(*arguments, False, input_bits)[0]
        if operators.wants_gradient(x, bias) or operators.wants_gradient(residual):
            return _gguf_linear(*arguments, activation is not None, input_bits)[0]
        return _gguf_linear_inference(*arguments, False, input_bits)[0]
    except (AttributeError, IndexError, RuntimeError, TypeError):
        _check(*arguments, False, input_bits)
        raise
