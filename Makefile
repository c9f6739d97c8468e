# make demo        a real model at 2.5 bits per weight, measured, in minutes
# make test        the gate: format, lint, types, import contracts, and every test that is not long by nature
# make test-long   the tests that are long by nature, and coverage; tests/README.md says how many minutes each group takes
# make coverage    the lines and branches that the tests of `make test` reach

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
TORCH ?= torch==2.13.0
# A CUDA build is several gigabytes. On a machine without a GPU, point pip at an index of CPU builds: make demo TORCH_ARGS="--index-url ..."
TORCH_ARGS ?=
DEMO := demo
# Files of tests are forgotten when the tests end, so they need not reach a disk
MEMORY := $(shell test -w /dev/shm && test $$(df --output=avail -k /dev/shm 2>/dev/null | tail -1) -gt 4000000 && echo /dev/shm)
PYTEST = $(if $(MEMORY),PYTEST_DEBUG_TEMPROOT=$(MEMORY)) $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: demo test test-long coverage format install clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install $(TORCH_ARGS) $(TORCH)
	$(PIP) install --editable .[dev]
	touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/python -m service.cli.demo $(DEMO)/model
	rm -rf $(DEMO)/out
	$(BIN)/bitwright run $(DEMO)/model/SmolLM2-135M-Instruct.Q4_1.gguf --budget 2.5bpw --effort fast --out $(DEMO)/out --cache $(DEMO)/cache

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --cache-dir .import_linter_cache
	$(PYTEST) -m "not long" --durations=10

test-long: install
	$(PYTEST) -m long --durations=10
	$(MAKE) coverage

coverage: install
	$(PYTEST) -m "not long" --cov --cov-report=term

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(DEMO) .cache
