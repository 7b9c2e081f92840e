"""Two runs against each other."""

import pytest
from nearpeak_bench import exits, timing
from toys import invoke, noisy


@pytest.mark.parametrize(
    ("factor", "code"), [(1.0, 0), (1.3, exits.REGRESSION), (0.7, 0)], ids=["same", "slower", "faster"]
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
