#!/usr/bin/env bash
# Runs the tests of the C++ kernels under sanitizers: `make sanitize`.
#
# Each sanitizer gets a build of its own, installed into a folder under build/ with nothing else changed; its runtime
# must be the first library of the Python process, hence LD_PRELOAD.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
PYTHON=$VENV/bin/python
CXX=${CXX:-g++}

under() {
    local sanitizer=$1 runtimes=$2
    shift 2
    local site=build/sanitized-$sanitizer
    echo "== building with -fsanitize=$sanitizer"
    NEARPEAK_SANITIZE=$sanitizer "$PYTHON" -m pip install -q --no-build-isolation --no-deps --upgrade --target "$site" .
    local preload=""
    for runtime in $runtimes; do preload+=" $($CXX -print-file-name="$runtime")"; done
    echo "== running $* under $sanitizer"
    LD_PRELOAD="${preload# }" PYTHONPATH="$site" "$PYTHON" -m pytest -p no:cacheprovider "$@"
}

# Python and torch never free some of their memory; what counts is where the kernels read and write.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
KERNEL_TESTS="tests/test_norm.py tests/test_rotary.py tests/test_attention.py"
# shellcheck disable=SC2086
under address,undefined "libasan.so libubsan.so" $KERNEL_TESTS -k "not hypothesis and not compile"

# OpenMP's barriers are invisible to ThreadSanitizer, which would report every parallel loop of torch itself; only races
# with a frame in our own library count.
export TSAN_OPTIONS="report_bugs=1:exitcode=66:suppressions=$PWD/tests/sanitize-thread.txt"
under thread "libtsan.so" tests/test_operators.py -k "threads"
