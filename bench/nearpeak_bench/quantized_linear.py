"""Linear layers with weights of 8 and 4 bits, in the shapes of Gemma 3 270M and Llama 3 8B: decoding and prefill.

Once with x as it is, and once with x rounded to 8 bits. Baselines are what users have today: the float layer,
dequantising at each call, and torch's own weight-only operators for the CPU. Not all give the same result: the float
layer's weight is not rounded, torch's operator for 8 bits knows one scale a row only, and the one for 4 bits rounds
scales to x's dtype.
"""

import itertools

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak.linear import reference
from nearpeak.linear.input_rounding import rounded
from nearpeak.linear.weights import unpack

from .cases import Case, Operator, Work

GROUP_SIZE = 64
GEMMA = [(640, 1024), (640, 2048), (2048, 640), (640, 262144)]
LLAMA = [(4096, 1024), (4096, 4096), (4096, 14336), (14336, 4096)]
ROWS = [1, 16, 512]
BITS = [8, 4]

# (rows, in_features, out_features)
QUICK = {
    (torch.float32, None): [(1, 640, 2048), (1, 4096, 14336), (512, 640, 2048)],
    (torch.bfloat16, None): [(1, 4096, 14336)],
    (torch.float32, 8): [(1, 4096, 14336), (512, 640, 2048)],
    (torch.bfloat16, 8): [],
}

# Multiply-adds of a case in 16 bits at most: where the processor has no units for it, torch's loop takes seconds.
MOST_NAIVE = 2**30


def _inputs(random, rows, inputs, outputs, bits):
    codes, scales, _, _ = nearpeak.quantize_weight(random(outputs, inputs), bits, GROUP_SIZE)
    return {"x": random(rows, inputs), "codes": codes, "scales": scales, "bits": bits}


def _weight(codes, scales, bits):
    return nearpeak.QuantizedWeight(codes, scales, None, bits)


def _dequantized_first(x, codes, scales, bits):
    return F.linear(x, _weight(codes, scales, bits).dequantize(x.dtype))


def _operator(bits, itemsize, input_bits):
    """itemsize: of x, in whose elements the weight's bytes are counted."""

    def work(rows, inputs, outputs, bits):
        weight = outputs * (inputs * bits / 8 + inputs / GROUP_SIZE * 4)
        arithmetic = "int8" if input_bits else None
        return Work(2 * rows * inputs * outputs, rows * inputs + weight / itemsize, rows * outputs, arithmetic)

    def exact(x, codes, scales, bits):
        return reference.quantized_linear(x, codes, scales, None, None, bits, input_bits)

    def plain(x, codes, scales, bits):
        return _dequantized_first(rounded(x, input_bits, GROUP_SIZE).to(x.dtype), codes, scales, bits)

    operator = Operator(
        name="quantized_linear",
        shape="{rows}x{inputs}x{outputs} {bits} bits" + (", x in 8" if input_bits else ""),
        inputs=_inputs,
        reference=exact,
        plain=plain,
        work={"forward": work},
        kernels={"forward": "quantized_linear_inference", "training": "quantized_linear"},
        differentiable=("x",),
    )

    @operator.implementation("nearpeak")
    def _(x, codes, scales, bits):
        weight = _weight(codes, scales, bits)
        return lambda: nearpeak.quantized_linear(x, weight, input_bits=input_bits)

    if input_bits:

        @operator.implementation("x as it is", baseline=True, same_result=False)
        def _(x, codes, scales, bits):
            weight = _weight(codes, scales, bits)
            return lambda: nearpeak.quantized_linear(x, weight)

    @operator.implementation("dequantise, F.linear", baseline=True, same_result=not input_bits)
    def _(x, codes, scales, bits):
        return lambda: _dequantized_first(x, codes, scales, bits)

    @operator.implementation("F.linear", baseline=True, same_result=False)
    def _(x, codes, scales, bits):
        weight = _weight(codes, scales, bits).dequantize(x.dtype)
        return lambda: F.linear(x, weight)

    operator.implementation("torch's operator", baseline=True, same_result=False)(_torch_8 if bits == 8 else _torch_4)
    return operator


def _torch_8(x, codes, scales, bits):
    signed, scale = (codes.to(torch.int16) - 128).to(torch.int8), scales[:, 0].to(x.dtype)
    return lambda: torch._weight_int8pack_mm(x, signed, scale)


def _torch_4(x, codes, scales, bits):
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(codes).int(), 1)
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).to(x.dtype).contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, scales_and_zeros)


OPERATORS = {
    (bits, itemsize, input_bits): _operator(bits, itemsize, input_bits)
    for itemsize in (4, 2)
    for bits in BITS
    for input_bits in (None, 8)
}


def _cases():
    for dtype in (torch.float32, torch.bfloat16):
        for bits, input_bits in itertools.product(BITS, (None, 8)):
            for inputs, outputs in (*GEMMA, *LLAMA):
                for rows in ROWS:
                    if dtype is torch.float32 or rows * inputs * outputs <= MOST_NAIVE:
                        parameters = {"rows": rows, "inputs": inputs, "outputs": outputs, "bits": bits}
                        operator = OPERATORS[bits, dtype.itemsize, input_bits]
                        yield Case(
                            operator, parameters, dtype, quick=(rows, inputs, outputs) in QUICK[dtype, input_bits]
                        )


CASES = list(_cases())
