"""The harness itself: its statistics, its gate of correctness, its files and its command line. No absolute times."""

import json
import re

import numpy as np
import pytest
import rich.console
import torch
from nearpeak import backends, cli
from nearpeak.attention import reference
from nearpeak_bench import (
    attention,
    command,
    compare,
    memory,
    models,
    noise,
    peaks,
    report,
    results,
    runner,
    selftest,
    suites,
    table,
    timing,
    verdicts,
)
from nearpeak_bench.cases import Case, Operator, Work
from typer.testing import CliRunner

CPU = torch.device("cpu")
PEAKS = peaks.Peaks(
    multiply_add={"float32": 1e11, "bfloat16": 2e11, "float16": 2e11},
    copy={2**20: 2e10, 2**26: 1e10},
    read={2**20: 1e10, 2**26: 1e10},
)
SETTINGS = runner.Settings(CPU, budget=0.01, memory=False)


@pytest.fixture
def doubling():
    """An operator with one right, one wrong, one raising and one missing implementation, and a baseline."""
    operator = Operator(
        name="doubling",
        shape="{size}",
        inputs=lambda random, size: {"x": random(size)},
        reference=lambda x: 2 * x,
        plain=lambda x: x + x,
        work={"forward": lambda size: Work(size, size, size)},
        kernels={"forward": "rms_norm_inference"},
    )
    operator.implementation("nearpeak")(lambda x: lambda: 2 * x)
    operator.implementation("eager", baseline=True)(lambda x: lambda: x + x)
    return operator


def run(operator, suite="norm", **options):
    case = Case(operator, {"size": 1000}, torch.float32)
    return runner.run_case(suite, case, runner.Settings(**{**vars(SETTINGS), **options}), PEAKS)


def measurement(row, name):
    return next(each for each in row.measurements if each.implementation == name)


# Statistics.


def test_ratio_cancels_what_a_round_has_in_common():
    drift = np.linspace(1, 10, 50)
    ratio = verdicts.ratio(baseline=3e-3 * drift, candidate=1e-3 * drift)
    assert (ratio.value, ratio.lower, ratio.upper) == pytest.approx((3, 3, 3))
    assert ratio.difference < 0


def test_interval_holds_the_true_ratio_and_shrinks_with_more_rounds():
    noise = np.random.default_rng(0)
    widths = []
    for rounds in (10, 1000):
        baseline, candidate = 2 * noise.lognormal(0, 0.3, rounds), noise.lognormal(0, 0.3, rounds)
        ratio = verdicts.ratio(baseline, candidate)
        assert ratio.lower < 2 < ratio.upper
        widths.append(ratio.upper - ratio.lower)
    assert widths[1] < widths[0] / 3


def test_one_outlier_moves_neither_median_nor_ratio():
    assert verdicts.spread([1.0, 1.0, 1.0, 1.0, 100.0]).median == 1
    assert verdicts.ratio([2.0] * 9 + [500.0], [1.0] * 10).value == 2


def test_slowed_callable_is_reported_slower():
    def busy(steps):
        return lambda: sum(range(steps))

    samples = timing.time_interleaved({"plain": busy(1000), "slowed": busy(4000)}, budget=0.2)
    assert verdicts.ratio(samples["plain"].seconds, samples["slowed"].seconds).value < 1


def noisy(scale, sigma, rounds=60, seed=1):
    return scale * np.random.default_rng(seed).lognormal(0, sigma, rounds)


