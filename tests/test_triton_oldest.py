"""The oldest Triton that pyproject.toml allows compiles the kernels, too: needs the network, for a wheel of it."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).parents[1]


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, "-m", *command], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}:\n{done.stdout}{done.stderr}", pytrace=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_oldest_declared_triton_compiles_every_kernel(tmp_path):
    oldest = re.search(r'"triton>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()).group(1)
    run("pip", "install", "-q", "--no-deps", "--target", str(tmp_path), f"triton=={oldest}")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    run("pytest", "-p", "no:cacheprovider", "tests/test_triton_compile.py", PYTHONPATH=os.pathsep.join(paths))
