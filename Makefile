# The two commands of the README, and what they share: a virtual environment of the project's own.
# PYTHON=python3.13 uses an environment of its own: .venv-3.13.
PYTHON ?= python3
VENV := .venv$(patsubst python%,-%,$(filter python3.%,$(notdir $(PYTHON))))
BIN := $(VENV)/bin

.PHONY: demo test test-rest test-full test-faults faults-report soak test-lowest lint docs dist bench-overhead counts \
	counts-baseline walk numbers storms clean

# The hand-written recipe and celery-alchemy at the same work under each worker pool, counted: 90 seconds on a fresh machine.
demo: $(or $(wildcard $(VENV)/installed),$(VENV)/demo)
	$(BIN)/celery alchemy bench demo $(if $(POOLS),--pools $(POOLS))

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

# The fault tests at full length: soft time limits and kills at thousands of random moments, ten thousand forks, 2,000
# pairs of the same message on each database in each isolation level.
test-faults: $(VENV)/installed
	CELERY_ALCHEMY_FAULTS=full $(BIN)/python -m pytest $(FAULT_TESTS) $(PYTEST_ARGS)

# docs/faults.md: what each fault costs, with celery-alchemy and with patterns written by hand.
faults-report: $(VENV)/installed
	$(BIN)/celery alchemy faults --pools prefork,threads,gevent,eventlet,solo --out docs

# Workers killed at random, with exactly_once and without: each storm leaves a row in storms.jsonl.
storms: $(VENV)/installed
	cd tests && $(CURDIR)/$(BIN)/python -m scripts.once_storms --out $(CURDIR)/storms.jsonl --folder $(CURDIR)/.storms $(STORMS_ARGS)

# 200,000 short tasks for each worker pool: memory, Sessions and connections must not grow.
soak: $(VENV)/installed
	$(BIN)/celery alchemy soak $(if $(POOLS),--pools $(POOLS)) $(if $(TASKS),--tasks $(TASKS))

FAULT_TESTS := tests/faults tests/test_green_units.py tests/test_fork_scenarios.py \
	tests/exactly_once/test_isolation.py tests/exactly_once/test_once_kills.py tests/exactly_once/test_once_storm.py \
	tests/exactly_once/test_killed_awaited.py

# The built wheel, with the oldest versions it allows, away from the checkout.
test-lowest: $(VENV)-lowest/installed
	cd tests && ../$(VENV)-lowest/bin/python -m pytest --numprocesses 4 -p no:cacheprovider $(LOWEST_TESTS) $(PYTEST_ARGS)

# An exception in on_success fails the task there, and the failure of a task that raised SystemExit cannot be stored.
CELERY_5_5_DIFFERS := (a_hook_that_fails or system_exit)
# SQLAlchemy 2.0.43 takes psycopg out of two phases before a transaction that was ended by hand begins again: open.
SQLALCHEMY_2_0_DIFFERS := (ended_by_hand_begins_again or only_reads_after_a_commit_by_hand)
LOWEST_TESTS := test_readme.py test_definitions.py test_outside_workers.py test_settings.py test_contract_endings.py \
	test_contract_nesting.py test_contract_hooks.py test_fork_actions.py test_transient.py test_read_only.py test_outbox.py \
	test_outbox_transactions.py test_outbox_rights.py test_core_transactions.py test_outbox_sending.py \
	test_outbox_senders.py test_outbox_hostile.py test_database_settings.py two_phase test_plugin.py test_bridges.py \
	-k '(not (prefork or threads or gevent or eventlet or solo) or per_process-prefork or scoped-threads or scoped-gevent) \
	and not $(CELERY_5_5_DIFFERS) and not $(SQLALCHEMY_2_0_DIFFERS)'

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation: docs/_build/html. A warning is an error, and so is a link within it that leads nowhere.
docs: $(VENV)/docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build/html

# What would be published: dist/.
dist: $(VENV)/publish
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

bench-overhead: $(VENV)/installed
	$(BIN)/python -m celery_alchemy.loadtests.overhead

# What a task costs, counted: calls, memory blocks, round trips, instructions where valgrind is; compared with the committed
# baseline of this Python, and what is more than 2 % above it fails.
counts: $(VENV)/installed
	$(BIN)/python -m celery_alchemy.loadtests.overhead.counts

counts-baseline: $(VENV)/installed
	$(BIN)/python -m celery_alchemy.loadtests.overhead.counts --write

# The numbers in README and docs are computed again from loadtests/results; what differed is written, and fails.
numbers: $(VENV)/installed
	$(BIN)/python -m celery_alchemy.loadtests.reports.numbers README.md docs/*.md loadtests/README.md

# How many of our files, calls and crossings between files a reader meets who follows one request; LIST=1 names them.
walk: $(VENV)/installed
	$(BIN)/python -m celery_alchemy.loadtests.overhead.walk $(if $(LIST),--list)

# Installs with uv, which takes seconds where pip takes minutes; with pip where uv is not to be had, or finds less than
# pip does (it does not read pip's configuration).
install = $(1)/bin/python -m pip install --quiet --disable-pip-version-check uv \
	&& $(1)/bin/uv pip install --quiet --python $(1)/bin/python $(2) \
	|| $(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2)

# The demo needs less than the tests: what it does not need takes half of the time to install.
$(VENV)/installed: EXTRA := dev
$(VENV)/demo: EXTRA := demo
$(VENV)/installed $(VENV)/demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "celery-alchemy needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(call install,$(VENV),--editable '.[$(EXTRA)]')
	touch $@

$(VENV)/docs $(VENV)/publish: $(VENV)/installed
	$(call install,$(VENV),--editable '.[$(notdir $@)]')
	touch $@

SOURCES := $(wildcard strategies/*.py strategies/*/*.py workers/*.py workers/*/*.py loadtests/*.py celery_alchemy/*.py)

$(VENV)-lowest/installed: pyproject.toml $(SOURCES)
	rm -rf $(VENV)-lowest
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(VENV)-lowest/wheel .
	$(call install,$(VENV)-lowest,'celery[redis]==5.5.0' 'sqlalchemy==2.0.43' \
		"celery-alchemy[dev] @ file://$$(ls $(CURDIR)/$(VENV)-lowest/wheel/*.whl)")
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest
