"""How the harness runs one case: its gate of correctness, its limits, its memory."""

import pytest
import torch
from nearpeak import backends
from nearpeak.attention import reference
from nearpeak_bench import attention, memory, peaks, runner, suites, table, timing
from nearpeak_bench.cases import Case, Work
from toys import CPU, PEAKS, SETTINGS, measurement, run


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


@pytest.mark.parametrize(("unlucky_calls", "status"), [(1, "ok"), (100, "wrong")])
def test_an_unlucky_draw_is_judged_with_others(doubling, unlucky_calls, status):
    calls = []

    def prepare(x):
        def call():
            calls.append(1)
            result = 2 * x
            scale = result.square().mean().sqrt() * torch.finfo(x.dtype).eps
            result[0] += 8 * scale * (len(calls) <= unlucky_calls)
            return result

        return call

    doubling.implementation("nearpeak")(prepare)
    assert measurement(run(doubling), "nearpeak").status == status


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


def test_names_of_cases_are_unique():
    names = [case.name for cases in suites.SUITES.values() for case in cases]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", [cases[0].name for cases in suites.SUITES.values()])
def test_cases_are_found_by_name(name):
    assert suites.find(name).name == name


@pytest.mark.parametrize("mask", ["full", "causal", 1, 5, 100])
@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (13, 13), (5, 21)])
def test_attention_counts_pairs_and_computes_its_truth_as_the_mask_says(mask, queries, keys, monkeypatch):
    sides = attention.sides(mask)
    allowed = reference.allowed(queries, keys, *sides, CPU)
    assert attention._visible_pairs(queries, keys, mask) == int(allowed.sum())
    monkeypatch.setattr(attention, "TRUTH_ROWS", 4)
    query, key, value = (torch.randn(1, 2, length, 8, dtype=torch.float64) for length in (queries, keys, keys))
    whole, _ = reference.attention(query, key, value, *sides, 8**-0.5, None)
    torch.testing.assert_close(attention._reference(query, key, value, mask), whole)
    torch.testing.assert_close(attention.sdpa(query, key, value, mask)(), whole)


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


def test_smaller_footprint_has_at_least_a_larger_one_s_bandwidth(monkeypatch):
    rates = {2**15: 1e8, 2**20: 3e10, 2**25: 1e10, 2**26: 2e10}
    monkeypatch.setattr(peaks, "FOOTPRINTS", tuple(rates))
    monkeypatch.setattr(peaks, "_native", lambda *arguments: 0.0)
    monkeypatch.setattr(peaks, "_matmul_rate", lambda *arguments: 1e11)
    monkeypatch.setattr(peaks, "_bandwidth", lambda footprint, device: (rates[footprint], 2 * rates[footprint]))
    measured = peaks.measure(CPU)
    assert measured.copy == {2**15: 3e10, 2**20: 3e10, 2**25: 2e10, 2**26: 2e10}
    assert measured.read == {footprint: 2 * rate for footprint, rate in measured.copy.items()}


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
