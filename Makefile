# Needs python3 (3.10 or newer), pip, make. Everything is installed into .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers with one torch thread each: tests are many and small, so processes help and threads get in the way.
WORKERS ?= 2
PYTEST_ARGS ?=
# A stamp is older than these after a change of dependencies or of the native kernels, and the install runs again.
INPUTS := pyproject.toml constraints.txt setup.py $(wildcard src/anybit/kernels/cpu/csrc/*)

.PHONY: help demo test check format capabilities conversions docs clean

help:
	@echo 'make demo    quantize the bundled model with four methods and print the comparison'
	@echo 'make test    run the tests            make test PYTEST_ARGS="-k gptq"'
	@echo 'make check   formatting, lint, types  make format: apply the formatting'
	@echo 'make capabilities  measure what every method can do, for the method table'
	@echo 'make conversions   measure what becomes of every method in every other, for docs/conversions.md'
	@echo 'make docs    build the documentation into build/site'
	@echo 'make clean   remove .venv and caches'

# Some systems ship python3 without ensurepip; then the machine's own pip fills the empty environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("anybit needs Python 3.10 or newer, this is " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,dev]'
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed

demo: $(VENV)/.installed
	@$(BIN)/anybit demo

test: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What the conformance suite sees of every method, for `anybit methods` and the README.
capabilities: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q --record-capabilities src/anybit/methods/_measured.json tests/test_conformance_*.py
	$(BIN)/python docs/generate.py

# What `convert` makes of every method's files in every other method.
conversions: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python docs/conversions.py

docs: $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -d build/site

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info
