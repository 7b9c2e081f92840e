"""The command `nearpeak inspect`: what it shows, the files that it writes, and how it ends."""

import json
import pathlib
import re

import pytest
from toys import invoke

pytest.importorskip("triton")

import triton
from nearpeak_bench import exits
from nearpeak_bench.inspect import comparison, gate
from nearpeak_bench.inspect.results import Results

# Triton's own word to users who leave the choice to it, as the documentation's example does.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "inspect.md"
KERNEL = """
import torch
import triton
import triton.language as tl

@triton.jit
def double(x_ptr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + place, tl.load(x_ptr + place) * 2)

def inspect_doubling():
    x = torch.empty(4096, device="meta")
    double[(4,)](x, BLOCK=1024, num_warps=%d, enable_fp_fusion=True)
"""
SPILLING = """
def inspect_spilling():
    x = torch.empty(65536, device="meta")
    reverse[(1,)](x, BLOCK=65536, num_warps=4, enable_fp_fusion=True)

@triton.jit
def reverse(x_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place)
    tl.store(x_ptr + BLOCK - 1 - place, x / tl.sum(x, axis=0))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table cuts names
    return tmp_path


@pytest.fixture
def kernel(folder):
    """A user's file with one kernel."""
    (folder / "kernel.py").write_text(KERNEL % 4)
    return "kernel.py"


def flat(text: str) -> str:
    """Without the line breaks of a narrow terminal."""
    return " ".join(text.split())


def test_a_file_of_a_users_is_compiled_for_each_target(kernel):
    result = invoke("inspect", kernel, "--target", "sm_80", "--target", "gfx942")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("doubling") == 4, "a line in each of two tables, for each target"
    assert "valu" in result.stdout
    assert "issue" in result.stdout


def test_files_hold_what_was_shown(kernel, folder):
    result = invoke("inspect", kernel, "--json", "a.json", "--html", "b/c.html", "--markdown", "d.md")
    assert result.exit_code == 0, result.output
    found = Results.from_json((folder / "a.json").read_text())
    (code,) = found.codes
    assert (code.target, code.kernel, code.warps, code.loop.loaded) == ("sm_90", "double", 4, 4096)
    assert found.triton == triton.__version__
    assert Results.from_json(found.to_json()) == found
    assert f"| double (doubling) | sm_90 | 4 | {code.registers} |" in (folder / "d.md").read_text()
    page = (folder / "b/c.html").read_text()
    assert 'data-pipe="lsu"><code>LDG.E.128 ' in page
    assert "kernel.py:9</small>" in page, "the line of the load"
    assert "http" not in page, "it asks for nothing"


def test_the_page_marks_the_hottest_loop(folder):
    result = invoke("inspect", "norm", "--filter", "rms_norm backward", "--html", "page.html")
    assert result.exit_code == 0, result.output
    page = (folder / "page.html").read_text()
    code = re.findall(r'<li data-pipe="\w*"( class="hot")?', page)
    assert 100 < sum(map(bool, code)) < len(code)
    assert 'id="hot1"' in page


def test_our_kernels_by_family(folder):
    result = invoke("inspect", "rotary", "--json", "a.json")
    assert result.exit_code == 0, result.output
    assert {code["kernel"] for code in json.loads((folder / "a.json").read_text())["codes"]} == {"_rotate"}


def test_conditions_end_with_their_own_code(kernel, folder):
    (folder / "kernel.py").write_text(KERNEL % 4 + SPILLING)
    assert invoke("inspect", kernel, "--filter", "doubling", "--fail-on", "spills, registers>200").exit_code == 0
    result = invoke("inspect", kernel, "--fail-on", "spills")
    assert result.exit_code == exits.GATE
    assert re.search(r"--fail-on spills: reverse \(spilling\) on sm_90 has \d+ bytes", result.stdout)
    assert "doubling) on" not in result.stdout


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("registers>4", True),
        ("registers>255", False),
        ("occupancy<101", True),
        ("cycles<1", False),
        ("shared>0", False),
    ],
)
def test_limits(condition, holds, kernel, folder):
    invoke("inspect", kernel, "--json", "a.json")
    found = comparison.load(folder / "a.json")
    assert bool(gate.violations(gate.conditions_of((condition,)), found.codes)) == holds


def test_two_files_side_by_side(kernel, folder):
    (folder / "other.py").write_text(KERNEL % 1)
    result = invoke("inspect", kernel, "--against", "other.py", "--markdown", "a.md", "--fail-on", "worse")
    assert result.exit_code == 0, result.output
    assert "1 → 4" in (folder / "a.md").read_text()
    (folder / "other.py").write_text((KERNEL % 4).replace("4096", "4097").replace("* 2)", "* 2, mask=place >= 0)"))
    assert "0 worse" in invoke("inspect", kernel, "--against", "other.py").stdout


