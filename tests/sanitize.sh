#!/usr/bin/env bash
# Runs the tests of the C++ kernels under sanitizers: `make sanitize`.
#
# They get a build of their own, installed into a folder under build/; their runtimes must be the
# first libraries of the Python process, hence LD_PRELOAD. ThreadSanitizer is not among them: it does not see OpenMP's
# barriers and reports every parallel loop of torch itself.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
PYTHON=$VENV/bin/python
CXX=${CXX:-g++}

SANITIZERS=address,undefined
SITE=build/sanitized
echo "== building with -fsanitize=$SANITIZERS"
NEARPEAK_SANITIZE=$SANITIZERS "$PYTHON" -m pip install -q --no-build-isolation --no-deps --upgrade --target "$SITE" .

# Python and torch never free some of their memory; what counts is where the kernels read and write.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export LD_PRELOAD="$($CXX -print-file-name=libasan.so) $($CXX -print-file-name=libubsan.so)"
echo "== running the kernels' tests"
PYTHONPATH=$SITE "$PYTHON" -m pytest -p no:cacheprovider tests/test_norm.py tests/test_layer_norm.py \
    tests/test_rotary.py tests/test_feedforward.py tests/test_linear.py tests/test_attention.py \
    tests/test_attention_backward.py tests/test_attention_terms.py tests/test_attention_sequences.py tests/test_attention_dropout.py
