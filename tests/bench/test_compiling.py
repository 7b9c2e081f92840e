"""How long compiling takes, cold and cached."""

import pytest
import torch
from nearpeak_bench import compiling, table
from nearpeak_bench.cases import compiled
from toys import measurement, run


@pytest.fixture
def counters(monkeypatch):
    """Stands for Inductor's count of what its cache on disk had, and had not."""
    counts = {"hits": 0, "misses": 0}
    monkeypatch.setattr(compiling, "_inductor_counts", lambda: (counts["hits"], counts["misses"]))
    return counts


@pytest.mark.parametrize(
    ("what", "cold", "cached"), [("misses", True, False), ("hits", False, True), (None, False, False)]
)
def test_first_call_is_cold_or_cached_as_the_compiler_says(doubling, counters, what, cold, cached):
    def prepare(x):
        if what:
            counters[what] += 1
        return lambda: x + x

    doubling.implementation("eager", baseline=True)(prepare)
    eager = measurement(run(doubling), "eager")
    assert (eager.compile_cold is not None, eager.compile_cached is not None) == (cold, cached)
    assert measurement(run(doubling), "nearpeak").compile_cold is None


@pytest.mark.parametrize("asked", [True, False], ids=["full", "quick"])
def test_compiled_baseline_is_compiled_again_from_its_cache_if_asked(doubling, counters, monkeypatch, asked):
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    prepared = []

    def prepare(x):
        prepared.append(1)
        counters["misses" if len(prepared) == 1 else "hits"] += 1
        return lambda: x + x

    doubling.implementation("torch.compile", baseline=True, compiled=True)(prepare)
    row = run(doubling, cached_compile=asked)
    both = measurement(row, "torch.compile")
    assert both.compile_cold > 0
    assert (both.compile_cached is not None) == asked
    shown = table.suite_table("norm", [row])
    assert shown.headers[-1] == "compile"
    assert shown.lines[0].cells[-1].endswith(" cached)") == asked


def test_table_without_a_compiler_has_no_column_of_it(doubling):
    assert "compile" not in table.suite_table("norm", [run(doubling)]).headers


def test_triton_tells_what_it_compiled():
    triton = pytest.importorskip("triton")
    before = triton.knobs.compilation.listener
    with compiling.watched() as tally:
        for hit in (True, False, False):
            triton.knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit)
    assert (tally.compiled, tally.loaded) == (2, 1)
    assert triton.knobs.compilation.listener is before


@pytest.mark.slow
def test_inductor_s_cold_and_cached_times(doubling, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    @doubling.implementation("torch.compile", baseline=True, compiled=True)
    def _(x):
        function = compiled(lambda x: x + x)
        return lambda: function(x)

    both = measurement(run(doubling, cached_compile=True), "torch.compile")
    assert 0 < both.compile_cached < both.compile_cold
