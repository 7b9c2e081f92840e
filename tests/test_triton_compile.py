"""Every Triton kernel compiles for every target without a GPU, and its machine code is what it should be."""

import pytest
import torch

pytest.importorskip("triton")

import nearpeak
import triton
from nearpeak.attention import triton_attention
from nearpeak_bench.inspect.code import compile_case
from nearpeak_bench.inspect.compiling import Case
from nearpeak_bench.inspect.ours import (
    EMBEDDING_DIRECTIONS,
    attention_backward_case,
    attention_case,
    embedding_case,
    every_case,
    feedforward_case,
    norm_case,
    qk_norm_case,
    quantized_linear_case,
    rotary_case,
)
from nearpeak_bench.inspect.targets import TARGETS

BFLOAT, SINGLE = torch.bfloat16, torch.float32

# Bytes a thread. The tiles are chosen for current compilers: before 3.7 some kernels keep a few words in memory, at
# most 24 bytes in CHOSEN and in a sample of EVERY.
MOST_SPILLED = 32 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 0

TERMS = ("mask", "bias", "alibi", "sinks")


def attention_terms_case(
    options, head_dim=128, dtype=BFLOAT, value_dim=None, length=4096, window=(None, 0), softcap=None, backward=False
):
    """A call with some of TERMS, "row_bias" (one for all positions), "ranges" of keys, "packed" sequences (with
    "shared" keys) or "dropout".

    Of an odd length nothing of a mask or bias is aligned.
    """
    batch = 1 if "packed" in options else 2

    def empty(*shape, of=dtype):
        return torch.empty(*shape, dtype=of, device="meta")

    query, key = empty(batch, 32, length, head_dim), empty(batch, 8, length, head_dim)
    value, out = (empty(*tensor.shape[:3], value_dim or head_dim) for tensor in (key, query))
    lse = empty(*query.shape[:3], of=SINGLE)
    terms = {
        "mask": empty(batch, 1, length, length, of=torch.bool),
        "bias": empty(1, 32, length, length),
        "alibi": empty(32, of=SINGLE),
        "sinks": empty(32),
    }
    terms = [terms[name] if name in options else None for name in TERMS]
    if "row_bias" in options:
        terms[1] = empty(batch, 1, 1, length)
    starts = [empty(9, of=torch.int32)] * 2 if "packed" in options else [None, None]
    ends = empty(batch, of=torch.int32) if "ranges" in options else None
    ends = empty(8, of=torch.int32) if "shared" in options else ends
    dropping = (torch.empty((), dtype=torch.int64, device="meta"), 0.1) if "dropout" in options else (None, 0.0)
    arguments = *window, head_dim**-0.5, softcap, *terms, *starts, ends, *dropping

    def launch():
        if not backward:
            return triton_attention.attention(query, key, value, *arguments)
        tensors = out, lse, query, key, value, out, lse
        return triton_attention.attention_backward(*tensors, *arguments, bias_gradient=terms[1] is not None)

    widths = f"{head_dim}/{value_dim or head_dim} {str(dtype).removeprefix('torch.')} {length}"
    window_and_softcap = f"{window if window != (None, 0) else ''} {softcap or ''}"
    name = f"attention {'backward ' * backward}{'+'.join(options)} {widths} {window_and_softcap}".strip()
    return Case(name, launch, matrix=dtype.itemsize == 2)


def score_mod_case(score_mod, head_dim=128, dtype=BFLOAT, backward=False, mask_mod=None):
    """Of 4096 positions under a causal window."""
    query, key = (torch.empty(2, heads, 4096, head_dim, dtype=dtype, device="meta") for heads in (32, 8))
    lse = torch.empty(2, 32, 4096, dtype=SINGLE, device="meta")
    _, program, tables = nearpeak.trace_score_mod(score_mod, mask_mod)
    modified = None, 0, head_dim**-0.5, None, *[None] * 8, 0.0, program, [table.to("meta") for table in tables]

    def launch():
        if not backward:
            return triton_attention.attention(query, key, key, *modified)
        return triton_attention.attention_backward(query, None, query, key, key, query, lse, *modified)

    name = f"attention score_mod {'backward ' * backward}{head_dim} {str(dtype).removeprefix('torch.')}"
    return Case(name, launch, matrix=dtype.itemsize == 2)


def alibi(score, batch, head, query, key, slopes=torch.ones(32)):  # noqa: B008 (one table for all cases)
    return score - slopes[head] * (query - key).abs()


def capped(score, batch, head, query, key):
    return 30.0 * torch.tanh(score / 30.0)


# What crowds registers most: everything at once, unaligned, under a window and a softcap.
EVERYTHING = {"options": (*TERMS, "packed"), "length": 4099, "window": (512, 0), "softcap": 50.0}