@pytest.mark.parametrize(
    ("baseline", "candidate", "noise_floor", "verdict"),
    [
        pytest.param(noisy(1, 0.01), noisy(1, 0.01, seed=2), 0.0, verdicts.SAME, id="same"),
        pytest.param(noisy(1, 0.01), noisy(1.05, 0.01, seed=2), 0.0, verdicts.SLOWER, id="5 % slower"),
        pytest.param(noisy(1.05, 0.01), noisy(1, 0.01, seed=2), 0.0, verdicts.FASTER, id="5 % faster"),
        pytest.param(noisy(1, 0.01), noisy(1.05, 0.01, seed=2), 0.06, verdicts.SAME, id="5 % on a noisy machine"),
        pytest.param(noisy(1, 0.4), noisy(1, 0.4, seed=2), 0.0, verdicts.NOISY, id="wide"),
        pytest.param(noisy(1, 0.01), noisy(2, 0.01), 3.0, verdicts.NOISY, id="noise beyond measure"),
        pytest.param(noisy(1, 0.01, 3), noisy(2, 0.01, 3), 0.0, verdicts.NOISY, id="too few rounds"),
    ],
)
def test_verdict(baseline, candidate, noise_floor, verdict):
    assert verdicts.ratio(baseline, candidate, noise_floor).verdict == verdict


def test_same_calls_are_rarely_called_different_and_small_slowdowns_are_found():
    ratios = [verdicts.ratio(noisy(1, 0.03, seed=s), noisy(1, 0.03, seed=-s + 999)) for s in range(200)]
    assert sum(ratio.verdict == verdicts.SAME for ratio in ratios) >= 0.97 * len(ratios)
    ratios = [verdicts.ratio(noisy(1, 0.03, seed=s), noisy(1.05, 0.03, seed=-s + 999)) for s in range(200)]
    assert sum(ratio.verdict == verdicts.SLOWER for ratio in ratios) >= 0.9 * len(ratios)


def test_outliers_and_drift_are_remarked_and_noise_is_not():
    steady = noisy(1, 0.01)
    assert verdicts.remarks(steady) == ""
    assert "outliers" in verdicts.remarks([*steady, *[3.0] * 12])
    assert "drifted by +" in verdicts.remarks(steady * np.linspace(1, 1.2, len(steady)))


def test_rounds_end_when_ratios_are_known():
    calls = {"a": lambda: None, "b": lambda: None}
    steady = timing.time_interleaved(calls, 60, lambda call, repeats: repeats * 1e-3, pairs=[("a", "b")])
    assert len(steady["a"].seconds) == timing.ROUNDS_FOR_PRECISION
    jitter = np.random.default_rng(0)
    rough = timing.time_interleaved(
        calls, 60, lambda call, repeats: repeats * jitter.lognormal(-7, 0.5), pairs=[("a", "b")]
    )
    assert len(rough["a"].seconds) == timing.MAX_ROUNDS


def test_every_round_times_every_call_once_in_changing_order():
    order, now = [], [0.0]

    def clock(call, repeats):
        call()
        now[0] += repeats * 1e-3
        return repeats * 1e-3

    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = timing.time_interleaved(calls, budget=0.0, clock=clock)
    assert {len(each.seconds) for each in samples.values()} == {timing.MIN_ROUNDS}
    rounds = [tuple(order[i : i + 3]) for i in range(len(order) - 3 * timing.MIN_ROUNDS, len(order), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1


def test_short_calls_are_repeated_until_a_sample_is_long_enough():
    cost = 1e-5
    repeats = timing.calibrate(lambda: None, lambda call, repeats: cost * repeats)
    assert timing.MIN_SAMPLE_SECONDS <= repeats * cost <= 2 * timing.MIN_SAMPLE_SECONDS


# The gate of correctness.


def test_right_kernel_has_time_ratio_share_and_errors(doubling):
    row = run(doubling)
    ours = measurement(row, "nearpeak")
    assert ours.status == "ok"
    assert len(ours.samples.seconds) >= timing.MIN_ROUNDS
    assert ours.ratios.keys() == {"eager"}
    assert ours.share == pytest.approx(row.limit_seconds / ours.spread.median)
    assert (ours.error_mean, ours.error_max) == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        pytest.param(lambda x: lambda: 2.001 * x, "error", id="slightly off"),
        pytest.param(lambda x: lambda: (2 * x).masked_fill(x > 1, float("nan")), "NaN", id="NaN"),
        pytest.param(lambda x: lambda: 2 * x[:-1], "shapes", id="shape"),
        pytest.param(lambda x: lambda: (2 * x).double(), "dtypes", id="dtype"),
    ],
)
def test_wrong_kernel_is_shown_as_wrong_and_gets_no_time(doubling, wrong, reason):
    doubling.implementation("nearpeak")(wrong)
    row = run(doubling)
    ours = measurement(row, "nearpeak")
    assert ours.status == "wrong"
    assert reason in ours.note
    assert ours.samples is None
    assert not ours.ratios
    assert measurement(row, "eager").samples
    line = table.suite_table("norm", [row]).lines[0]
    assert line.mark == "bad"
    assert "WRONG" in line.cells


