"""The command line of the harness."""

import csv

import pytest
import torch
from nearpeak import backends, cli_bench
from nearpeak_bench import exits, models, results
from nearpeak_bench.cases import Absent
from toys import bench, interrupt_second_case, invoke


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["nrom"], "unknown suite 'nrom': choose from norm, rotary", id="suite"),
        pytest.param(["norm", "--dtype", "int8"], "unknown dtype 'int8': choose from float32", id="dtype"),
        pytest.param(["norm", "--filter", "nothing"], "no case of norm matches", id="filter"),
        pytest.param(["norm", "--time-budget", "0"], "the time budget must be more than 0", id="budget"),
        pytest.param(["compare", "a.json"], "compare takes two files of results", id="compare"),
        pytest.param(["compare", "no.json", "no.json"], "cannot read no.json", id="compare file"),
        pytest.param(["norm", "--time-limit", "0"], "the time limit must be more than 0", id="time limit"),
        pytest.param(["norm", "--threshold", "x"], "--threshold x: give percent", id="threshold"),
        pytest.param(["norm", "--threshold", "rms=5"], "there is no operator rms", id="threshold's operator"),
        pytest.param(["norm", "--threshold", "5"], "a run does nothing with --threshold", id="threshold alone"),
        pytest.param(["compare", "a", "b", "--html", "c"], "compare does nothing with --html", id="unread option"),
        pytest.param(["report", "a", "--filter", "b"], "report does nothing with --filter", id="unread filter"),
        pytest.param(["norm", "--resume"], "there is no unfinished run", id="resume"),
    ],
)
def test_wrong_requests_get_one_line_that_says_what_to_do(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(cli_bench, "MODULES", ("a_package_that_does_not_exist",))
    result = invoke("bench", "norm")
    assert result.exit_code == 2
    assert "pip install nearpeak[bench]" in result.stderr


def test_model_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setattr(models, "PACKAGES", ("a_package_that_does_not_exist",))
    result = invoke("bench", "model")
    assert result.exit_code == 2
    assert "pip install" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_info_tells_of_every_backend():
    result = invoke("info")
    assert result.exit_code == 0
    for name in backends.NAMES:
        assert f"backend {name}" in result.stdout
    assert torch.__version__ in result.stdout


def test_bench_writes_the_files_that_were_asked_for(toy_suite, tmp_path):
    arguments = ["--json", "a.json", "--html", "b/c.html", "--markdown", "d.md", "--csv", "e.csv"]
    result = bench("norm", *arguments)
    assert result.exit_code == 0, result.output
    found = results.Results.from_json((tmp_path / "a.json").read_text())
    assert found.complete
    assert result.stdout.count("doubling") >= 2, "the table is shown"
    assert [row.shape for row in found.rows] == ["10", "20"]
    assert (tmp_path / "b/c.html").exists()
    assert "| doubling |" in (tmp_path / "d.md").read_text()
    lines = list(csv.DictReader((tmp_path / "e.csv").read_text().splitlines()))
    assert [(line["implementation"], line["against"]) for line in lines[:2]] == [("nearpeak", "eager"), ("eager", "")]
    assert float(lines[0]["ratio"]) > 0


def test_absent_baselines_are_listed_with_what_they_lack(toy_suite, tmp_path):
    @toy_suite.implementation("peer", baseline=True)
    def _(x):
        import a_missing_package

        return a_missing_package.double(x)

    @toy_suite.implementation("another", baseline=True)
    def _(x):
        raise Absent("it serves GPUs")

    result = bench("norm", "--markdown", "a.md")
    assert result.exit_code == 0, result.output
    listed = "peer (a_missing_package is not installed), another (it serves GPUs)"
    assert f"not compared with: {listed}" in " ".join(result.stdout.split())  # wherever lines were broken
    assert f"Baselines that are absent: {listed}" in (tmp_path / "a.md").read_text()


def test_wrong_kernel_fails_the_command(toy_suite):
    toy_suite.implementation("nearpeak")(lambda x: lambda: 3 * x)
    assert bench("norm").exit_code == exits.WRONG


def test_interrupted_run_keeps_finished_rows(toy_suite, monkeypatch, tmp_path):
    interrupt_second_case(monkeypatch)
    result = bench("norm", "--json", "kept.json")
    assert result.exit_code == exits.INTERRUPTED
    found = results.Results.from_json((tmp_path / "kept.json").read_text())
    assert not found.complete
    assert [row.shape for row in found.rows] == ["10"]
