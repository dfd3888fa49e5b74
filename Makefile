# The two commands of the README, and what they share: a virtual environment of the project's own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench-overhead clean

demo: $(VENV)/installed
	$(BIN)/python -m celery_alchemy.loadtests.demo $(if $(POOLS),--pools $(POOLS)) $(if $(STRATEGY),--strategy $(STRATEGY))

test: $(VENV)/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-overhead: $(VENV)/installed
	$(BIN)/python -m celery_alchemy.loadtests.overhead

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "celery-alchemy needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