# Each kernel at least once, the common ones for every target: what a change breaks first.
CHOSEN = [
    *((norm_case(4096, BFLOAT, direction), target) for direction in ("forward", "backward") for target in TARGETS),
    *((norm_case(4096, BFLOAT, "backward", "layer_norm"), target) for target in TARGETS),
    *((norm_case(4096, BFLOAT, direction, "layer_norm"), "sm_90") for direction in ("forward", "add")),
    *((norm_case(65536, SINGLE, direction, "layer_norm"), "sm_120") for direction in ("add", "backward")),
    (norm_case(65536, SINGLE, "add"), "sm_90"),
    *((qk_norm_case(128, BFLOAT, direction), "sm_90") for direction in ("forward", "backward")),
    (qk_norm_case(256, SINGLE, "backward"), "sm_120"),
    (norm_case(65536, BFLOAT, "backward"), "sm_80"),
    *((rotary_case(128, BFLOAT, interleaved), "sm_90") for interleaved in (False, True)),
    (rotary_case(128, BFLOAT, False), "gfx942"),
    *((rotary_case(128, BFLOAT, interleaved, rotary_dim=64), "sm_90") for interleaved in (False, True)),
    *((feedforward_case(14336, BFLOAT, "silu", direction), "sm_90") for direction in ("forward", "backward")),
    (feedforward_case(2048, SINGLE, "gelu", "backward"), "gfx942"),
    *((embedding_case(768, BFLOAT, direction), "sm_90") for direction in EMBEDDING_DIRECTIONS),
    *((embedding_case(770, SINGLE, direction), "gfx942") for direction in ("backward", "table")),
    *((quantized_linear_case(rows, BFLOAT, bits), "sm_90") for rows in (1, 512) for bits in (8, 4)),
    *((quantized_linear_case(512, BFLOAT, 4, 32, False, True), target) for target in ("sm_80", "sm_100", "sm_120")),
    *((quantized_linear_case(512, BFLOAT, 4, 32, False, True, "gelu_tanh"), target) for target in ("sm_80", "sm_90")),
    (quantized_linear_case(1, BFLOAT, 8, 128), "gfx942"),
    (quantized_linear_case(1, SINGLE, 8, 64, True, True, "gelu"), "gfx942"),
    (quantized_linear_case(512, SINGLE, 4, 128), "sm_86"),
    *((attention_case(128, BFLOAT), target) for target in TARGETS),
    (attention_case(64, BFLOAT), "sm_90"),
    (attention_case(256, BFLOAT, window=(512, 0)), "sm_86"),
    (attention_case(128, BFLOAT, length=1), "sm_90"),
    (attention_case(64, SINGLE), "sm_80"),
    *((attention_backward_case(128, BFLOAT), target) for target in ("sm_80", "sm_90", "sm_100", "gfx942")),
    (attention_backward_case(256, BFLOAT, window=(512, 0)), "sm_86"),
    (attention_backward_case(64, SINGLE, softcap=50.0), "sm_80"),
    *((attention_terms_case((option,)), "sm_90") for option in ("mask", "bias", "alibi", "sinks", "packed", "ranges")),
    (attention_terms_case(("dropout",)), "sm_90"),
    (attention_terms_case(("dropout",), backward=True), "sm_80"),
    (attention_terms_case(TERMS, length=4099), "sm_80"),
    (attention_terms_case((), 192, value_dim=128), "sm_90"),
    (attention_terms_case((), 576, value_dim=512), "sm_90"),
    (attention_terms_case((), 576, value_dim=512, length=1), "sm_86"),
    (attention_terms_case((), 192, value_dim=128, backward=True), "sm_90"),
    (attention_terms_case(("bias",), backward=True), "sm_90"),
    (attention_terms_case(("alibi", "sinks", "packed"), backward=True), "sm_80"),
    (attention_terms_case(("packed", "shared"), backward=True), "sm_90"),
    (score_mod_case(alibi), "sm_90"),
    (score_mod_case(capped, 64, mask_mod=nearpeak.masks.sliding_window(512)), "sm_80"),
    (score_mod_case(alibi, backward=True), "sm_90"),
]
EVERY = [(case, target) for case in every_case() for target in TARGETS]
EVERY += [
    (attention_terms_case(head_dim=head_dim, dtype=dtype, backward=backward, **options), target)
    for backward in (False, True)
    for dtype in (BFLOAT, SINGLE)
    for head_dim in (64, 128, 256)
    for options in (
        EVERYTHING,
        {"options": ("mask", "bias"), "length": 4099},
        {"options": ("bias",)},
        {"options": ("row_bias", "alibi")},
        {"options": ("sinks", "ranges")},
        {"options": ("alibi", "sinks", "packed")},
        {"options": ("dropout",)},
        {"options": ("packed", "shared")},
    )
    for target in TARGETS
]
EVERY += [
    (score_mod_case(score_mod, head_dim, dtype, backward), target)
    for score_mod in (alibi, capped)
    for head_dim in (64, 128, 256)
    for dtype in (BFLOAT, SINGLE)
    for backward in (False, True)
    for target in TARGETS
]
EVERY += [
    (attention_terms_case((), *widths, length=length, window=window), target)
    for widths in ((576, BFLOAT, 512), (576, SINGLE, 512), (320, BFLOAT, 320))
    for length in (4096, 1)
    for window in ((None, 0), (512, 0))
    for target in TARGETS
]


def pairs(cases):
    return [pytest.param(case, target, id=f"{case.name} {target}") for case, target in cases]


def check(case, target):
    codes = compile_case(case, TARGETS[target])
    assert codes
    for code in codes:
        assert code.spilled <= MOST_SPILLED, f"{code.kernel} spills {code.spilled} bytes"
        assert code.shared <= TARGETS[target].shared_limit, f"{code.kernel} takes {code.shared} bytes of shared memory"
    if case.wide:
        assert all(code.load == 16 for code in codes), f"loads of {[code.load for code in codes]} bytes"
        assert max(code.store for code in codes) == 16, f"stores of {[code.store for code in codes]} bytes"
    if case.matrix:
        assert sum(code.matrix for code in codes) > 0, "no matrix instructions"


@pytest.mark.parametrize(("case", "target"), pairs(CHOSEN))
def test_machine_code(case, target):
    check(case, target)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "target"), pairs(EVERY))
def test_machine_code_of_everything(case, target):
    check(case, target)
