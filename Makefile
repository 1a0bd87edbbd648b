# `make gate` judges the embedded checkpoints, `make test` tests the gate itself. Both set up .venv.
# `make gpu` measures what needs an NVIDIA GPU, in an environment of its own.
VENV := .venv
PYTHON ?= python3
REPORT ?= report
WORKERS ?= 2
GPU_FIGURES ?= build/gpu

.PHONY: gate test gpu env checkpoints lint

gate: checkpoints
	$(VENV)/bin/pytest suites --gate-report $(REPORT)

test: checkpoints lint
	$(VENV)/bin/pytest tests -n $(WORKERS) --no-loadscope-reorder --durations 15

gpu:
	$(PYTHON) tools/make_env.py $(VENV)-gpu --extras gpu,dev
	$(VENV)-gpu/bin/python tools/quantize_tiny.py
	$(VENV)-gpu/bin/python tools/gpu.py --out $(GPU_FIGURES)

env:
	$(PYTHON) tools/make_env.py $(VENV)

checkpoints: env
	$(VENV)/bin/python tools/quantize_tiny.py

lint: env
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
