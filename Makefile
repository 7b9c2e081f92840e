# Two commands do everything on a fresh machine: `make bench` and `make test`. Both set up VENV first (make install).
#
#   VENV=path       the virtual environment to use (default: .venv in this checkout, made if it is not there)
#   PYTHON=python   the interpreter that makes VENV
#   TORCH=...       the torch requirement that is installed into a VENV without torch

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= .nearpeak/gpu

PIP := $(VENV)/bin/pip --disable-pip-version-check
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.nearpeak-installed
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# The wide instruction sets' sources, compiled for any AVX2 processor, so that tests reach them everywhere.
export NEARPEAK_BUILD_EMULATED := 1

.PHONY: bench test results install lint format sanitize gpu wheel clean

bench: install
	$(RUN) -m nearpeak.cli bench all

# Two processes: nearly every test runs in one thread. One that is through takes over what the other has left.
test: install lint
	$(RUN) -m pytest tests -n 2 --dist worksteal

# The README's figures and charts, from the runs that are kept.
results: install
	$(RUN) -m nearpeak.cli bench report bench/results/*.json --readme README.md

install: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -c "import torch" 2>/dev/null || $(PIP) install --progress-bar off "$(TORCH)"
	$(PIP) install --progress-bar off -q "setuptools>=77" wheel ninja numpy
	$(PIP) install --progress-bar off -q --no-build-isolation -e ".[triton,bench,models,test]"
	touch $@

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: install
	VENV=$(VENV) bash tests/sanitize.sh

# On a machine with a GPU and no network: builds against the Python, torch and Triton that are there, runs the GPU tests
# and suites; results and logs go to OUT.
gpu:
	mkdir -p $(OUT)
	$(PYTHON) -m pip install --no-build-isolation --no-deps -e . 2>&1 | tee $(OUT)/build.log
	$(PYTHON) -m pytest tests -m gpu 2>&1 | tee $(OUT)/tests.log
	$(PYTHON) -m nearpeak.cli bench norm rotary attention --full --json $(OUT)/results.json --html $(OUT)/report.html \
	    2>&1 | tee $(OUT)/bench.log

wheel: install
	$(RUN) -m build --wheel --no-isolation

clean:
	rm -rf build dist .nearpeak kernels/nearpeak/_native*.so
