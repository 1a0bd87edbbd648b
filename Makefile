# `make gate` judges the embedded checkpoints, `make test` tests the gate itself. Both set up .venv.
VENV := .venv
PYTHON ?= python3
REPORT ?= report
WORKERS ?= 2

.PHONY: gate test env checkpoints lint

gate: checkpoints
	$(VENV)/bin/pytest suites --gate-report $(REPORT)

test: checkpoints lint
	$(VENV)/bin/pytest tests -n $(WORKERS) --durations 15

env:
	$(PYTHON) tools/make_env.py $(VENV)

checkpoints: env
	$(VENV)/bin/python tools/quantize_tiny.py

lint: env
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
