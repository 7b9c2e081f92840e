"""What rows say together: how time grows with a size, and what more threads gain."""

import dataclasses

import numpy as np
import pytest
import torch
from nearpeak_bench import growth, report, results, runner, table, timing, verdicts
from nearpeak_bench.cases import Case, Variant
from toys import PEAKS, SETTINGS, noisy


@pytest.fixture
def measured(doubling):
    """Makes a row of a size whose implementations take the seconds that are given, nearly."""

    def make(size, seconds, sigma=0.01, variant=None):
        case = Case(doubling, {"size": size}, torch.float32, variant=variant or Variant())
        row = runner.run_case("norm", case, SETTINGS, PEAKS)
        for seed, each in enumerate(row.measurements):
            each.samples = timing.Samples(list(noisy(seconds, sigma, seed=seed + size)), 1)
            each.spread = verdicts.spread(each.samples.seconds)
        return row

    return make


def samples_of(sizes, exponent, sigma):
    return [noisy(1e-6 * size**exponent, sigma, seed=size) for size in sizes]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_exponent_is_found_within_an_interval_that_grows_with_noise(exponent):
    sizes = [128, 256, 512, 1024]
    quiet, rough = (growth.fit(sizes, samples_of(sizes, exponent, sigma)) for sigma in (0.01, 0.3))
    assert quiet.exponent == pytest.approx(exponent, abs=0.01)
    assert quiet.factor == pytest.approx(1e-6, rel=0.05)
    assert rough.lower < exponent < rough.upper
    assert rough.upper - rough.lower > 10 * (quiet.upper - quiet.lower)


def test_interval_holds_the_exponent_as_often_as_it_claims():
    sizes = [16, 64, 256]
    random = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        fit = growth.fit(sizes, [size * random.lognormal(0, 0.1, 40) for size in sizes], seed)
        held += fit.lower < 1 < fit.upper
    assert 0.9 * 200 <= held <= 200


def test_time_that_is_no_power_is_said():
    sizes = [1, 10, 100]
    fit = growth.fit(sizes, [[1.0 + size] * 10 for size in sizes])
    assert fit.deviation > table.NOTABLE_DEVIATION
    assert growth.fit(sizes, [[3.0 * size] * 10 for size in sizes]).deviation == pytest.approx(0)


def test_rows_that_differ_in_one_dimension_alone_are_fitted_together(measured):
    rows = [measured(size, 1e-6 * size**2) for size in (64, 16, 256)]
    (grown,) = growth.growths(rows)
    assert (grown.dimension, grown.shape) == ("size", "[size]")
    assert grown.fits.keys() == {"nearpeak", "eager"}
    assert grown.fits["nearpeak"].sizes == [16, 64, 256]
    assert grown.fits["nearpeak"].exponent == pytest.approx(2, abs=0.02)
    assert grown.limit is not None
    for change in ({"dtype": "bfloat16"}, {"direction": "backward"}, {"threads": 2}, {"cold": True}, {"operator": "x"}):
        assert not growth.growths([*rows[:2], dataclasses.replace(rows[2], **change)]), change


def test_too_few_or_too_similar_sizes_are_not_fitted(measured):
    assert not growth.growths([measured(size, 1e-6) for size in (16, 256)])
    assert not growth.growths([measured(size, 1e-6) for size in (16, 20, 24)])


def test_speedup_over_fewer_threads(measured):
    rows = [measured(16, 1e-3 / count, variant=Variant("any", threads=count)) for count in (2, 1)]
    (scaled,) = growth.scalings(rows)
    assert (scaled.row.threads, scaled.least, scaled.shape) == (2, 1, "16")
    ratio = scaled.speedups["nearpeak"]
    assert ratio.lower < 2 < ratio.upper
    assert not growth.scalings([measured(16, 1e-3)])


def test_report_shows_growth_and_speedups_in_every_form(measured):
    rows = [
        measured(size, 1e-6 * size / count, variant=Variant("any", threads=count))
        for size in (16, 64, 256)
        for count in (1, 2)
    ]
    machine = runner_machine()
    found = results.Results(machine, PEAKS, rows=rows, noise=0.01, complete=True)
    _, grown, scaled = table.suite_tables("norm", rows)
    assert [line.cells[:4] for line in grown.lines] == [
        ["doubling", f"[size] {count}", "fp32", "16-256"] for count in ("1 thread", "2 threads")
    ]
    assert grown.lines[0].cells[4].startswith(("1.00 (", "0.99 (", "1.01 ("))
    assert [line.cells[3] for line in scaled.lines] == ["2 over 1"] * 3
    markdown, page = table.to_markdown(report.tables_of(found)), report.to_html(found)
    for text in (markdown, page):
        assert "time grows as size^b" in text
        assert "speed-up by threads" in text
    assert "doubling fp32: time over size, both logarithmic" in page
    assert page.count("<svg") == 4


def runner_machine():
    from nearpeak_bench import machine

    return machine.describe()
