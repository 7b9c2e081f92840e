"""A user's own kernels, measured beside ours."""

from nearpeak_bench import results
from toys import invoke, measurement


def test_kernel_of_a_file_is_measured_too(toy_suite, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from nearpeak_bench import suites\n"
        "suites.SUITES['norm'][0].operator.implementation('mine')(lambda x: lambda: x * 2)\n"
    )
    result = invoke("bench", "norm", "--add", "mine.py", "--time-budget", "0.01", "--json", "a.json")
    assert result.exit_code == 0, result.output
    found = results.Results.from_json((tmp_path / "a.json").read_text())
    assert all(measurement(row, "mine").ratios for row in found.rows)