def test_raising_and_missing_implementations_cost_only_themselves(doubling):
    def raising(x):
        raise RuntimeError("no such luck")

    def missing(x):
        import a_package_that_does_not_exist  # noqa: F401

    doubling.implementation("raising")(raising)
    doubling.implementation("missing", baseline=True)(missing)
    row = run(doubling)
    assert (measurement(row, "raising").status, measurement(row, "missing").status) == ("failed", "absent")
    assert "no such luck" in measurement(row, "raising").note
    assert measurement(row, "nearpeak").ratios.keys() == {"eager"}


def test_kernel_that_answers_from_memory_is_found_after_timing(doubling):
    remembered = []

    def prepare(x):
        remembered.append(2 * x)
        return lambda: remembered[0]

    doubling.implementation("nearpeak")(prepare)
    ours = measurement(run(doubling), "nearpeak")
    assert ours.status == "wrong"
    assert "after timing, on fresh inputs" in ours.note
    assert ours.samples is None


def test_inplace_implementations_do_not_see_each_others_results(doubling):
    doubling.inplace = True
    doubling.implementation("nearpeak")(lambda x: lambda: x.mul_(2))
    doubling.implementation("again")(lambda x: lambda: x.mul_(2))
    row = run(doubling)
    assert [each.status for each in row.candidates()] == ["ok", "ok"]


@pytest.mark.parametrize("direction", ["backward", "training"])
def test_gradients_are_checked_and_timed(doubling, direction):
    doubling.work[direction] = doubling.work["forward"]
    doubling.kernels[direction] = "rms_norm_backward"
    doubling.differentiable = ("x",)
    row = runner.run_case("norm", Case(doubling, {"size": 10}, torch.float32, direction), SETTINGS, PEAKS)
    assert measurement(row, "nearpeak").status == "ok"


# Cases, limits and memory.


def test_names_of_cases_are_unique():
    names = [case.name for cases in suites.SUITES.values() for case in cases]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", [cases[0].name for cases in suites.SUITES.values()])
def test_cases_are_found_by_name(name):
    assert suites.find(name).name == name


@pytest.mark.parametrize("mask", ["full", "causal", 1, 5, 100])
@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (13, 13), (5, 21)])
def test_attention_counts_pairs_and_computes_its_truth_as_the_mask_says(mask, queries, keys, monkeypatch):
    sides = attention._sides(mask)
    allowed = reference.allowed(queries, keys, *sides, CPU)
    assert attention._visible_pairs(queries, keys, mask) == int(allowed.sum())
    monkeypatch.setattr(attention, "TRUTH_ROWS", 4)
    query, key, value = (torch.randn(1, 2, length, 8, dtype=torch.float64) for length in (queries, keys, keys))
    whole, _ = reference.attention(query, key, value, *sides, 8**-0.5, None)
    torch.testing.assert_close(attention._reference(query, key, value, mask), whole)
    torch.testing.assert_close(attention._sdpa(query, key, value, mask)(), whole)


def test_limit_is_the_larger_of_arithmetic_and_traffic():
    assert PEAKS.limit(Work(flops=1e11, read=10, written=10), torch.float32) == (1.0, "compute")
    seconds, bound = PEAKS.limit(Work(flops=1, read=2**17, written=2**17), torch.float32)
    assert bound == "memory"
    assert seconds == pytest.approx(2**20 / 2e10)


