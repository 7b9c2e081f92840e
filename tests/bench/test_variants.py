"""Rows that are repeated alone, swept, threaded, and cold."""

import os
import pathlib
import re
import shlex

import pytest
import torch
from nearpeak_bench import caches, command, options, repeat, results, runner, suites, table, timing, variants
from nearpeak_bench.cases import Case, Variant, Work
from toys import CPU, PEAKS, SETTINGS, bench, interrupt_second_case, invoke, measurement


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr(caches, "last_level_bytes", lambda device: 1024)
    monkeypatch.setattr(suites, "varied", {})


def rows_of(path):
    return results.Results.from_json(path.read_text()).rows


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["norm"], id="plain"),
        pytest.param(["norm", "--full"], id="full"),
        pytest.param(["norm", "--sweep", "size=10,40,160"], id="sweep"),
        pytest.param(["norm", "--threads", "1", "--caches", "cold", "--sweep", "size=10,11"], id="all"),
    ],
)
def test_command_of_a_row_repeats_exactly_that_row(toy_suite, tmp_path, arguments):
    result = bench(*arguments, "--json", "a.json")
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "a.json")
    assert len({row.command for row in rows}) == len(rows) > 1
    program, *words = shlex.split(rows[1].command)
    assert program == "nearpeak"
    suites.varied.clear()
    assert invoke(*words, "--json", "b.json").exit_code == 0
    (again,) = rows_of(tmp_path / "b.json")
    assert (again.case, again.parameters, again.threads, again.cold, again.command) == (
        rows[1].case, rows[1].parameters, rows[1].threads, rows[1].cold, rows[1].command,
    )  # fmt: skip


def test_case_selects_one_of_those_whose_names_contain_its_own():
    name = "rms_norm-16x768-float32-forward"
    assert len(suites.select(["norm"], pattern=name)) > 1
    assert [case.name for _, case in suites.named([name])] == [name]


def test_command_keeps_what_shaped_the_row_and_leaves_out_what_chose_it(doubling, monkeypatch):
    for name in repeat.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NEARPEAK_ISA", "avx2")
    case = Case(doubling, {"size": 10}, torch.float32)
    asked = options.Options.of(
        suites=["norm"], dtype=["float32"], case=None, time_budget=None, threshold=["5"], full=True, pattern="doub",
        shapes=["my model/config.json"], add=["mine.py"], isolate=False, time_limit=9.0, memory_limit=2.5,
        json="a.json",
    )  # fmt: skip
    assert repeat.command(case, asked) == (
        "NEARPEAK_ISA=avx2 nearpeak bench --case doubling-10-float32-forward --shapes 'my model/config.json' "
        "--add mine.py --memory-limit 2.5 --time-limit 9 --full --no-isolate"
    )


def test_models_rows_share_the_command_that_repeats_them(monkeypatch):
    for name in repeat.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    command = repeat.model_command(options.Options(full=True))
    assert command == "OMP_NUM_THREADS=2 nearpeak bench model --full"
    shown = table.model_table({"rows": [{"model": "a"}, {"model": "b"}], "command": command})
    assert shown.commands == [command]
    assert all(line.command == command for line in shown.lines)
    assert table.model_table({"rows": [{"model": "a"}]}).commands == [], "results of earlier versions have none"


def test_case_of_a_model_s_shapes_is_found_by_its_command_s_options(toy_suite):
    suites.use_shapes(("gpt2",))
    assert [case.name for _, case in suites.named(["gelu_tanh-1024x3072-float32-forward"])]
    assert suites.find("gelu_tanh-1024x3072-float32-forward").operator.name == "gelu_tanh"


@pytest.mark.parametrize(
    ("base", "sweep", "changed"),
    [
        ("attention-16:16x512x64-causal-float32-forward", "S=96", {"queries": 96, "keys": 96}),
        ("attention_decode-32:8x4096x128-float32-forward", "S=96", {"queries": 1, "keys": 96}),
        ("attention_window-8:8x8192x64-window-512-float32-forward", "mask=64", {"queries": 8192, "mask": 64}),
        ("attention_terms-1x16x512x128-alibi-float32-forward", "S=96", {"length": 96}),
        ("apply_rotary-32:8x2048x128-transposed-float32-backward", "S=96", {"sequence": 96}),
        ("rms_norm-16x768-float32-forward", "rows=96", {"rows": 96, "width": 768}),
        ("linear-1x640x2048-float32-forward", "inputs=96", {"rows": 1, "inputs": 96, "outputs": 2048}),
    ],
)
def test_sweep_changes_one_dimension_and_keeps_the_rest(base, sweep, changed):
    original = suites.find(base)
    case = suites.vary(Variant(base, sweep))
    assert case.parameters == {**original.parameters, **changed}
    assert (case.dtype, case.direction, case.operator) == (original.dtype, original.direction, original.operator)
    assert suites.find(case.name) is case
    assert case.work().flops > 0


def test_fresh_process_finds_every_variant(doubling, monkeypatch):
    monkeypatch.setattr(suites, "SUITES", {"norm": [Case(doubling, {"size": 10}, torch.float32)]})
    made = [suites.vary(Variant("doubling-10-float32-forward", "size=40", count, True)) for count in (1, None)]
    assert [case.name for case in made] == [
        "doubling-40-1-thread-cold-float32-forward", "doubling-40-cold-float32-forward"
    ]  # fmt: skip
    state = suites.state()
    suites.varied.clear()
    suites.restore(state)
    assert [suites.find(case.name).parameters for case in made] == [{"size": 40}] * 2


