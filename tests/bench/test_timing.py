"""The harness's statistics and timing, and its own test of both. No absolute times."""

import numpy as np
import pytest
from nearpeak_bench import exits, selftest, suites, timing, verdicts
from toys import invoke, noisy


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


def test_selftest_tells_of_both_goals(toy_suite, monkeypatch):
    monkeypatch.setattr(selftest, "BUDGET", 0.05)
    monkeypatch.setattr(suites, "SUITES", {"norm": suites.SUITES["norm"]})
    result = invoke("bench", "selftest")
    assert result.exit_code in (0, exits.SELFTEST)
    assert "a kernel against itself is the same: " in result.stdout
    assert "of 2 rows" in result.stdout
    assert invoke("bench", "selftest", "norm").exit_code == 2


def test_slowed_call_takes_longer_and_gives_the_same_result():
    samples = timing.time_interleaved({"call": lambda: 1, "slowed": selftest.slowed(lambda: 1, 1e-3)}, budget=0.0)
    assert min(samples["slowed"].seconds) >= 1e-3
    assert selftest.slowed(lambda: 1, 1e-6)() == 1
