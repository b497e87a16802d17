# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.d2dcompile-installed

.PHONY: demo ablate test lint check bench-cpu bench-gpu bench-models bench-cluster bench-matching bench-universe clean

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py --out out/quickstart

ablate: $(STAMP)
	$(BIN)/python examples/quickstart.py --ablate --out out/ablate

# Types are checked by a test, beside the others. Modules are compiled when they are first imported, not all at
# the installation: where Python is told to keep nothing, every process of the tests would do so again.
test: export PYTHONDONTWRITEBYTECODE =
test: $(STAMP) lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

check: lint
	rm -rf build/typing
	$(BIN)/python -c "from setuptools import setup; setup()" -q build_py --build-lib build/typing
	$(BIN)/mypy

bench-cpu: $(STAMP)
	$(BIN)/python benchmarks/cpu.py

bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

bench-models: $(STAMP)
	$(BIN)/python benchmarks/models.py

bench-cluster: $(STAMP)
	$(BIN)/python benchmarks/cluster.py

bench-matching: $(STAMP)
	$(BIN)/python benchmarks/matching.py

bench-universe: $(STAMP)
	$(BIN)/python benchmarks/universe.py --fresh

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf build out $(VENV)
