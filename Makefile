# make demo   a real model at 2.5 bits per weight, measured, in minutes
# make test   the gate that people and CI run alike: format, lint, types, import contracts, tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# A CUDA build is several gigabytes. On a machine without a GPU, point pip at an index of CPU builds: make demo TORCH_ARGS="--index-url ..."
TORCH_ARGS ?=
DEMO := demo

.PHONY: demo test format install clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_ARGS) $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .[dev]
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
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --cov --cov-report=term --durations=25

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(DEMO) .cache
