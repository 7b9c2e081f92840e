"""The torch operator of linear layers with quantised weights, and its public function.

The weight is a constant: gradients reach x and bias, through the dequantised weight.
"""

import torch

from .. import backends, operators
from ..checks import check_floating, check_same
from . import epilogue, reference
from .gguf_blocks import GgufWeight
from .gguf_operator import gguf_linear
from .input_rounding import check_input_bits
from .operator import check_bias
from .weights import BITS, GROUP_SIZES, QuantizedWeight, dequantized

if backends.missing("triton") is None:
    from . import triton_quantized as triton_kernels
else:
    triton_kernels = None

KERNELS = backends.WITHOUT_CUDA
WEIGHTS = (QuantizedWeight, GgufWeight)


def _check_part(name, tensor, dtype, shape, x):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")
    check_same(name, tensor, "x", x, "device")


def _check(x, codes, scales, zeros, bias, bits, input_bits=None):
    check_floating("x", x)
    if not x.dim():
        raise ValueError("x must have at least one dimension")
    if bits not in BITS:
        raise ValueError(f"bits must be 8 or 4, not {bits!r}")
    for name, tensor in (("codes", codes), ("scales", scales)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
            raise ValueError(f"{name} must be a tensor of two dimensions")
    width, groups = x.shape[-1], scales.shape[1]
    _check_part("codes", codes, torch.uint8, (codes.shape[0], width * bits // 8), x)
    _check_part("scales", scales, torch.float32, (codes.shape[0], groups), x)
    if width not in (groups * size for size in GROUP_SIZES) or width == 0:
        raise ValueError(f"scales must have a column per 32, 64 or 128 of x's {width} features, not {groups} columns")
    if zeros is not None:
        _check_part("zeros", zeros, torch.uint8, scales.shape, x)
    check_bias(bias, x, codes.shape[0])
    check_input_bits(input_bits)


def _check_epilogue(x, codes, scales, zeros, bias, bits, residual, activation, keep, input_bits=None):
    _check(x, codes, scales, zeros, bias, bits, input_bits)
    epilogue.check(x, codes.shape[0], residual, activation)


def _save(ctx, inputs, output):
    _, codes, scales, zeros, _, ctx.bits, _ = inputs
    ctx.save_for_backward(codes, scales, zeros)


def _input_gradient(grad, codes, scales, zeros, bits):
    dtype = operators.accumulation_dtype(grad.dtype)
    weight = dequantized(codes, scales, zeros, bits, dtype).to(grad.dtype)
    return torch.ops.nearpeak.linear_input_gradient(grad, weight)


def _gradient(ctx, grad):
    d_x = _input_gradient(grad, *ctx.saved_tensors, ctx.bits) if ctx.needs_input_grad[0] else None
    d_bias = torch.ops.nearpeak.linear_bias_gradient(grad) if ctx.needs_input_grad[4] else None
    return d_x, None, None, None, d_bias, None, None


def _save_epilogue(ctx, inputs, output):
    _, codes, scales, zeros, _, ctx.bits, _, activation, _, _ = inputs
    epilogue.save(ctx, output, activation, codes, scales, zeros)


def _epilogue_gradient(ctx, grad, _):
    before, *weight = ctx.saved_tensors
    inner = epilogue.gradient_of_product(grad, before, ctx.activation)
    d_x = _input_gradient(inner, *weight, ctx.bits) if ctx.needs_input_grad[0] else None
    d_bias = torch.ops.nearpeak.linear_bias_gradient(inner) if ctx.needs_input_grad[4] else None
    d_residual = grad if ctx.needs_input_grad[6] else None
    return d_x, None, None, None, d_bias, None, d_residual, None, None, None


operators.define(
    "quantized_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int bits, "
    "int? input_bits=None) -> Tensor",
    check=_check,
    reference=reference.quantized_linear,
    triton=triton_kernels and triton_kernels.quantized_linear,
    shapes=lambda x, codes, *others: x.new_empty(*x.shape[:-1], codes.shape[0]),
    backward=_gradient,
    setup_context=_save,
)
operators.define(
    "quantized_linear_epilogue(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int bits, "
    "Tensor? residual, int? activation, bool keep, int? input_bits=None) -> (Tensor, Tensor)",
    check=_check_epilogue,
    reference=reference.quantized_linear_epilogue,
    triton=triton_kernels and triton_kernels.quantized_linear_epilogue,
    shapes=lambda x, codes, scales, zeros, bias, bits, residual, activation, keep, input_bits=None: epilogue.shapes(
        x, codes.shape[0], keep
    ),
    backward=_epilogue_gradient,
    setup_context=_save_epilogue,
)

# Looked up once: each attribute of torch.ops costs 0.1 us a call.
_quantized_linear = torch.ops.nearpeak.quantized_linear.default
_quantized_linear_inference = torch.ops.nearpeak.quantized_linear_inference.default
_epilogue = torch.ops.nearpeak.quantized_linear_epilogue.default
_epilogue_inference = torch.ops.nearpeak.quantized_linear_epilogue_inference.default


def quantized_linear(x, weight, bias=None, *, activation=None, residual=None, input_bits=None):
    """A linear layer with a quantised weight, and what follows it: y = f(x dequantize(weight)^T + bias) + residual.

    The weight is read in its 8 or 4 bits and widened in registers. Of bfloat16 and many rows, processors with units for
    it multiply the weight rounded to bfloat16; else it is not rounded. Sums are float32, and y is rounded once.

    With input_bits, x is rounded too, and codes are multiplied as integers, which takes a fraction of the instructions:
    its groups are the weight's (32 numbers for a GgufWeight), each with max |x| / 127 for its scale.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64; any strides (a dense last dimension is read
            without a copy).
        weight: QuantizedWeight, from `nearpeak.quantize_weight`, or GgufWeight, from `nearpeak.read_gguf`; on x's
            device. There are kernels for GgufWeight on the CPU alone; elsewhere it is dequantised first.
        bias: (out_features,), x's dtype; None for none.
        activation, residual: as `nearpeak.linear` takes them.
        input_bits: 8, or None to take x as it is.

    Returns:
        y, (..., out_features), in x's dtype, contiguous. Under torch.autocast as torch.nn.functional.linear.
        Gradients reach x, bias and residual; that of x as if it were not rounded.

    Raises:
        TypeError: a dtype that is not served, or a weight of another type. ValueError: a shape, device or activation
        that does not fit.

    Sources: weights in groups, products in floating point, as in Frantar et al. 2023, https://arxiv.org/abs/2210.17323;
    products of integers: Jacob et al. 2018, https://arxiv.org/abs/1712.05877.

    >>> weight = nearpeak.quantize_weight(torch.randn(2048, 640), bits=8)
    >>> y = nearpeak.quantized_linear(torch.randn(4, 640, dtype=torch.bfloat16), weight)
    >>> y = nearpeak.quantized_linear(torch.randn(4, 640), weight, input_bits=8)
    """
    if not isinstance(weight, WEIGHTS):
        raise TypeError(
            f"weight must be a nearpeak.QuantizedWeight or nearpeak.GgufWeight, not {type(weight).__name__}"
        )
    kind = epilogue.kind_of(activation)
    if isinstance(x, torch.Tensor) and operators.autocasts(x):
        x, bias = operators.autocast(x), operators.autocast(bias)
        if residual is not None and residual.dtype is not x.dtype:
            return quantized_linear(x, weight, bias, activation=activation, input_bits=input_bits) + residual
    if isinstance(weight, GgufWeight):
        return gguf_linear(x, weight, bias, residual, kind, input_bits)
    return _with_codes((x, *weight[:3], bias, weight.bits), residual, kind, input_bits)


def _with_codes(arguments, residual, kind, input_bits):
    x, bias = arguments[0], arguments[4]
    try:
        if kind is not None or residual is not None:
            return _with_epilogue(arguments, residual, kind, input_bits)
        if backends.reference_serves(x, kernels=KERNELS):
            _check(*arguments, input_bits)
            return reference.quantized_linear(*arguments, input_bits)
        call = _quantized_linear if operators.wants_gradient(x, bias) else _quantized_linear_inference
        return call(*arguments, input_bits)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        _check_epilogue(*arguments, residual, kind, False, input_bits)
        raise


def _with_epilogue(arguments, residual, kind, input_bits):
    x, bias = arguments[0], arguments[4]
    if backends.reference_serves(x, kernels=KERNELS):
        _check_epilogue(*arguments, residual, kind, False, input_bits)
        return reference.quantized_linear_epilogue(*arguments, residual, kind, False, input_bits)[0]
    if operators.wants_gradient(x, bias) or operators.wants_gradient(residual):
        return _epilogue(*arguments, residual, kind, kind is not None, input_bits)[0]
    return _epilogue_inference(*arguments, residual, kind, False, input_bits)[0]
