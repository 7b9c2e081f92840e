"""Linear layers over the blocks of GGUF files, in the shapes and types of Gemma 3 270M's and Llama 3 8B's Q4_K_M files.

Once with x as it is, and once with x rounded to 8 bits. Baselines are what users have today in PyTorch: the weight
dequantised when the file is loaded, which takes two to eight times the memory, or dequantised at each call.
"""

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak.linear import reference
from nearpeak.linear.gguf_blocks import TYPES
from nearpeak.linear.input_rounding import GROUP_OF_BLOCKS, rounded

from .cases import Case, Operator, Work
from .quantized_linear import MOST_NAIVE

# (type, in_features, out_features)
GEMMA = [("Q5_0", 640, 2048), ("Q4_K", 2048, 640), ("Q6_K", 2048, 640), ("Q8_0", 640, 262144)]
LLAMA = [("Q4_K", 4096, 14336), ("Q6_K", 14336, 4096), ("Q4_0", 4096, 4096), ("Q5_K", 4096, 4096)]
ROWS = [1, 16, 512]
QUICK = {
    (torch.float32, None): [(1, "Q5_0", 640), (1, "Q4_K", 4096), (1, "Q6_K", 14336), (1, "Q8_0", 640)],
    (torch.bfloat16, None): [(1, "Q4_K", 4096)],
    (torch.float32, 8): [(1, "Q4_K", 4096), (1, "Q8_0", 640), (16, "Q4_K", 2048)],
    (torch.bfloat16, 8): [],
}


def random_blocks(random, kind, rows, width):
    """Blocks of random codes, with scales that make weights smaller than one."""
    block = TYPES[kind]
    blocks = (random(rows, width // block.weights, block.bytes).float() * 64).to(torch.int32).to(torch.uint8)
    for begin in block.halves:
        blocks[..., begin : begin + 2] = torch.tensor([2.0**-12], dtype=torch.float16).view(torch.uint8)
    return blocks.flatten(1)


def _inputs(random, kind, rows, inputs, outputs):
    return {"x": random(rows, inputs), "blocks": random_blocks(random, kind, outputs, inputs), "kind": kind}


def _dequantized(x, blocks, kind):
    return nearpeak.GgufWeight(blocks, kind).dequantize(x.dtype)


def _operator(itemsize, input_bits):
    """itemsize: of x, in whose elements the weight's bytes are counted."""

    def work(rows, inputs, outputs, kind):
        weight = outputs * inputs * TYPES[kind].bytes / TYPES[kind].weights
        arithmetic = "int8" if input_bits else None
        return Work(2 * rows * inputs * outputs, rows * inputs + weight / itemsize, rows * outputs, arithmetic)

    def exact(x, blocks, kind):
        return reference.gguf_linear(x, blocks, None, TYPES[kind].number, None, None, False, input_bits)[0]

    def plain(x, blocks, kind):
        return F.linear(rounded(x, input_bits, GROUP_OF_BLOCKS).to(x.dtype), _dequantized(x, blocks, kind))

    operator = Operator(
        name="gguf_linear",
        shape="{rows}x{inputs}x{outputs} {kind}" + (", x in 8 bits" if input_bits else ""),
        inputs=_inputs,
        reference=exact,
        plain=plain,
        work={"forward": work},
        kernels={"forward": "gguf_linear_inference", "training": "gguf_linear"},
        differentiable=("x",),
    )

    @operator.implementation("nearpeak")
    def _(x, blocks, kind):
        weight = nearpeak.GgufWeight(blocks, kind)
        return lambda: nearpeak.quantized_linear(x, weight, input_bits=input_bits)

    if input_bits:

        @operator.implementation("x as it is", baseline=True, same_result=False)
        def _(x, blocks, kind):
            weight = nearpeak.GgufWeight(blocks, kind)
            return lambda: nearpeak.quantized_linear(x, weight)

    @operator.implementation("dequantise, F.linear", baseline=True, same_result=not input_bits)
    def _(x, blocks, kind):
        return lambda: F.linear(x, _dequantized(x, blocks, kind))

    @operator.implementation("F.linear", baseline=True, same_result=False)
    def _(x, blocks, kind):
        weight = _dequantized(x, blocks, kind)
        return lambda: F.linear(x, weight)

    return operator


OPERATORS = {(itemsize, input_bits): _operator(itemsize, input_bits) for itemsize in (4, 2) for input_bits in (None, 8)}


def _cases():
    for dtype in (torch.float32, torch.bfloat16):
        for input_bits in (None, 8):
            for kind, inputs, outputs in (*GEMMA, *LLAMA):
                for rows in ROWS:
                    if dtype is torch.float32 or rows * inputs * outputs <= MOST_NAIVE:
                        parameters = {"rows": rows, "inputs": inputs, "outputs": outputs, "kind": kind}
                        operator = OPERATORS[dtype.itemsize, input_bits]
                        yield Case(operator, parameters, dtype, quick=(rows, kind, inputs) in QUICK[dtype, input_bits])


CASES = list(_cases())
