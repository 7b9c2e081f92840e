"""The CUDA kernels, run on the host: as exact as the plain layers, within their bounds, in any width and layout."""

import math
import os
import pathlib
import subprocess
import sys

import cuda_emulation
import nearpeak
import pytest
import test_norm
import test_rotary
import torch
from draws import assert_as_exact
from inputs import DTYPES, laid_out_like, randn
from test_norm import Case

pytestmark = [
    pytest.mark.skipif(cuda_emulation.COMPILER is None, reason="no C++ compiler (g++)"),
    # The C++ kernels for the CPU, for the time of a test.
    pytest.mark.filterwarnings("ignore:Warning only once for all operators"),
]


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory):
    torch.ops.load_library(cuda_emulation.build(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(autouse=True)
def _serving(emulated_library):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in conftest.py
    with cuda_emulation.serving():
        yield
    torch.set_num_threads(threads)


# Widths on both sides of each decision: lanes of a warp, whole warps, one row a block, rows in a loop; rows of scalars,
# and of packs (where 16 bytes divide them).
NORM_CASES = [
    *(Case(rows=(3,), width=width) for width in (1, 7, 64, 127, 640, 4096, 8200)),
    *(Case(rows=(3,), width=width, residual=True, offset=1.0) for width in (1, 7, 64, 127, 640, 4096, 8200)),
    *(Case(rows=(rows,), width=width, residual=True) for rows in (0, 1, 17) for width in (7, 64, 4096)),
    *(Case(rows=(2,), width=width, residual=True) for width in (16400, 33000, 70000)),
    *(Case(rows=(3,), width=640, weight=weight, offset=1.0, residual=True) for weight in (None, torch.float32)),
    *(Case(rows=(3,), width=33, weight=weight, residual=True) for weight in (None, torch.float32)),
    Case(rows=(2,), width=70000, weight=None),
    # More rows than the blocks of a backward call take at once.
    Case(rows=(700,), width=33),
    Case(rows=(40,), width=640),
    Case(rows=(7,), width=16400),
]


@pytest.mark.parametrize("case", NORM_CASES, ids=test_norm.case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_as_exact_as_plain(dtype, case):
    draws = test_norm.draws_of(case, dtype)[: 8 if case.width < 1000 else 1 if case.width > 30000 else 2]
    assert_as_exact(test_norm.results(case, draws), test_norm.standards_of(case, draws))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_norm_that_casts_first_gives_llamas_very_numbers(dtype):
    test_norm.test_cast_first_gives_llamas_very_numbers(None, dtype)


@pytest.mark.parametrize("layout", test_norm.LAYOUTS)
@pytest.mark.parametrize("width", [64, 67])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_any_layout(dtype, width, layout):
    case, strange = Case(rows=(4, 5), width=width, residual=True), test_norm.LAYOUTS[layout]
    draws = [
        ((strange(x), strange(residual), weight), [strange(grad) for grad in grads])
        for (x, residual, weight), grads in test_norm.draws_of(case, dtype)
    ]
    assert_as_exact(test_norm.results(case, draws), test_norm.standards_of(case, draws))


@pytest.mark.parametrize("extreme", test_norm.EXTREMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_stays_finite_where_plain_does(dtype, extreme):
    test_norm.test_where_plain_stays_finite_so_does_nearpeak(None, dtype, extreme, 0.0)


@pytest.mark.parametrize("places", ["x,new", "new,x", "new,residual", "residual,new", "x,residual", "residual,x"])
@pytest.mark.parametrize("width", [67, 4096, 33000])
def test_norm_may_write_over_its_inputs(width, places):
    test_norm.test_out_may_be_the_inputs(None, width, places)


@pytest.mark.parametrize("width", [1, 17, 64, 4097, 33000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_writes_nothing_beside_its_output(width, dtype):
    test_norm.test_out_is_written_whole_and_nothing_beside_it(None, width, dtype)


@pytest.mark.parametrize("width", [64, 8200])
def test_a_bad_row_spoils_no_other(width):
    x = randn(5, width)
    good = nearpeak.rms_norm(x)
    x[2, 40] = math.nan
    y = nearpeak.rms_norm(x)
    assert torch.equal(y[[0, 1, 3, 4]], good[[0, 1, 3, 4]])
    assert y[2].isnan().all()


ROTARY_CASES = [
    *(
        test_rotary.Case(head_dim=head_dim, interleaved=interleaved)
        for head_dim in (2, 6, 14, 16, 34, 64, 80, 128, 256, 320, 2080)
        for interleaved in (False, True)
    ),
    *(
        test_rotary.Case(table=table, table_dtype=torch.float32, interleaved=interleaved)
        for table in test_rotary.TABLES
        for interleaved in (False, True)
    ),
    *(test_rotary.Case(sequence=sequence) for sequence in (0, 1, 33)),
    # More heads than a thread turns, query's and key's in the same group, and none.
    *(test_rotary.Case(heads=heads, key_heads=key_heads) for heads, key_heads in ((17, 3), (1, 1), (4, 0), (0, 2))),
    test_rotary.Case(heads=20, key_heads=13, sequence=600, batch=1, head_dim=16),
    test_rotary.Case(batch=0),
    *(
        test_rotary.Case(head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved)
        for head_dim, rotary_dim in ((7, 4), (64, 16), (80, 32), (80, 20), (2080, 32))
        for interleaved in (False, True)
    ),
]


@pytest.mark.parametrize("case", ROTARY_CASES, ids=test_rotary.case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_is_as_exact_as_plain(dtype, case):
    draws = test_rotary.draws_of(case, dtype)
    assert_as_exact(test_rotary.results(case, dtype, draws), test_rotary.standards_of(case, dtype, draws))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("layout", [*test_rotary.LAYOUTS, "packed", "expanded_heads"])
@pytest.mark.parametrize("head_dim", [34, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_keeps_any_layout(dtype, head_dim, layout, interleaved):
    case = test_rotary.Case(head_dim=head_dim, interleaved=interleaved)
    draws = [(test_rotary.laid_out(layout, *inputs), grads) for inputs, grads in test_rotary.draws_of(case, dtype)]
    mine = test_rotary.results(case, dtype, draws)
    assert_as_exact(mine, test_rotary.standards_of(case, dtype, draws))
    for tensor, like in zip(mine[0][:2], draws[0][0], strict=True):
        assert laid_out_like(tensor, like)


@pytest.mark.parametrize("layout", [*test_rotary.LAYOUTS, "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_in_place_writes_only_its_own_elements(dtype, layout):
    for rotary_dim in (None, 20):
        test_rotary.test_in_place_writes_only_its_own_elements(None, dtype, layout, rotary_dim)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_rotary_in_place_is_the_same(interleaved):
    test_rotary.test_in_place_and_without_gradients_are_the_same(None, test_rotary.Case(interleaved=interleaved))


def path_of(library):
    command = [cuda_emulation.COMPILER, f"-print-file-name={library}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif("NEARPEAK_SANITIZE" in os.environ, reason="this is the sanitized run")
@pytest.mark.timeout(3600)
def test_under_sanitizers():
    """All of the above again: reads and writes out of bounds, and misaligned ones, end the process."""
    environment = {
        **os.environ,
        "NEARPEAK_SANITIZE": "address,undefined",
        "LD_PRELOAD": " ".join(map(path_of, ("libasan.so", "libubsan.so"))),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-xs", pathlib.Path(__file__).name]
    result = subprocess.run(
        command, env=environment, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