def test_peaks_fall_back_to_torch_without_the_extension(monkeypatch):
    monkeypatch.setattr(backends.native, "handle", None)
    monkeypatch.setattr(peaks, "FOOTPRINTS", (2**16,))
    monkeypatch.setattr(peaks, "MATMUL_SECONDS", 1e-5)
    measured = peaks.measure(CPU)
    assert all(rate >= measured.multiply_add["float32"] > 0 for rate in measured.multiply_add.values())
    assert measured.copy[2**16] > 0
    assert measured.read[2**16] > 0


def test_memory_counts_temporaries_and_neither_inputs_nor_outputs(doubling):
    size = 2**23

    def extra(prepare):
        doubling.implementation("tried")(prepare)
        case = Case(doubling, {"size": size}, torch.float32)
        return memory.resident_peak(case, doubling.implementations["tried"])

    if extra(lambda x: lambda: 2 * x) is None:
        pytest.skip("this system does not let a process reset its peak of resident memory")
    tolerance = 2**21
    assert extra(lambda x: lambda: 2 * x) < tolerance
    assert extra(lambda x: lambda: (x + 1) * 2) == pytest.approx(4 * size, abs=tolerance)


# Files and tables.


@pytest.fixture
def found(doubling):
    rows = [run(doubling), run(doubling)]
    slow = measurement(rows[1], "nearpeak")
    slow.ratios["eager"] = verdicts.Ratio(0.01, 0.009, 0.011, 1.0, verdicts.SLOWER)
    return results.Results({"processor": "a <processor>", **_machine()}, PEAKS, rows=rows, noise=0.01, complete=True)


def _machine():
    described = command.machine.describe()
    described.pop("processor")
    return described


def test_json_round_trip(found):
    assert results.Results.from_json(found.to_json()) == found


def test_json_of_another_format_is_refused(found):
    text = json.dumps({**json.loads(found.to_json()), "format": 0})
    with pytest.raises(ValueError, match="format"):
        results.Results.from_json(text)


def test_worst_row_is_marked(found):
    shown = table.suite_table("norm", found.rows)
    assert [line.mark for line in shown.lines] == ["fine", "worst"]
    console = rich.console.Console(width=80, record=True, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        console.print(table.to_rich(shown, console))
    assert capture.get().count("worst") == 1
    assert max(map(len, capture.get().splitlines())) <= 80


def test_markdown_table_has_one_cell_per_header(found):
    lines = table.to_markdown([table.suite_table("norm", found.rows)]).splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_page_is_self_contained_and_escaped(found):
    page = report.to_html(found)
    assert page.count("<svg") == 2
    assert "a &lt;processor&gt;" in page
    assert not re.findall(r"""(?:src|href)=["'](?!#)|@import|url\((?!#)""", page)


# The command line.


def invoke(*arguments):
    return CliRunner().invoke(cli.main, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["nrom"], "unknown suite 'nrom': choose from norm, rotary", id="suite"),
        pytest.param(["norm", "--dtype", "int8"], "unknown dtype 'int8': choose from float32", id="dtype"),
        pytest.param(["norm", "--filter", "nothing"], "no case of norm matches", id="filter"),
        pytest.param(["norm", "--time-budget", "0"], "more than 0 seconds", id="budget"),
        pytest.param(["norm", "--add", "no.py"], "there is no file no.py to add", id="add"),
        pytest.param(["compare", "a.json"], "compare takes two files of results", id="compare"),
        pytest.param(["compare", "no.json", "no.json"], "cannot read no.json", id="compare file"),
    ],
)
def test_wrong_requests_get_one_line_that_says_what_to_do(arguments, message):
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(cli, "BENCH_MODULES", ("a_package_that_does_not_exist",))
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


@pytest.fixture
def toy_suite(doubling, monkeypatch, tmp_path):
    """The suite norm replaced by two small cases, in an empty folder, with peaks that need no measuring."""
    cases = [Case(doubling, {"size": size}, torch.float32, quick=True) for size in (10, 20)]
    monkeypatch.setitem(suites.SUITES, "norm", cases)
    monkeypatch.setattr(peaks, "measure", lambda device, progress: PEAKS)
    monkeypatch.setattr(noise, "measure", lambda device: 0.01)
    monkeypatch.setattr(suites, "added", [])
    monkeypatch.setattr(runner, "extra_memory", lambda *arguments: None)
    monkeypatch.chdir(tmp_path)
    return doubling


