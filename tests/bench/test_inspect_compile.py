"""What `nearpeak inspect` says of compiled kernels, held against what their source says they must do."""

import re

import pytest
import torch

pytest.importorskip("triton")

import triton
from nearpeak import triton_launch
from nearpeak_bench.inspect import compiling
from nearpeak_bench.inspect.code import compile_case
from nearpeak_bench.inspect.compiling import Case
from nearpeak_bench.inspect.occupancy import occupancy
from nearpeak_bench.inspect.ours import attention_case, norm_case
from nearpeak_bench.inspect.targets import TARGETS
from triton import language as tl

HEAD_DIM, WIDTH = 128, 4096
OPTIONS = triton_launch.OPTIONS
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("sm_86", "sm_89", "sm_100", "sm_120", "gfx942")]


@pytest.fixture
def launched(monkeypatch):
    """The constants with which each kernel was launched."""
    found = []
    run = triton.JITFunction.run

    def recording(kernel, *arguments, **options):
        found.append(options)
        return run(kernel, *arguments, **options)

    monkeypatch.setattr(triton.JITFunction, "run", recording)
    return found


@pytest.mark.parametrize("target", ["sm_80", "sm_90", *OTHERS])
def test_an_iteration_of_attention_is_two_products_of_a_tile(target, launched):
    """scores = query key^T and out = probabilities value: 2 M N D operations each, by hand."""
    (code,) = compile_case(attention_case(HEAD_DIM, torch.bfloat16), TARGETS[target])
    rows, keys = launched[0]["BLOCK_M"], launched[0]["BLOCK_N"]
    loop = code.loop
    assert loop.looped
    assert loop.unknown == 0
    assert loop.flops == 4 * rows * keys * HEAD_DIM
    assert loop.loaded == 2 * keys * HEAD_DIM * 2, "a tile of keys and one of values, of 2 bytes each"
    assert loop.stored == 0
    assert loop.cycles["matrix"] == loop.flops / TARGETS[target].rates.matrix["16-bit"]


@pytest.mark.parametrize(("target", "products"), [("sm_80", 128), ("sm_90", 12)])
def test_the_instructions_of_attentions_loop_counted_by_hand(target, products):
    """8 warps, a tile of 128 x 64: 32 scores a thread and the decay of its two rows each take one exponential.

    sm_80: each warp multiplies 16 rows by m16n8k16: 64 / 8 x 128 / 16 for the scores, as many for the output.
    sm_90: each group of four warps multiplies 64 rows: 128 / 16 of m64n64k16, and 64 / 16 of m64n128k16.
    """
    (code,) = compile_case(attention_case(HEAD_DIM, torch.bfloat16), TARGETS[target])
    assert code.warps == 8
    assert code.loop.counts["matrix"] == products
    assert code.loop.mix["MUFU"] == 32 + 2
    assert code.loop.mix["SHFL"] == 2 * 2 * 2, "two rows, maximum and sum, over four threads"
    assert code.loop.cycles["xu"] == 34 * 8 * 32 / 16


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_traffic_of_the_norm_is_its_tensors(target):
    row = WIDTH * 2
    (forward,) = compile_case(norm_case(WIDTH, torch.bfloat16, "forward"), TARGETS[target])
    assert not forward.loop.looped, "a row of this width stays in registers"
    assert (forward.loop.loaded, forward.loop.stored) == (2 * row, row), "x and the weight in, y out"
    backward, sums = compile_case(norm_case(WIDTH, torch.bfloat16, "backward"), TARGETS[target])
    assert (backward.loop.loaded, backward.loop.stored) == (4 * row, row), "two gradients, hidden and weight in"
    assert (forward.kernel, sums.launch) == ("_forward", 1)
    assert forward.loop.flops == backward.loop.flops == 0
    assert forward.loop.cached > 0, "memory is the bound"


def test_occupancy_is_what_amds_compiler_says():
    target = TARGETS["gfx942"]
    (compiled,) = compiling.compile_launches(attention_case(HEAD_DIM, torch.bfloat16), target)
    (code,) = compile_case(attention_case(HEAD_DIM, torch.bfloat16), target)
    waves_of_a_simd = int(re.search(r"; Occupancy: (\d+)", compiled.kernel.asm["amdgcn"]).group(1))
    assert occupancy(target, code.warps, code.registers, 0).programs * code.warps == 4 * waves_of_a_simd


@triton.jit
def multiply(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr):
    row, column = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    sums = tl.zeros([M, N], SUMS)
    for start in range(0, K, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + row * K + inner[None, :])
        b = tl.load(b_ptr + inner[:, None] * N + column)
        sums = tl.dot(a, b, sums, out_dtype=SUMS)
    tl.store(c_ptr + row * N + column, sums)


TYPES = {
    "16-bit": (torch.float16, tl.float32, torch.float32),
    "16-bit, 16-bit sums": (torch.float16, tl.float16, torch.float16),
    "tf32": (torch.float32, tl.float32, torch.float32),
    "8-bit": (torch.float8_e5m2, tl.float32, torch.float32),
    "int8": (torch.int8, tl.int32, torch.int32),
    "float64": (torch.float64, tl.float64, torch.float64),
}
WITHOUT_UNITS = {("float64", name) for name in ("sm_86", "sm_89", "sm_120")}
PRODUCTS = [(kind, target) for kind in TYPES for target in TARGETS if (kind, target) not in WITHOUT_UNITS]
QUICK_PRODUCTS = [("16-bit", "sm_100"), ("16-bit", "gfx942"), ("8-bit", "sm_90"), ("int8", "sm_80")]


@pytest.mark.parametrize(
    ("kind", "target"),
    [pytest.param(*pair, marks=() if pair in QUICK_PRODUCTS else pytest.mark.slow) for pair in PRODUCTS],
)
def test_operations_of_a_matrix_product_of_any_type(kind, target):
    size, block = 128, 64
    operands, sums, out = TYPES[kind]
    a, c = (torch.empty(size, 4096, dtype=dtype, device="meta") for dtype in (operands, out))
    case = Case("product", lambda: multiply[(1,)](a, a, c, 4096, size, size, block, sums, num_warps=8, **OPTIONS))
    (code,) = compile_case(case, TARGETS[target])
    assert code.loop.flops == 2 * size * size * block
    assert code.loop.unknown == 0
    assert code.loop.loaded == 2 * size * block * operands.itemsize


@triton.autotune([triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((512, 2), (1024, 4))], key=[])
@triton.jit
def increase(x_ptr, length, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + place, tl.load(x_ptr + place, mask=place < length) + 1, mask=place < length)


def test_an_autotuned_kernel_is_compiled_in_every_configuration():
    x = torch.empty(8192, device="meta")
    codes = compile_case(Case("increase", lambda: increase[(8,)](x, 8192, **OPTIONS)), TARGETS["sm_90"])
    assert [(code.warps, code.configuration.split()[0]) for code in codes] == [(2, "BLOCK=512"), (4, "BLOCK=1024")]
    assert len({code.key for code in codes}) == 2
