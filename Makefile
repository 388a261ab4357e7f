# `make quickstart` and `make test` share one .venv; its stamps keep a second run from calling pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTS_STAMP := $(VENV)/.installed-tests
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
CONFIG := quickstart.yaml
THREADS ?= $$($(BIN)/python -c 'import os; print(os.cpu_count())')
TINY := build/mochi-tiny
DRAWN := build/quickstart
# By files: what a file's tests share is made once. In tests/conftest.py's order: the longest files first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: help venv quickstart test test-slow lint clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   set up, then clips -> cache -> adapter -> report with mochi-tiny, on a CPU, in minutes"
	@echo "make test         set up, then lint, types and the fast tests"
	@echo "make test-slow    the slow tests: quickstart, kills, the wheel"
	@echo "make clean        remove what the commands wrote; .venv stays"

venv: $(STAMP)

# torch alone first: its exact version decides between the CPU and the CUDA build before anything else can ask for one.
# No build isolation: an isolated build would fetch a setuptools that constraints.txt does not see.
$(STAMP): pyproject.toml constraints.txt
	@echo 'installing into $(VENV): about 2.4 GB on a CPU machine, a few minutes'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools torch==2.13.0
	$(PIP) --no-build-isolation -e '.[eval-builtin]'
	touch $@

$(TESTS_STAMP): $(STAMP)
	$(PIP) --no-build-isolation -e '.[test]'
	touch $@

$(TINY)/model_index.json: | $(STAMP)
	$(BIN)/mochi-lora tiny $(TINY)

# Drawn whole or not at all, and kept: the clips of the new style, and clips as the model draws by itself.
$(DRAWN)/chalk/drawn.json: | $(STAMP)
	$(BIN)/mochi-lora draw $(DRAWN)/chalk --style chalk --count 64

$(DRAWN)/plain/drawn.json: | $(STAMP)
	$(BIN)/mochi-lora draw $(DRAWN)/plain --style base --count 64 --seed 1

# The flags after `launch` are accelerate's own defaults; unsaid, it prints a paragraph about each.
quickstart: $(STAMP) $(TINY)/model_index.json $(DRAWN)/chalk/drawn.json $(DRAWN)/plain/drawn.json
	$(BIN)/python data_prep/encode_clips.py --config $(CONFIG)
	$(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process "$(THREADS)" \
		train.py --config $(CONFIG)
	$(BIN)/mochi-lora evaluate --config $(CONFIG) --quick
	@echo
	@echo "Done. Adapter, metrics and videos: runs/quickstart"
	@echo "Before and after, one picture:     runs/quickstart/evaluation/quick-before_after.png"
	@echo "Report, to open in a browser:      runs/quickstart/evaluation/quick-report.html"

test: $(TESTS_STAMP) lint
	$(PYTEST)

test-slow: $(TESTS_STAMP)
	$(PYTEST) -m "slow and not gpu"

lint: $(TESTS_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build cache runs samples dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
