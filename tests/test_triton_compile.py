"""Every Triton kernel compiles for every target without a GPU, and its machine code is what it should be."""

import pytest
import torch

pytest.importorskip("triton")

from nearpeak_bench.machine_code import (
    TARGETS,
    attention_backward_case,
    attention_case,
    compile_case,
    every_case,
    feedforward_case,
    norm_case,
    rotary_case,
)

BFLOAT, SINGLE = torch.bfloat16, torch.float32

# Each kernel at least once, the common ones for every target: what a change breaks first.
CHOSEN = [
    *((norm_case(4096, BFLOAT, direction), target) for direction in ("forward", "backward") for target in TARGETS),
    *((norm_case(4096, BFLOAT, "backward", "layer_norm"), target) for target in TARGETS),
    *((norm_case(4096, BFLOAT, direction, "layer_norm"), "sm_90") for direction in ("forward", "add")),
    *((norm_case(65536, SINGLE, direction, "layer_norm"), "sm_120") for direction in ("add", "backward")),
    (norm_case(65536, SINGLE, "add"), "sm_90"),
    (norm_case(65536, BFLOAT, "backward"), "sm_80"),
    *((rotary_case(128, BFLOAT, interleaved), "sm_90") for interleaved in (False, True)),
    (rotary_case(128, BFLOAT, False), "gfx942"),
    *((feedforward_case(14336, BFLOAT, "silu", direction), "sm_90") for direction in ("forward", "backward")),
    (feedforward_case(2048, SINGLE, "gelu", "backward"), "gfx942"),
    *((attention_case(128, BFLOAT), target) for target in TARGETS),
    (attention_case(64, BFLOAT), "sm_90"),
    (attention_case(256, BFLOAT, window=(512, 0)), "sm_86"),
    (attention_case(128, BFLOAT, length=1), "sm_90"),
    (attention_case(64, SINGLE), "sm_80"),
    *((attention_backward_case(128, BFLOAT), target) for target in ("sm_80", "sm_90", "sm_100", "gfx942")),
    (attention_backward_case(256, BFLOAT, window=(512, 0)), "sm_86"),
    (attention_backward_case(64, SINGLE, softcap=50.0), "sm_80"),
]
EVERY = [(case, target) for case in every_case() for target in TARGETS]


def pairs(cases):
    return [pytest.param(case, target, id=f"{case.name} {target}") for case, target in cases]


def check(case, target):
    codes = compile_case(case, TARGETS[target])
    assert codes
    for code in codes:
        assert code.spilled == 0, f"{code.kernel} spills {code.spilled} bytes"
        assert code.shared <= code.target.shared_limit, f"{code.kernel} takes {code.shared} bytes of shared memory"
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
