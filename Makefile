# From a fresh clone on a machine with only Python 3.11 or newer: `make demo` and `make test` do everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo quick test slow lint bench named docs install clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "stemtune needs Python 3.11 or newer, but $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "Making $(VENV) and installing into it (about 3 minutes and 6 GB: torch is large) ..." >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/stemtune demo --out demo

quick: install
	$(BIN)/python -m pytest -m quick

test: install
	$(BIN)/python -m pytest

slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: named install
	$(BIN)/python -m benchmarks $(NAME) $(ARGS)

named:
	@test -n "$(NAME)" || { echo 'which benchmark? make bench NAME=predict, options in ARGS="..."; $(BIN)/python -m benchmarks --help lists them' >&2; exit 2; }

docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/build.py build/docs
	@echo "Open build/docs/index.html"

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
