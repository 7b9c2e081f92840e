"""Two runs against each other."""

import csv
import pathlib

import pytest
from nearpeak_bench import compare, exits, history, results, timing
from toys import bench, invoke, noisy


@pytest.fixture
def written(found, tmp_path, monkeypatch):
    """Writes a run whose kernels take `kernel` times as long, on a machine that takes `machine` times as long."""
    monkeypatch.chdir(tmp_path)

    def write(name, kernel=1.0, machine=1.0, sigma=0.01):
        for index, row in enumerate(found.rows):
            row.case = f"case {index}"
            for seed, each in enumerate(row.measurements):
                scale = machine * (kernel if each.implementation == "nearpeak" else 1)
                each.samples = timing.Samples(list(noisy(scale, sigma, seed=seed)), 1)
        (tmp_path / name).write_text(found.to_json())
        return name

    return write


@pytest.mark.parametrize(
    ("kernel", "code"), [(1.0, 0), (1.3, exits.REGRESSION), (0.7, 0)], ids=["same", "slower", "faster"]
)
def test_a_kernel_that_became_slower_is_found_on_a_slower_machine(written, kernel, code):
    result = invoke("bench", "compare", written("before.json"), written("after.json", kernel, machine=2.0))
    assert result.exit_code == code, result.output


def test_noise_that_hides_a_change_has_its_own_exit_code(written):
    files = written("before.json", sigma=0.8), written("after.json", sigma=0.8)
    assert invoke("bench", "compare", *files).exit_code == exits.UNSTABLE


@pytest.mark.parametrize(("status", "code"), [("wrong", exits.WRONG), ("crashed", exits.CRASHED)])
def test_a_kernel_that_became_wrong_is_found(written, found, status, code):
    before = written("before.json")
    kernel = next(each for each in found.rows[0].measurements if each.implementation == "nearpeak")
    written("after.json")
    kernel.status, kernel.samples, kernel.ratios = status, None, {}
    pathlib.Path("after.json").write_text(found.to_json())
    result = invoke("bench", "compare", before, "after.json")
    assert result.exit_code == code
    assert f"no more right: case 0 ({status})" in result.stdout
    assert invoke("bench", "compare", "after.json", "after.json").exit_code == 0, "it was so before"


@pytest.mark.parametrize(
    ("thresholds", "code"),
    [
        pytest.param([], exits.REGRESSION, id="default"),
        pytest.param(["20"], 0, id="general"),
        pytest.param(["doubling=20"], 0, id="of the operator"),
        pytest.param(["20", "doubling=3"], exits.REGRESSION, id="the operator's own counts"),
    ],
)
def test_thresholds_decide_what_counts(written, thresholds, code):
    files = written("before.json"), written("after.json", kernel=1.08)
    options = [part for each in thresholds for part in ("--threshold", each)]
    assert invoke("bench", "compare", *files, *options).exit_code == code


def test_markdown_and_csv_hold_every_row_worst_first(written, tmp_path):
    files = written("before.json"), written("after.json", kernel=1.3)
    invoke("bench", "compare", *files, "--markdown", "a.md", "--csv", "b.csv")
    text = (tmp_path / "a.md").read_text()
    assert "2 slower" in text
    assert "| **case 0** |" in text
    lines = list(csv.DictReader((tmp_path / "b.csv").read_text().splitlines()))
    assert [line["verdict"] for line in lines] == ["slower", "slower"]
    lower, change, upper = (float(lines[0][name]) for name in ("lower", "change", "upper"))
    assert lower < change < upper < 0.8
    assert float(lines[0]["change"]) <= float(lines[1]["change"])


def test_cases_of_one_run_alone_are_named(found):
    other = results.Results.from_json(found.to_json())
    found.rows[0].case, other.rows[0].case = "old", "new"
    found.rows[1].case = other.rows[1].case = "common"
    comparison = compare.Comparison.of(found, other, {})
    assert (comparison.only_before, comparison.only_after) == (["old"], ["new"])
    other.rows[1].case = "another"
    with pytest.raises(exits.UsageError, match="no case in common"):
        compare.Comparison.of(found, other, {})


def test_a_run_is_held_against_the_last_of_its_machine(toy_suite):
    first = bench("norm", "--against", "last")
    assert (first.exit_code, "this one is the first" in first.stdout) == (0, True)
    (stored,) = history.FOLDER.rglob("*.json")
    earlier = results.Results.from_json(stored.read_text())
    earlier.created = "2000-01-01T00:00:00+00:00"
    for row in earlier.rows:
        for each in row.candidates():
            each.samples = timing.Samples([seconds / 100 for seconds in each.samples.seconds] * 10, 1)
        for each in row.baselines():
            each.samples = timing.Samples(each.samples.seconds * 10, 1)
    stored.unlink()
    history.stem(earlier).with_suffix(".json").write_text(earlier.to_json())
    again = bench("norm", "--against", "last")
    assert f"against {history.stem(earlier)}.json" in again.stdout
    assert again.exit_code in (exits.REGRESSION, exits.UNSTABLE), "too few rounds may hide it"


def test_machines_that_differ_in_what_decides_have_histories_of_their_own(found):
    machine = found.machine
    assert history.fingerprint(machine) == history.fingerprint({**machine, "commit": "another"})
    assert history.fingerprint(machine) != history.fingerprint({**machine, "threads": 99})