def test_cases_that_a_sweep_makes_alike_run_once(toy_suite, tmp_path):
    assert bench("norm", "--sweep", "size=40,30,40", "--json", "a.json").exit_code == 0
    assert [row.shape for row in rows_of(tmp_path / "a.json")] == ["30", "40"]


def test_interrupted_sweep_goes_on(toy_suite, monkeypatch, tmp_path):
    ran = interrupt_second_case(monkeypatch)
    assert bench("norm", "--sweep", "size=10,40,160").exit_code == 130
    suites.varied.clear()
    assert invoke("bench", "--resume", "--json", "a.json").exit_code == 0
    assert ran == ["10", "40", "40", "160"]
    assert len(rows_of(tmp_path / "a.json")) == 3


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_row_runs_with_its_threads_and_the_next_with_as_many_as_before(doubling):
    before, seen = torch.get_num_threads(), set()

    def prepare(x):
        def call():
            seen.add(torch.get_num_threads())
            return 2 * x

        return call

    doubling.implementation("nearpeak")(prepare)
    other = 1 if before > 1 else 2
    case = Case(doubling, {"size": 10}, torch.float32, variant=Variant("any", threads=other))
    row = runner.run_case("norm", case, SETTINGS, PEAKS)
    assert (seen, row.threads, torch.get_num_threads()) == ({other}, other, before)


def test_cold_samples_are_single_calls_each_after_an_eviction():
    events = []

    def clock(call, repeats):
        events.append((call(), repeats))
        return 1e-4 * repeats

    calls = {name: (lambda name=name: name) for name in "ab"}
    samples = timing.time_interleaved(calls, 0.0, clock, evict=lambda: events.append("evict"))
    assert {each.repeats for each in samples.values()} == {1}
    timed = events[events.index("evict") :]
    assert timed[::2] == ["evict"] * (2 * timing.MIN_ROUNDS)
    assert {each for each in timed[1::2]} == {("a", 1), ("b", 1)}


def test_cold_row_evicts_and_says_so(doubling, monkeypatch):
    evictions = []
    monkeypatch.setattr(caches, "evictor", lambda device: lambda: evictions.append(1))
    case = Case(doubling, {"size": 10}, torch.float32, variant=Variant("any", cold=True))
    row = runner.run_case("norm", case, SETTINGS, PEAKS)
    rounds = len(measurement(row, "nearpeak").samples.seconds)
    assert len(evictions) == 2 * rounds
    assert (row.cold, row.shape) == (True, "10 cold")
    del evictions[:]
    assert not runner.run_case("norm", Case(doubling, {"size": 10}, torch.float32), SETTINGS, PEAKS).cold
    assert not evictions


def test_eviction_writes_more_than_the_last_cache_holds(monkeypatch):
    monkeypatch.undo()
    assert caches.last_level_bytes(CPU) >= 2**18
    monkeypatch.setattr(caches, "last_level_bytes", lambda device: 4096)
    written = caches.evictor(CPU)()
    assert written.numel() * written.element_size() > 4096


def test_cold_data_is_held_against_memory_however_small():
    small = Work(flops=0, read=1000, written=1000)
    warm, _ = PEAKS.limit(small, torch.float32)
    cold, bound = PEAKS.limit(small, torch.float32, cold=True)
    assert (warm, cold, bound) == (8000 / 2e10, 8000 / 1e10, "memory")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["norm", "--case", "x"], "leave the suites, --dtype and --filter out", id="case and suite"),
        pytest.param(["--case", "doubling-11-float32-forward"], "did you mean doubling-1", id="case"),
        pytest.param(["norm", "--sweep", "S=1,2"], "no chosen case has the dimension S; those it has: size", id="dim"),
        pytest.param(["norm", "--sweep", "size=1,x"], "--sweep size=1,x: give a dimension and its sizes", id="size"),
        pytest.param(["norm", "--sweep", "size=0"], "--sweep size=0: give a dimension and its sizes", id="zero"),
        pytest.param(["norm", "--sweep", "size"], "--sweep size: give a dimension and its sizes", id="no sizes"),
        pytest.param(["norm", "--threads", "two"], "--threads two: give numbers of threads", id="threads"),
        pytest.param(["norm", "--threads", "9999"], "so give at most", id="cores"),
        pytest.param(["all", "--caches", "cold"], "leave model and all out", id="model"),
        pytest.param(["norm", "--caches", "tepid"], "'tepid' is not one of 'warm', 'cold'", id="caches"),
    ],
)
def test_wrong_requests_say_what_to_do(toy_suite, arguments, message):
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


DOCUMENTED = re.findall(
    r"^    (?:\w+=\S+ )?nearpeak bench (.*--(?:case|sweep|threads|caches|profile) .*?)(?:   .*)?$",
    (pathlib.Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize("line", [line for line in DOCUMENTED if "NAME" not in line and not line.startswith("bisect ")])
def test_documented_commands_choose_cases(line, monkeypatch):
    asked = []
    monkeypatch.setattr(suites, "SUITES", dict(suites.SUITES))
    monkeypatch.setattr(suites, "shaped", [])
    monkeypatch.setattr(variants.system, "cores", lambda: 8)
    monkeypatch.setattr(command, "run", lambda options, console: asked.append(options) or 0)
    assert invoke("bench", *shlex.split(line)).exit_code == 0
    if asked[0].shapes:
        suites.use_shapes(asked[0].shapes)
    _, cases = command._choose(asked[0])
    assert cases


def test_dimensions_of_a_case_are_its_sizes():
    found = variants.dimensions({"heads": 4, "queries": 8, "keys": 8, "mask": "causal", "term": "bias"})
    assert found == {"heads": ["heads"], "S": ["queries", "keys"]}