def test_bench_writes_the_files_that_were_asked_for(toy_suite, tmp_path):
    arguments = ["--json", "a.json", "--html", "b/c.html", "--markdown", "d.md", "--time-budget", "0.01"]
    result = invoke("bench", "norm", *arguments)
    assert result.exit_code == 0, result.output
    found = results.Results.from_json((tmp_path / "a.json").read_text())
    assert found.complete
    assert result.stdout.count("doubling") >= 2, "the table is shown"
    assert [row.shape for row in found.rows] == ["10", "20"]
    assert (tmp_path / "b/c.html").exists()
    assert "| doubling |" in (tmp_path / "d.md").read_text()


@pytest.mark.parametrize(
    ("factor", "code"), [(1.0, 0), (1.3, compare.REGRESSION), (0.7, 0)], ids=["same", "slower", "faster"]
)
def test_compare_finds_a_kernel_that_became_slower_on_a_slower_machine(found, tmp_path, factor, code):
    def written(name, kernel, machine):
        for row in found.rows:
            for seed, each in enumerate(row.measurements):
                scale = machine * (kernel if each.implementation == "nearpeak" else 1)
                each.samples = timing.Samples(list(noisy(scale, 0.01, seed=seed)), 1)
        (tmp_path / name).write_text(found.to_json())
        return str(tmp_path / name)

    files = written("before.json", 1.0, 1.0), written("after.json", factor, 2.0)
    result = invoke("bench", "compare", *files)
    assert result.exit_code == code, result.output


def test_kernel_of_a_file_is_measured_too(toy_suite, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from nearpeak_bench import suites\n"
        "suites.SUITES['norm'][0].operator.implementation('mine')(lambda x: lambda: x * 2)\n"
    )
    result = invoke("bench", "norm", "--add", "mine.py", "--time-budget", "0.01", "--json", "a.json")
    assert result.exit_code == 0, result.output
    found = results.Results.from_json((tmp_path / "a.json").read_text())
    assert all(measurement(row, "mine").ratios for row in found.rows)


def test_selftest_tells_of_both_goals(toy_suite, monkeypatch):
    monkeypatch.setattr(selftest, "BUDGET", 0.05)
    monkeypatch.setattr(suites, "SUITES", {"norm": suites.SUITES["norm"]})
    result = invoke("bench", "selftest")
    assert result.exit_code in (0, selftest.FAILED)
    assert "a kernel against itself is the same: " in result.stdout
    assert "of 2 rows" in result.stdout
    assert invoke("bench", "selftest", "norm").exit_code == 2


def test_slowed_call_takes_longer_and_gives_the_same_result():
    samples = timing.time_interleaved({"call": lambda: 1, "slowed": selftest.slowed(lambda: 1, 1e-3)}, budget=0.0)
    assert min(samples["slowed"].seconds) >= 1e-3
    assert selftest.slowed(lambda: 1, 1e-6)() == 1


def test_wrong_kernel_fails_the_command(toy_suite):
    toy_suite.implementation("nearpeak")(lambda x: lambda: 3 * x)
    assert invoke("bench", "norm", "--time-budget", "0.01").exit_code == command.WRONG


def test_interrupted_run_keeps_finished_rows(toy_suite, monkeypatch, tmp_path):
    whole = runner.run_case

    def interrupted(suite, case, *rest):
        if case.shape == "20":
            raise KeyboardInterrupt
        return whole(suite, case, *rest)

    monkeypatch.setattr(runner, "run_case", interrupted)
    result = invoke("bench", "norm", "--time-budget", "0.01", "--json", "kept.json")
    assert result.exit_code == command.INTERRUPTED
    found = results.Results.from_json((tmp_path / "kept.json").read_text())
    assert not found.complete
    assert [row.shape for row in found.rows] == ["10"]
