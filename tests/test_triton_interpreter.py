"""Numerics of the Triton kernels without a GPU: tests/interpreted/ in processes where Triton's interpreter is on.

Triton decides as kernels are imported whether it compiles or interprets them, so this process cannot do it itself.
"""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

FOLDER = pathlib.Path(__file__).parent / "interpreted"
ATTENTION = [f"attention{part}" for part in ("", "_backward", "_terms", "_sequences", "_dropout", "_score_mod")]


@pytest.mark.timeout(1800)  # a family takes some minutes, and twice that on a busy machine
@pytest.mark.parametrize(
    "family", ["norm", "layer_norm", "qk_norm", "rotary", "feedforward", "embedding", "quantized_linear", *ATTENTION]
)
def test_interpreted_kernels_are_as_exact_as_plain(family):
    file = FOLDER / f"test_{family}_kernels.py"
    options = ("-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NEARPEAK_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        pytest.fail(f"{file.name} with TRITON_INTERPRET=1:\n{run.stdout}{run.stderr}", pytrace=False)
