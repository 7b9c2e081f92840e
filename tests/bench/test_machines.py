"""Several machines side by side, the README that is written from them, and a machine's history."""

import copy
import dataclasses
import pathlib

import pytest
import torch
from nearpeak_bench import exits, history, machines, readme, report, results
from nearpeak_bench.cases import Case
from toys import invoke, measurement

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def here(doubling, found, tmp_path, monkeypatch):
    """Two cases of one machine, of which the second has the lower share of its limit."""
    monkeypatch.chdir(tmp_path)
    for size, (row, share) in zip((10, 20), zip(found.rows, (0.6, 0.3), strict=True), strict=True):
        case = Case(doubling, {"size": size}, torch.float32)
        row.case, row.shape, row.limit_seconds = case.name, case.shape, 1e-3
        measurement(row, "nearpeak").share = share
    found.created = "2026-01-02T03:04:05+00:00"
    return found


@pytest.fixture
def there(here):
    """The first case alone, of another machine."""
    other = copy.deepcopy(here)
    other.machine["isa"] = "another"
    del other.rows[1]
    return other


def written(**runs):
    for name, run in runs.items():
        pathlib.Path(f"{name}.json").write_text(run.to_json())
    return [pathlib.Path(f"{name}.json") for name in runs]


def test_rows_stand_side_by_side_worst_share_first(here, there):
    measurement(there.rows[0], "nearpeak").share = 0.1
    shown = machines.rows_table(machines.gather(written(zen3=here, zen4=there)))
    assert shown.headers[4:] == ["zen3 ratio", "zen3 limit", "zen4 ratio", "zen4 limit"]
    assert [(line.cells[1], line.cells[5], line.cells[7]) for line in shown.lines] == [
        ("10", "60%", "10%"),
        ("20", "30%", ""),
    ]
    assert [line.mark for line in shown.lines] == ["worst", "fine"]


def test_wrong_rows_come_first_and_calls_that_do_no_work_last(here):
    wrong = measurement(here.rows[0], "nearpeak")
    wrong.status, wrong.share, wrong.ratios = "wrong", None, {}
    short = copy.deepcopy(here.rows[1])
    short.case, short.shape, short.limit_seconds = "short", "1", machines.SHORTEST_LIMIT / 2
    measurement(short, "nearpeak").share = 0.01
    here.rows.insert(0, short)
    shown = machines.rows_table(machines.gather(written(zen3=here)))
    assert [line.cells[1] for line in shown.lines] == ["10", "20", "1"]
    assert shown.lines[0].cells[4] == "WRONG"
    (line,) = machines.operators_table(machines.gather(written(zen3=here))).lines
    assert (line.mark, line.cells[5]) == ("bad", "30%")


def test_operators_have_a_mean_and_a_range(here):
    for row, value in zip(here.rows, (1.0, 4.0), strict=True):
        ratio = measurement(row, "nearpeak").ratios
        ratio["eager"] = dataclasses.replace(ratio["eager"], value=value)
    (line,) = machines.operators_table(machines.gather(written(zen3=here))).lines
    assert line.cells == ["doubling", "fp32", "20", "2", "2x (worst 1x)", "30% (to 60%)"]


def test_of_one_machine_the_newest_row_of_each_case_counts(here):
    later = copy.deepcopy(here)
    later.created = "2026-02-02T03:04:05+00:00"
    del later.rows[1]
    measurement(later.rows[0], "nearpeak").share = 0.5
    (machine,) = machines.gather(reversed(written(old=here, new=later)))
    assert machine.name == "new"
    assert [measurement(row, "nearpeak").share for row in machine.results.rows] == [0.5, 0.3]


def test_a_run_of_the_history_is_called_after_its_machine(here):
    path = history.stem(here).with_suffix(".json")
    results.write(path, here.to_json())
    (machine,) = machines.gather([path])
    assert machine.name == history.fingerprint(here.machine)


def test_report_writes_pages_with_every_machine(here, there):
    result = invoke("bench", "report", *map(str, written(zen3=here, zen4=there)))
    assert result.exit_code == 0, result.output
    page = pathlib.Path(".nearpeak/report.html").read_text()
    assert page.count("<h2>zen") == 2
    assert "a &lt;processor&gt;" in page
    assert "| zen3 ratio | zen3 limit | zen4 ratio | zen4 limit |" in pathlib.Path(".nearpeak/report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "report takes files of results"),
        (["report", "no.json"], "cannot read no.json"),
        (["norm", "--readme", "README.md"], "a run does nothing with --readme"),
    ],
)
def test_wrong_reports_get_one_line(here, arguments, message):
    result = invoke("bench", *arguments)
    assert (result.exit_code, len(result.stderr.splitlines())) == (exits.REQUEST, 1)
    assert message in result.stderr


def test_results_are_put_between_the_markers(here):
    path = pathlib.Path("README.md")
    path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    arguments = ["bench", "report", *map(str, written(zen3=here)), "--readme", "README.md"]
    assert invoke(*arguments).exit_code == 0
    text = path.read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n- **zen3**")
    assert text.endswith(f"{readme.END}\nafter\n")
    assert "old" not in text
    assert "doubling" in pathlib.Path("docs/speedup-dark.svg").read_text()
    assert invoke(*arguments).exit_code == 0
    assert path.read_text() == text, "writing again changes nothing"
    path.write_text("no markers\n")
    assert readme.BEGIN in invoke(*arguments).stderr


def test_readme_is_what_make_results_writes():
    found = machines.gather(sorted((ROOT / "bench" / "results").glob("*.json")))
    text = (ROOT / "README.md").read_text()
    assert readme.replaced(text, found) == text, "run: make results"
    for theme in readme.INKS:
        chart = (ROOT / readme.CHART.format(theme=theme)).read_text()
        assert all(machine.name in chart for machine in found), "run: make results"


def test_page_shows_the_history_of_its_machine(here):
    assert "<h2>History</h2>" not in report.to_html(here)
    for day in ("01", "02"):
        earlier = copy.deepcopy(here)
        earlier.created = f"2026-01-{day}T00:00:00+00:00"
        results.write(history.stem(earlier).with_suffix(".json"), earlier.to_json())
    page = report.to_html(here)
    assert "<h2>History</h2>" in page
    assert page.count("run by run") == 2, "one chart, and its description"
    assert all(f"01-{day}" in page for day in ("01", "02"))


def test_history_holds_each_case_against_the_fastest_baseline_of_its_last_run(here):
    now = copy.deepcopy(here)
    then, after = (measurement(run.rows[0], "nearpeak").ratios for run in (here, now))
    then["other"] = dataclasses.replace(then["eager"], value=3.0)
    after["other"] = dataclasses.replace(after["eager"], value=after["eager"].value / 2)
    first, _ = history.courses([here, now])
    assert (first.baseline, first.ratios) == ("other", [3.0, after["other"].value])
    del then["other"]
    assert [course.row.shape for course in history.courses([here, now])] == ["20"]
    assert not history.courses([now])