def test_a_kernel_that_has_become_worse_ends_with_the_code_of_a_regression(kernel, folder):
    exponentials = "x = tl.load(x_ptr + place)\n    for _ in tl.static_range(40): x = tl.exp(x)\n    "
    slow = (KERNEL % 4).replace("tl.store", exponentials + "tl.store").replace("tl.load(x_ptr + place) * 2)", "x)")
    (folder / "slow.py").write_text(slow)
    result = invoke("inspect", "slow.py", "--against", kernel, "--fail-on", "worse")
    assert result.exit_code == exits.REGRESSION, result.output
    assert "worse cost" in flat(result.stdout)


def test_two_runs_are_compared_from_their_files(kernel, folder):
    invoke("inspect", kernel, "--json", "after.json")
    before = json.loads((folder / "after.json").read_text())
    before["triton"] = "3.5.0"
    before["codes"][0]["registers"] = 99
    (folder / "before.json").write_text(json.dumps(before))
    result = invoke("inspect", "compare", "before.json", "after.json", "--html", "page.html")
    assert result.exit_code == 0, result.output
    assert f"changes from Triton 3.5.0 to {triton.__version__}" in result.stdout
    assert "99 → " in result.stdout
    assert "99 → " in (folder / "page.html").read_text()


def test_what_does_not_compile_costs_its_own_row(kernel, folder):
    broken = (
        "\n\ndef inspect_broken():\n    double[(1,)](torch.empty(9, device='meta'), BLOCK=9, enable_fp_fusion=True)\n"
    )
    nothing = "\n\ndef inspect_nothing():\n    pass\n"
    (folder / "kernel.py").write_text(KERNEL % 4 + broken + nothing)
    result = invoke("inspect", kernel)
    assert result.exit_code == exits.CRASHED
    assert re.search(r"broken sm_90 failed: \w+: .*arange's range must be a power of 2", flat(result.stdout))
    assert "nothing launches no Triton kernel" in flat(result.stdout)
    assert "double" in result.stdout


def test_what_does_not_fit_ends_as_what_crashed(folder):
    (folder / "large.py").write_text(
        """
import torch, triton
import triton.language as tl

@triton.jit
def multiply(x_ptr, N: tl.constexpr):
    place = tl.arange(0, N)
    sums = tl.zeros([N, N], tl.float32)
    for start in tl.range(0, 4096, 64, num_stages=6):
        inner = start + tl.arange(0, 64)
        a = tl.load(x_ptr + place[:, None] * 4096 + inner[None, :])
        sums = tl.dot(a, tl.load(x_ptr + inner[:, None] * N + place[None, :]), sums)
    tl.store(x_ptr + place[:, None] * N + place[None, :], sums)

def inspect_multiply():
    multiply[(1,)](torch.empty(4096, 128, dtype=torch.float16, device="meta"), 128, num_warps=8)
"""
    )
    result = invoke("inspect", "large.py", "--target", "sm_86")
    assert result.exit_code == exits.CRASHED, result.output
    message = r"cannot run: one program takes \d+ bytes of shared memory, 101376 are there"
    assert re.search(message, flat(result.stdout))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nrom"], "unknown kernels 'nrom': choose from norm, rotary, feedforward, embedding, linear, attention, or a"),
        (["norm", "--target", "sm_42"], "unknown target 'sm_42': choose from sm_80"),
        (["norm", "--filter", "nothing"], "no case matches 'nothing'"),
        (["norm", "--fail-on", "speed>1"], "--fail-on speed>1: choose from spills, worse, or a limit of registers"),
        (["norm", "--fail-on", "worse"], "--fail-on worse needs a run to be held against: --against FILE"),
        (["no.py"], "there is no file no.py"),
        (["empty.py"], "empty.py has no case: define a function inspect_NAME()"),
        (["compare", "a.json"], "compare takes two files of results"),
        (["compare", "a.json", "b.json", "--target", "sm_90"], "compare does nothing with --target: leave it out"),
        (["compare", "no.json", "no.json"], "cannot read no.json"),
        (["compare", "empty.py", "empty.py"], "empty.py holds no results of this version of nearpeak inspect"),
    ],
)
def test_wrong_requests_get_one_line_that_says_what_to_do(arguments, message, folder):
    (folder / "empty.py").write_text("")
    result = invoke("inspect", *arguments)
    assert result.exit_code == exits.REQUEST
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_files_without_a_kernel_in_common_cannot_be_compared(kernel, folder):
    (folder / "other.py").write_text((KERNEL % 4).replace("inspect_doubling", "inspect_twice"))
    result = invoke("inspect", kernel, "--against", "other.py")
    assert result.exit_code == exits.REQUEST
    assert "the two have no kernel in common: give the functions of both files the same names" in result.stderr


def test_the_interpreter_is_named(monkeypatch, folder):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert "unset TRITON_INTERPRET" in invoke("inspect", "norm").stderr


def test_the_example_of_the_documentation_runs(folder):
    (example,) = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    (folder / "mykernel.py").write_text(example)
    result = invoke("inspect", "mykernel.py", "--target", "sm_90", "--fail-on", "spills")
    assert result.exit_code == 0, result.output
    assert "softmax" in result.stdout
