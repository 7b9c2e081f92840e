"""A user's own kernels, measured beside ours."""

import pathlib
import re

import pytest
from nearpeak_bench import norm, peaks, results, runner, suites
from toys import PEAKS, bench, invoke, measurement

MINE = """
from nearpeak_bench import suites

@suites.SUITES["norm"][0].operator.implementation("mine")
def _(x):
    return lambda: {result}
"""


@pytest.fixture
def kernel(tmp_path):
    """Writes a file of the user's, which registers a kernel that returns `result`."""

    def write(result, text=MINE):
        (tmp_path / "mine.py").write_text(text.format(result=result))

    return write


def test_kernel_of_a_file_is_measured_like_ours(toy_suite, kernel, tmp_path):
    kernel("x * 2")
    result = bench("--add", "mine.py", "--json", "a.json")
    assert result.exit_code == 0, result.output
    assert "mine.py adds mine of doubling" in result.stdout
    found = results.Results.from_json((tmp_path / "a.json").read_text())
    assert {row.operator for row in found.rows} == {"doubling"}, "without a suite's name, its operator's cases alone"
    for row in found.rows:
        assert measurement(row, "mine").ratios.keys() == measurement(row, "nearpeak").ratios.keys() == {"eager"}


def test_wrong_kernel_of_a_file_is_found(toy_suite, kernel):
    kernel("x * 3")
    result = bench("--add", "mine.py")
    assert result.exit_code == 1
    assert "WRONG" in result.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("1 +", "SyntaxError", id="syntax"),
        pytest.param("x = 1\nimport a_missing_package", "install a_missing_package, or import it inside", id="import"),
        pytest.param("x = 1\n\n1 / 0", "ZeroDivisionError in line 3: division by zero; `python mine.py`", id="raises"),
        pytest.param("import sys; sys.exit('no')", "SystemExit in line 1: no", id="exits"),
        pytest.param("x = 1", "mine.py registers no kernel: decorate a function", id="nothing"),
        pytest.param(MINE.replace("mine", "nearpeak"), "which has one: choose another name", id="taken"),
    ],
)
def test_file_that_cannot_be_added_gets_one_line_that_says_what_to_do(toy_suite, kernel, text, message):
    kernel("x", text)
    result = invoke("bench", "--add", "mine.py")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_kernel_that_no_case_runs_is_said(toy_suite, kernel):
    kernel("x * 2")
    result = invoke("bench", "rotary", "--add", "mine.py")
    assert result.exit_code == 2
    assert "which no chosen case runs: name its suite" in result.stderr


def test_file_that_is_not_there_is_said(toy_suite):
    result = invoke("bench", "--add", "no.py")
    assert (result.exit_code, result.stderr) == (2, "error: there is no file no.py\n")


def test_documented_example_runs(monkeypatch, tmp_path):
    """The page's file and its command, as a new user would type them, on a smaller case."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    text = re.search(r"```python\n(# mykernel.py\n.+?)```", page, re.DOTALL).group(1)
    arguments = re.search(r"nearpeak bench (--add mykernel.py --filter \S+)", page).group(1).split()
    (tmp_path / "mykernel.py").write_text(text)
    quick = {name: each for name, each in norm.rms_norm.implementations.items() if not each.compiled}
    monkeypatch.setattr(norm.rms_norm, "implementations", quick)
    monkeypatch.setattr(suites, "added", [])
    monkeypatch.setattr(runner, "extra_memory", lambda *arguments: None)
    monkeypatch.setattr(peaks, "measure", lambda device, progress: PEAKS)
    monkeypatch.chdir(tmp_path)
    result = bench(*arguments, "--filter", "16x768-float32-forward", "--json", "a.json")
    assert result.exit_code == 0, result.output
    found = results.Results.from_json((tmp_path / "a.json").read_text())
    assert [row.operator for row in found.rows] == ["rms_norm"]
    assert measurement(found.rows[0], "mine").ratios.keys() == {"eager", "F.rms_norm"}
