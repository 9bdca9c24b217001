# `make train` and `make test` do all their own set-up.

PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
DATA ?= data/python
RUN ?= runs/quickstart
# Minutes of training; SET="train.steps=4000" trains so many steps instead.
MINUTES ?= 7
# Settings in place of the configuration's, for example SET="train.steps=100 eval.samples=200".
SET ?=

BIN := .venv/bin

.PHONY: setup train test test-fast test-cluster test-versions soak cluster-packages cluster-up cluster-down docs lint gpu clean

PIP := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt

setup: .venv/.developed

# What training needs; most packages' modules are never imported, so none is compiled ahead.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

# What tests and lint need besides.
.venv/.developed: .venv/.installed
	$(PIP) --editable '.[dev]'
	touch $@

# Data, training, export, evaluation, and a look at the space; each goes on from what exists.
# Training that was told to stop ends well too: an unfinished run is not exported.
train: .venv/.installed
	$(BIN)/t5vae quickstart --config $(CONFIG) data.shards=$(DATA) run.output_dir=$(RUN) \
	  train.minutes=$(MINUTES) $(SET)

PARALLEL := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

# Slow tests share what their file starts. Those that start ranks wait for each other half of their
# time: two files at once take all of two cores.
test: test-fast
	$(PARALLEL) --dist loadfile -m 'slow and not distributed and not soak and not cluster'
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m 'distributed and not soak and not cluster'

test-fast: setup
	$(PARALLEL) -m 'not soak and not cluster and not distributed and not slow'

# On a real SLURM of three hosts on this machine; as root.
test-cluster: setup
	$(BIN)/python -m pytest -m cluster

# The oldest and newest packages that pyproject.toml allows, and other Pythons, in environments.
test-versions: setup
	$(BIN)/python -m pytest -m soak tests/wheel/test_versions.py

# All that is long: the cluster, the versions, and a run that is killed KILLS times, as root. Killing
# goes on in runs/kills where it was.
KILLS ?= 20
soak: setup
	$(BIN)/python -m pytest -m 'soak or cluster'
	$(BIN)/python -m tests.soak.kills --kills $(KILLS) runs/kills

# That cluster for trying things by hand: sbatch in any shell reaches it.
NODES ?= 3
cluster-packages:
	$(PYTHON) tests/cluster/cluster.py packages

cluster-up: cluster-packages
	$(PYTHON) tests/cluster/cluster.py up --nodes $(NODES)

cluster-down:
	$(PYTHON) tests/cluster/cluster.py down

# The tables of configuration keys in docs/training.md.
docs: setup
	$(BIN)/python -m t5vae.config.reference docs/training.md

# Is it right, fast and good on this machine's GPU: tables in runs/gpu, as they come.
GPU_MINUTES ?= 9
gpu: setup
	$(BIN)/python benchmarks/gpu.py --prepare
	$(BIN)/python benchmarks/gpu.py --minutes $(GPU_MINUTES)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck slurm/*.sh .ci/run

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info
