#!/usr/bin/env bash
# Runs the tests of the C++ kernels under sanitizers: `make sanitize`.
#
# They get a build of their own, with little optimisation, installed into a folder under build/; their runtimes must be
# the first libraries of the Python process, hence LD_PRELOAD. What AddressSanitizer does not see by itself is shown to
# it by csrc/cpu/sanitize.h. ThreadSanitizer is not among them: it does not see OpenMP's barriers and reports every
# parallel loop of torch itself.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
PYTHON=$VENV/bin/python
CXX=${CXX:-g++}

SANITIZERS=address,undefined
SITE=build/sanitized
# The emulated instruction sets are the same sources as the real ones: they are left out where all real ones run.
export NEARPEAK_BUILD_EMULATED=$("$PYTHON" -c "from nearpeak import backends; print(int('amx' not in backends.isas_supported()))")
echo "== building with -fsanitize=$SANITIZERS"
NEARPEAK_SANITIZE=$SANITIZERS "$PYTHON" -m pip install -q --no-build-isolation --no-deps --upgrade --target "$SITE" .

# Python and torch never free some of their memory; what counts is where the kernels read and write. Fresh memory is
# filled with NaN, so that a result which depends on what nobody wrote shows.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:malloc_fill_byte=255:max_malloc_fill_size=1073741824
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export NEARPEAK_SANITIZING=1
export LD_PRELOAD="$($CXX -print-file-name=libasan.so) $($CXX -print-file-name=libubsan.so)"
echo "== running the kernels' tests"
# Without the reference, which is no C++ of ours. pytest must not capture what a sanitizer writes before it aborts.
PYTHONPATH=$SITE "$PYTHON" -m pytest -p no:cacheprovider -n 2 --capture=sys -k "not reference" \
    tests/test_norm.py tests/test_layer_norm.py tests/test_qk_norm.py tests/test_rotary.py tests/test_feedforward.py \
    tests/test_embedding.py tests/test_linear.py tests/test_linear_epilogue.py tests/test_quantized_linear.py \
    tests/test_quantized_input.py tests/test_gguf_linear.py tests/test_lora.py \
    tests/test_attention.py tests/test_attention_backward.py tests/test_attention_terms.py \
    tests/test_attention_sequences.py tests/test_attention_blocks.py tests/test_attention_score_mod.py \
    tests/test_attention_dropout.py tests/test_merge_attention.py
