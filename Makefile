# Everything runs in .venv, made on first use. `make demo` and `make test` need nothing but Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CPU wheels of torch from this index where one is needed; empty takes what pip is configured for.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all lint format figures wheel clean

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch by itself first: its version decides what the rest resolves to.
	$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

$(VENV)/examples: $(VENV)/torch setup.cfg
	$(PIP) -e '.[examples]'
	touch $@

$(VENV)/dev: $(VENV)/examples
	$(PIP) -e '.[dev]'
	touch $@

demo: $(VENV)/examples  ## the main job, on scikit-learn's digits
	$(BIN)/python examples/digits/search.py

test: $(VENV)/dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-all: $(VENV)/dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m ''

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/render.py --check

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(VENV)/dev  ## copy benchmark results into README and docs
	$(BIN)/python benchmarks/render.py

wheel: $(VENV)/dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info
