# The two commands of the README, and what they share: a virtual environment of the project's own.
# PYTHON=python3.13 uses an environment of its own: .venv-3.13.
PYTHON ?= python3
VENV := .venv$(patsubst python%,-%,$(filter python3.%,$(notdir $(PYTHON))))
BIN := $(VENV)/bin

.PHONY: demo test test-rest test-full test-faults faults-report soak test-lowest lint bench-overhead counts counts-baseline walk clean

demo: $(VENV)/installed
	$(BIN)/celery alchemy bench --contests pools --workloads mix --restarts 1 --rounds 6 --slice 500ms --fresh $(if $(POOLS),--pools $(POOLS))

# Four at a time, on two processors: most of a test is waiting for its worker. Those that share one stay in one process.
PYTEST := $(BIN)/python -m pytest --numprocesses 4

# The covering set of tests/support/covering.py: every worker pool, strategy, driver, broker and ending, not every pair.
test: $(VENV)/installed
	$(PYTEST) --tests covering $(PYTEST_ARGS)

# What test-full has beyond it.
test-rest: $(VENV)/installed
	$(PYTEST) --tests rest $(PYTEST_ARGS)

# Everything.
test-full: $(VENV)/installed
	$(PYTEST) --tests full $(PYTEST_ARGS)

# The fault tests at full length: soft time limits and kills at thousands of random moments, ten thousand forks.
test-faults: $(VENV)/installed
	CELERY_ALCHEMY_FAULTS=full $(BIN)/python -m pytest $(FAULT_TESTS) $(PYTEST_ARGS)

# docs/faults.md: what each fault costs, with celery-alchemy and with patterns written by hand.
faults-report: $(VENV)/installed
	$(BIN)/celery alchemy faults --pools prefork,threads,gevent,eventlet,solo --out docs

# 200,000 short tasks for each worker pool: memory, Sessions and connections must not grow.
soak: $(VENV)/installed
	$(BIN)/celery alchemy soak $(if $(POOLS),--pools $(POOLS)) $(if $(TASKS),--tasks $(TASKS))

FAULT_TESTS := tests/faults tests/test_green_units.py tests/test_fork_scenarios.py

# The built wheel, with the oldest versions it allows, away from the checkout.
test-lowest: $(VENV)-lowest/installed
	cd tests && ../$(VENV)-lowest/bin/python -m pytest -p no:cacheprovider $(LOWEST_TESTS) $(PYTEST_ARGS)

# An exception in on_success fails the task there, and the failure of a task that raised SystemExit cannot be stored.
CELERY_5_5_DIFFERS := (a_hook_that_fails or system_exit)
LOWEST_TESTS := test_readme.py test_definitions.py test_outside_workers.py test_contract_endings.py \
	test_contract_nesting.py test_contract_hooks.py test_fork_actions.py test_transient.py test_read_only.py test_outbox.py \
	test_database_settings.py test_two_phase.py test_plugin.py test_bridges.py \
	-k '(not (prefork or threads or gevent or eventlet or solo) or per_process-prefork or scoped-threads or scoped-gevent) \
	and not $(CELERY_5_5_DIFFERS)'

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-overhead: $(VENV)/installed
	$(BIN)/python -m celery_alchemy.loadtests.overhead

# What a task costs, counted: calls, memory blocks, round trips, instructions where valgrind is; compared with the committed
# baseline of this Python, and what is more than 2 % above it fails.
counts: $(VENV)/installed
	$(BIN)/python -m celery_alchemy.loadtests.overhead.counts

counts-baseline: $(VENV)/installed
	$(BIN)/python -m celery_alchemy.loadtests.overhead.counts --write

# How many of our files, calls and crossings between files a reader meets who follows one request; LIST=1 names them.
walk: $(VENV)/installed
	$(BIN)/python -m celery_alchemy.loadtests.walk $(if $(LIST),--list)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "celery-alchemy needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

SOURCES := $(wildcard strategies/*.py strategies/*/*.py workers/*.py workers/*/*.py loadtests/*.py celery_alchemy/*.py)

$(VENV)-lowest/installed: pyproject.toml $(SOURCES)
	rm -rf $(VENV)-lowest
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(VENV)-lowest/wheel .
	$(VENV)-lowest/bin/python -m pip install --quiet 'celery[redis]==5.5.0' 'sqlalchemy==2.0.43' \
		"celery-alchemy[dev] @ file://$$(ls $(CURDIR)/$(VENV)-lowest/wheel/*.whl)"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest
